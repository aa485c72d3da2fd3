"""Brokered binding: requests wait in front of all ranks until one can start them."""
