"""`paceline top`: the page at /dashboard in a terminal."""
