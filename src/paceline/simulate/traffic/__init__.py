"""Performance in virtual time: whole deployments on real traces, ours and its peers, without a fault."""
