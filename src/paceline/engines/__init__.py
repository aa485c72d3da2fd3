"""Engines, and the interface that they meet (`base.py`)."""
