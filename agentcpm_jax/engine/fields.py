"""Reads a request body by a table of its fields.

A table maps each field to the reader of its value. A value of another type or out of range is
refused by the field's name, and so is what stands in no table: nothing that a client asks for is
ignored in silence. null is the same as not given.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from agentcpm_jax.ranges import did_you_mean
from agentcpm_jax.types import UserError

Reader = Callable[[str, Any], Any]  # (name of the field, its value) -> the value to use

MAX_DEPTH = 32  # of JSON that is passed on as it is
INT32, INT64 = 2**31 - 1, 2**63 - 1


def parse_body(raw: bytes) -> dict[str, Any]:
    """The JSON object of a request body; an empty body is an empty object."""
    try:
        body = json.loads(raw, object_pairs_hook=_without_repeats) if raw else {}
    except RecursionError:
        raise UserError("the body is nested too deeply; send flat JSON") from None
    except ValueError as error:  # also bytes in no encoding of JSON, and integers of 4,301 digits
        raise UserError(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(body, dict):
        raise UserError(f"the body must be a JSON object, not {shown(body)}")
    return body


def read_fields(body: Any, table: Mapping[str, Reader], where: str = "") -> dict[str, Any]:
    """The fields that are given, each as its reader returns it.

    `where`: the name of the object itself, unless it is the whole body. Raises `UserError`.
    """
    if not isinstance(body, dict):
        raise refused(where, body, "a JSON object")
    found = {}
    for name, value in body.items():
        if value is None:
            continue
        if name not in table:
            path = shown(f"{where}.{name}".lstrip("."))
            known = did_you_mean(name[:100], table)
            raise UserError(f"unknown parameter {path}, given as {shown(value)}; {known}")
        found[name] = table[name](f"{where}.{name}".lstrip("."), value)
    return found


def refused(path: str, value: Any, words: str) -> UserError:
    """The error for a value that is not `words`."""
    return UserError(f"{path}={shown(value)} must be {words}")


def shown(value: Any) -> str:
    """A value in a message: one short line, however large or deep it is."""
    return _SHORT.repr(value)


# --- readers ----------------------------------------------------------------------------------


def flag(path: str, value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise refused(path, value, "true or false")
    return value


def integer(low: int, high: int, words: str = "") -> Reader:
    """An integer from `low` to `high`, called `words` in the message."""

    def read(path: str, value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise refused(path, value, words or f"an integer from {low} to {high}")
        return value

    return read


def number(low: float, high: float, words: str = "", *, above: bool = False) -> Reader:
    """A number from `low` to `high`; `above`: larger than `low`."""

    def read(path: str, value: Any) -> float:
        good = type(value) in (int, float) and low <= value <= high
        if not good or (above and value == low):
            raise refused(path, value, words or f"a number from {low:g} to {high:g}")
        return float(value)

    return read


def text(most: int, least: int = 0) -> Reader:
    """A text of so many characters, none of them half of a surrogate pair."""

    def read(path: str, value: Any) -> str:
        if not isinstance(value, str) or not least <= len(value) <= most:
            raise refused(path, value, f"a text of {least} to {most} characters")
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise refused(path, value, "whole characters, not half of a surrogate pair")
        return value

    return read


def one_of(*words: str) -> Reader:
    """One of some words."""

    def read(path: str, value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            raise UserError(f"{path}={shown(value)}; one of {', '.join(words)}")
        return value

    return read


def list_of(reader: Reader, most: int, least: int = 0) -> Reader:
    """A list of so many values, each read by `reader`."""

    def read(path: str, value: Any) -> list[Any]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise refused(path, value, f"a list of {least} to {most} values")
        return [reader(f"{path}[{i}]", one) for i, one in enumerate(value)]

    return read


def neutral(*values: Any) -> Reader:
    """A parameter that this server does not have: only values without effect may be given."""

    def read(path: str, value: Any) -> Any:
        if not any(v == value and isinstance(v, bool) == isinstance(value, bool) for v in values):
            raise UserError(f"{path}={shown(value)} is not supported by this server; leave it out")
        return value

    return read


def anything(path: str, value: Any) -> Any:
    """Any value: of what is read later, or changes no token and no text of the answer."""
    return value


def json_object(path: str, value: Any) -> dict[str, Any]:
    """An object of any JSON, with finite numbers and of bounded depth."""
    if not isinstance(value, dict):
        raise refused(path, value, "a JSON object")
    _check_json(path, value, MAX_DEPTH)
    return value


def _check_json(path: str, value: Any, depth: int) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise refused(path, value, "a finite number")
    if isinstance(value, dict | list):
        if not depth:
            raise UserError(f"{path} is nested deeper than {MAX_DEPTH} levels; make it flatter")
        for part in value.values() if isinstance(value, dict) else value:
            _check_json(path, part, depth - 1)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise UserError(f"{shown(twice)} stands twice in one object; give it once")
    return found


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 2, 80, 40, 80
_SHORT.maxlist = _SHORT.maxdict = 4
