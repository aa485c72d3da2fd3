"""A coordinator under vLLM that hears no front-end's notice.

`PACELINE_TEST_COORDINATOR` names the module that the coordinator runs as: this one, or another.
"""

import os
import sys

from paceline.integrations import vllm_process
from paceline.integrations.vllm_codec import Notice
from paceline.integrations.vllm_events import Event, FrontEndSaid


class DeafProcess(vllm_process.VllmProcess):
    def _handle(self, event: Event) -> None:
        if isinstance(event, FrontEndSaid) and isinstance(event.message, Notice):
            vllm_process.logger.info("a notice is not heard")
        else:
            super()._handle(event)


def register() -> None:
    if program := os.environ.get("PACELINE_TEST_COORDINATOR"):
        from paceline.integrations.vllm_coordinator import VllmCoordinator

        VllmCoordinator.program = program


if __name__ == "__main__":
    vllm_process.VllmProcess = DeafProcess
    vllm_process.main(sys.argv[1:])
