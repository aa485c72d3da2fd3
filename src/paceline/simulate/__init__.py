"""The real machines in virtual time: delays, losses and crashes from a seed, the invariants checked at every event."""
