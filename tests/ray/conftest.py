"""These tests need Ray: `make test-ray` makes its environment and says so by the variable RAY."""

import os

collect_ignore_glob = [] if os.environ.get("RAY") else ["test_*.py"]
