"""The machines without processes: every interleaving of a small deployment, or one long run of a large one."""
