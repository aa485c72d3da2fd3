"""Parts of the HTTP stack measurement; the command is bench/http_stacks.py."""
