"""The parts of a rank's machine."""
