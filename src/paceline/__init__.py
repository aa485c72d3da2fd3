"""Paceline: the control plane of data-parallel LLM serving."""

__version__ = "0.1.0"
