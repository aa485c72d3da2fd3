"""The parts of a front-end's machine."""
