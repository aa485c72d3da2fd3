"""These tests need vLLM: `make test-vllm` makes its environment and says so by the variable VLLM."""

import os

collect_ignore_glob = [] if os.environ.get("VLLM") else ["test_*.py"]
