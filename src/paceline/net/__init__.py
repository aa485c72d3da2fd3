"""The shells: sockets, processes, signals. No decision is made here that a machine could make."""
