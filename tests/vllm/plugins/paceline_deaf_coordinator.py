"""A coordinator under vLLM that hears no front-end's notice.

`PACELINE_TEST_COORDINATOR` names the module that the coordinator runs as: this one, or another.
"""

import os
import sys

from paceline.vllm import main as vllm_main, process as vllm_process
from paceline.vllm.codec import Notice, read_frontend


class DeafProcess(vllm_process.VllmProcess):
    def _on_frontend_frame(self, frame: bytes) -> None:
        if frame[0] > 1 and isinstance(read_frontend(frame), Notice):
            vllm_process.logger.info("a notice is not heard")
        else:
            super()._on_frontend_frame(frame)


def register() -> None:
    if program := os.environ.get("PACELINE_TEST_COORDINATOR"):
        from paceline.vllm.plugin import VllmCoordinator

        VllmCoordinator.program = program


if __name__ == "__main__":
    vllm_process.VllmProcess = DeafProcess
    vllm_main.main(sys.argv[1:])
