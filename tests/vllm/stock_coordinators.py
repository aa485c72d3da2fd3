"""vLLM's own coordinator, as many as wanted, without a deployment: runs in vLLM's environment.

Each line of standard input names a folder and a number of ranks (JSON: folder, size, waves, fork). A coordinator is
forked for it, and its addresses and process are printed when it has bound. Importing vLLM takes seconds, once; the
first line printed says in what this version differs (`VllmDialect`). With a folder of vLLM's sources as its argument it
makes that version's coordinators, in this one's environment: they are plain Python.
"""

import inspect
import json
import logging
import os
import signal
import sys
from pathlib import Path

import msgspec


class AddressPrinter:
    """Takes the place of the pipe on which vLLM's coordinator reports its addresses."""

    def send(self, addresses: tuple[str, str, str]) -> None:
        print(json.dumps({"addresses": addresses, "pid": os.getpid()}), flush=True)

    def close(self) -> None:
        pass


def main() -> None:
    from vllm.config import ParallelConfig
    from vllm.v1.engine import coordinator

    from paceline.vllm.plugin import dialect_of, installed_dialect

    dialect = installed_dialect(ParallelConfig())
    if sys.argv[1:]:
        sources = Path(sys.argv[1], "v1", "engine")
        exec(compile((sources / "coordinator.py").read_text(), "coordinator.py", "exec"), vars(coordinator))
        count_fields = len(coordinator.EngineState().request_counts)
        dialect = dialect_of((sources / "core.py").read_text(), count_fields, ParallelConfig().dp_sync_interval)
    DPCoordinatorProc = coordinator.DPCoordinatorProc

    # The out-of-order warnings cost it half of its speed at 64 ranks in lockstep; it is measured at its best.
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print(json.dumps({"dialect": msgspec.to_builtins(dialect)}), flush=True)
    known = inspect.signature(DPCoordinatorProc.run_coordinator).parameters
    for line in sys.stdin:
        asked = json.loads(line)
        if not asked["fork"] or os.fork() == 0:
            names = ("front", "output", "publish")
            front, output, publish = (f"ipc://{asked['folder']}/{name}" for name in names)
            printer = AddressPrinter()
            if "zmq_addr_pipe" not in known:
                # Up to about 0.15 it reports nothing; these addresses are of ipc, which may be bound later.
                printer.send((front, output, publish))
            settings = {"zmq_addr_pipe": printer, "enable_wave_coordination": asked["waves"]}
            DPCoordinatorProc.run_coordinator(
                asked["size"], front, output, publish, **{name: settings[name] for name in settings if name in known}
            )


if __name__ == "__main__":
    main()
