"""Late binding: requests wait once, in front of all ranks, until one can start them."""
