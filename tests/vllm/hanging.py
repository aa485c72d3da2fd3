"""vLLM's engine whose step can be made to hang: `--engine tests.vllm.hanging:HangingVllm`.

A rank that finds the file `hang-RANK` in the folder HANG_FOLDER takes it away, and its step does not return. All steps
last STEP_S longer than they would: the tiny model has answered before a client that is to kill its rank has read that.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from paceline.engines.base import StepResult
from paceline.engines.vllm import VllmEngine

STEP_S = 0.01


class HangingVllm(VllmEngine):
    def step(self) -> StepResult:
        asked = Path(os.environ["HANG_FOLDER"], f"hang-{self._settings.rank}")
        if asked.exists():
            asked.unlink()
            threading.Event().wait()
        threading.Event().wait(STEP_S)
        return super().step()
