"""`paceline coordinator`: the coordinator alone, for ranks and front-ends that somebody else starts.

It uses argparse and not the main command line's typer, so that it imports no more than the coordinator does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from paceline.errors import PacelineError
from paceline.log import fail, set_up_log
from paceline.net.coordinator import DPCoordinatorProc

DESCRIPTION = "Run a coordinator alone. docs/PROTOCOL.md says how ranks and front-ends talk to it."


def parser() -> argparse.ArgumentParser:
    """The options, named as `DPCoordinatorProc.run_coordinator` names its arguments."""
    made = argparse.ArgumentParser(
        prog="paceline coordinator", description=DESCRIPTION, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = made.add_argument
    add("--data-parallel-size", "-dp", type=int, default=2, metavar="N", help="ranks in the deployment")
    add("--max-data-parallel-size", type=int, metavar="N", help="ranks that it may be scaled to")
    add("--front-publish-address", default="tcp://127.0.0.1:29551", metavar="ADDRESS", help="front-ends connect here")
    add("--back-output-address", default="tcp://127.0.0.1:29552", metavar="ADDRESS", help="ranks send here")
    add("--back-publish-address", default="tcp://127.0.0.1:29553", metavar="ADDRESS", help="ranks listen here")
    add("--min-stats-update-interval-ms", type=int, default=100, metavar="MS", help="least time between load views")
    add("--no-wave-coordination", action="store_true", help="the ranks are independent: no waves")
    add("--no-loads", action="store_true", help="publish no loads, as in external mode")
    add("--restarted", action="store_true", help="it takes the place of one that has ended: hear the ranks first")
    add("--log-level", default="info", choices=["debug", "info", "warning", "error"], help="what is logged")
    return made


def run_command(arguments: Sequence[str]) -> None:
    """Parse and run until SIGTERM or Ctrl-C."""
    options = parser().parse_args(arguments)
    set_up_log(options.log_level)
    try:
        if not 1 <= options.data_parallel_size <= 65536:
            raise PacelineError("--data-parallel-size: must be 1 to 65536")
        most = options.max_data_parallel_size
        if most is not None and not options.data_parallel_size <= most <= 65536:
            raise PacelineError(f"--max-data-parallel-size: must be {options.data_parallel_size} to 65536")
        if not 0 <= options.min_stats_update_interval_ms <= 3_600_000:
            raise PacelineError("--min-stats-update-interval-ms: must be 0 to 3600000")
        process = DPCoordinatorProc(
            options.data_parallel_size, options.min_stats_update_interval_ms, not options.no_wave_coordination,
            not options.no_loads, not options.restarted, most_ranks=most,
        )  # fmt: skip
        process.stop_on_signals()
        process.process_input_socket(
            options.front_publish_address, options.back_output_address, options.back_publish_address, _show
        )
    except PacelineError as error:
        fail(error)
        sys.exit(1)


def _show(addresses: tuple[str, str, str]) -> None:
    for name, address in zip(("front-publish", "back-output", "back-publish"), addresses, strict=True):
        print(f"{name:14}{address}", flush=True)
