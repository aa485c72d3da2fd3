"""The front-end process: HTTP on one side, ranks and the coordinator on the other."""
