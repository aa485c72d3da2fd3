"""The parts of the coordinator's machine."""
