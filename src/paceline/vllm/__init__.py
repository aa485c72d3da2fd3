"""Paceline under engines that have a control plane of their own."""
