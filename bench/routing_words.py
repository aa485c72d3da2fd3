"""The prose of `results/routing.md`."""

HEAD = """# Routing against other systems and a bound, on real traces

    make bench-routing ARGS='{arguments} --write'

In virtual time (`paceline simulate --trace`), {minutes:.0f} minutes on one core. Every figure is a ratio to the
oracle's in the same row: one queue before all ranks, perfect and instant knowledge, lengths of answers known.
"""

BEHIND = ""
