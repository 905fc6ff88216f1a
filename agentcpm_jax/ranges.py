"""What a configuration may hold: a value out of its range is answered by its path.

Each configuration class checks itself when it is made, so that a mistake is found before anything
runs. Here is what several of them check alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agentcpm_jax.types import UserError


def check_least(section: Any, path: str, least: Mapping[str, float]) -> None:
    """Raise `UserError` for a field of `section` that is below its least value.

    `path` is where the section stands in the configuration: `stream`. None is not checked. Every
    value of a tuple is.
    """
    for name, low in least.items():
        value = getattr(section, name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and not one >= low:
                raise UserError(f"{path}.{name}={value}; it is at least {low}")


def check_between(section: Any, path: str, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise `UserError` for a field that is not between its two bounds. None is not checked."""
    for name, (low, high) in ranges.items():
        value = getattr(section, name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and not low <= one <= high:
                raise UserError(f"{path}.{name}={value}; give a number from {low} to {high}")


def check_seconds(section: Any, path: str, *names: str) -> None:
    """Raise `UserError` for a field that is no finite number of seconds from 0 on."""
    for name in names:
        value = getattr(section, name)
        if not 0 <= value < float("inf"):
            raise UserError(f"{path}.{name}={value}; give seconds, 0 or more")


def check_choice(section: Any, path: str, choices: Mapping[str, Sequence[str]]) -> None:
    """Raise `UserError` for a field that holds none of its words. None is not checked."""
    for name, allowed in choices.items():
        value = getattr(section, name)
        if value is not None and value not in allowed:
            known = f"use one of {', '.join(allowed)}"
            raise UserError(f"unknown {path}.{name} {value!r}; {known}{_nearest(value, allowed)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names as a question; all of them when none is near."""
    known = list(known)
    return _nearest(name, known)[2:] or f"known: {', '.join(known) or 'none'}"


def _nearest(name: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
