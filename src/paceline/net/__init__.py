"""Shells: sockets around the machines."""
