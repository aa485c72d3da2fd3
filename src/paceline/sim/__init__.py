"""One simulated deployment of the real machines: one clock, one kind of link, one process class a role."""
