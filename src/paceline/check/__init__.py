"""`paceline check`: every interleaving of the production machines in small deployments (one search, three models)."""
