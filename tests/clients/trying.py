"""What the scripts of this folder share: where the deployments are, and how they say what worked."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import BaseModel, Field

URL = os.environ["CLIENTS_URL"]
EMBED_URL = os.environ["CLIENTS_EMBED_URL"]
MODEL = os.environ["CLIENTS_MODEL"]


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=130)
    mood: Literal["good", "bad"]


def tried(what: str) -> None:
    """This worked."""
    print(f"tried: {what}", flush=True)


def close(one: list[float], other: list[float]) -> float:
    return sum(left * right for left, right in zip(one, other, strict=True))
