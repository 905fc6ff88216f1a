"""What a configuration may hold: a value out of its range is answered by its path.

Each configuration class checks itself when it is made, so that a mistake is found before anything
runs. Here is what several of them check alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentcpm_jax.types import UserError


def check_least(section: Any, path: str, least: Mapping[str, float]) -> None:
    """Raise `UserError` for a field of `section` that is below its least value.

    `path` is where the section stands in the configuration: `stream`. None is not checked.
    """
    for name, low in least.items():
        value = getattr(section, name)
        if value is not None and not value >= low:
            raise UserError(f"{path}.{name}={value}; it is at least {low}")


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
            known = ", ".join(allowed)
            raise UserError(f"unknown {path}.{name} {value!r}; use one of {known}")
