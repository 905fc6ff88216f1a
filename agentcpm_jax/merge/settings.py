"""One parameter setting of a recipe, and its value for one tensor.

A setting is a value; a list of values, which is a gradient over the layers of a slice; or a list of
`{filter, value}`, whose first entry that fits the tensor's name counts.

    position of layer i of L:  t = i / (L - 1), 0 where there is one layer or none
    gradient of K numbers:     s = t (K - 1), i = floor(s), (1 - s + i) v_i + (s - i) v_(i+1)
    gradient of K others:      v_floor(s)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agentcpm_jax.types import UserError


class _Missing:
    def __repr__(self) -> str:
        return "missing"


MISSING = _Missing()  # None is a value


def resolve(key: str, tensor: str, t: float, scopes: Sequence[Mapping[str, Any]]) -> Any:
    """The value of parameter `key` for `tensor`: from the first scope that has one, or MISSING.

    Args:
      tensor: name the filters are matched against, as substrings.
      t: position of the tensor's layer in its slice, 0 to 1.
      scopes: settings by parameter name, the most specific first.
    """
    for scope in scopes:
        if key in scope and (value := _fitting(scope[key], tensor)) is not MISSING:
            return _at(value, t)
    return MISSING


def filters(setting: Any) -> Iterator[str]:
    """The name filters of a setting that can fail to match."""
    if _is_filtered(setting):
        for entry in setting:
            if entry.get("filter") not in (None, "*"):
                yield entry["filter"]


def check_setting(setting: Any, default: Any, where: str, choices: Sequence[str] = ()) -> None:
    """Raises UserError, naming `where`, unless every value is of the kind of `default`."""
    if _is_filtered(setting):
        for entry in setting:
            if not isinstance(entry, Mapping):
                raise UserError(f"{where} mixes filters and values; give every value a filter")
            if "value" not in entry or not set(entry) <= {"filter", "value"}:
                raise UserError(f"{where}: {dict(entry)!r} is not {{filter: ..., value: ...}}")
            if not isinstance(entry.get("filter", ""), str | None):
                raise UserError(
                    f"{where}: filter {entry['filter']!r} is no part of a tensor's name"
                )
            if _is_filtered(entry["value"]):
                raise UserError(f"{where} has filters within a filter; list them one by one")
            check_setting(entry["value"], default, where, choices)
        return
    values = setting if isinstance(setting, list) else [setting]
    if not values:
        raise UserError(f"{where} is an empty list; write one value per knot of the gradient")
    for value in values:
        _check_value(value, default, where, choices)


def _check_value(value: Any, default: Any, where: str, choices: Sequence[str]) -> None:
    if choices:
        wrong = value not in choices and not (isinstance(default, bool) and value in (True, False))
        expected = ", ".join([*choices, *(["true", "false"] if isinstance(default, bool) else [])])
    elif isinstance(default, bool):
        wrong, expected = value not in (True, False), "true or false"
    else:
        number = _number(value)
        numeric = isinstance(number, int | float) and not isinstance(number, bool)
        wrong, expected = not (numeric and math.isfinite(number)), "a finite number"
    if wrong:
        raise UserError(f"{where} is {value!r}; write {expected}")


def _number(value: Any) -> Any:
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _is_filtered(setting: Any) -> bool:
    return isinstance(setting, list) and any(isinstance(entry, Mapping) for entry in setting)


def _fitting(setting: Any, tensor: str) -> Any:
    if not _is_filtered(setting):
        return setting
    for entry in setting:
        wanted = entry.get("filter")
        if wanted in (None, "*") or wanted in tensor:
            return entry["value"]
    return MISSING


def _at(value: Any, t: float) -> Any:
    if not isinstance(value, list):
        return _number(value)
    knots = [_number(v) for v in value]
    s = t * (len(knots) - 1)
    i = math.floor(s)
    if any(isinstance(v, bool | str) for v in knots):
        return knots[i]
    fraction = s - i
    return (1 - fraction) * knots[i] + fraction * knots[min(i + 1, len(knots) - 1)]
