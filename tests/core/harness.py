"""Partial matches: assertions name the fields that they are about, so that a new field breaks none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def find(things: Iterable[Any], kind: type, **fields: object) -> list[Any]:
    """The things of this kind whose named fields have these values."""
    return [
        thing
        for thing in things
        if isinstance(thing, kind) and all(getattr(thing, name) == value for name, value in fields.items())
    ]


def said(effects: Iterable[Any], kind: type, **fields: object) -> list[Any]:
    """The messages of this kind that the effects send, with these values."""
    return find((getattr(effect, "message", None) for effect in effects), kind, **fields)


def one(things: list[Any]) -> Any:
    assert len(things) == 1, f"{len(things)} in place of one: {things}"
    return things[0]
