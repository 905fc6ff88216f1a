"""The JSON that models write (JSON5: quotes, commas, comments, bare keys, numbers), in linear time.

One regular expression cuts the text into tokens, each is rewritten as strict JSON, and the standard
library parses the result. Duplicate keys, NaN, infinities and lone surrogates are refused, because
parsers disagree on them.
"""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Any

IN_STRING = -2


class LenientJsonError(ValueError):
    """`kind` is bad_json, bad_value (parsed, but ambiguous or not representable) or too_deep."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def loads(text: str, max_depth: int = 64) -> Any:
    """Parse strict JSON (raw newlines in strings allowed), else JSON5. Raises LenientJsonError."""
    if text.count("[") + text.count("{") > max_depth < _depth(text):
        raise LenientJsonError("too_deep", f"nested deeper than {max_depth} levels")
    try:
        return _strict(text)
    except LenientJsonError:
        raise
    except ValueError:
        pass
    try:
        return _strict(_to_strict(text))
    except LenientJsonError:
        raise
    except ValueError as error:
        raise LenientJsonError("bad_json", str(error)[:200]) from None


def object_end(text: str, start: int, stop: int = sys.maxsize) -> int:
    """The index after the `}`, before `stop`, that closes the `{` at `start`.

    -1 when nothing closes it, `IN_STRING` when that is because a quote is never closed.
    """
    depth = 0
    for match in _STRUCTURE.finditer(text, start, stop):
        token = match[0]
        if token in "{[":
            depth += 1
        elif token in "}]":
            depth -= 1
            if depth == 0:
                return match.end()
        elif token in "\"'":
            return IN_STRING
    return -1


def _depth(text: str) -> int:
    depth = deepest = 0
    for match in _STRUCTURE.finditer(text):
        if match[0] in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in "}]":
            depth -= 1
    return deepest


def _strict(text: str) -> Any:
    value = json.loads(
        text,
        strict=False,
        object_pairs_hook=_pairs,
        parse_constant=_constant,
        parse_float=_float,
    )
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise LenientJsonError("bad_value", "a string holds half of a surrogate pair") from None
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise LenientJsonError("bad_value", "an object has the same key twice")
    return found


def _constant(name: str) -> Any:
    raise LenientJsonError("bad_value", f"{name} is not a JSON number")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise LenientJsonError("bad_value", f"the number {digits[:20]} is out of range")
    return value


_COMMENT = r"//[^\n\r]*+|/\*(?:[^*]++|\*(?!/))*+\*/"
_DOUBLE = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_SINGLE = r"'[^'\\]*+(?:\\.[^'\\]*+)*+'"
_STRUCTURE = re.compile(rf"{_DOUBLE}|{_SINGLE}|{_COMMENT}|[\[\]{{}}\"']", re.DOTALL)
_TOKEN = re.compile(
    rf"""(?P<skip>\s++|{_COMMENT})
    |(?P<string>{_DOUBLE}|{_SINGLE})
    |(?P<number>[+-]?(?:0[xX][0-9a-fA-F]++|Infinity|NaN
        |(?:[0-9]++(?:\.[0-9]*+)?+|\.[0-9]++)(?:[eE][+-]?[0-9]++)?+))
    |(?P<name>[\w$]++)
    |(?P<mark>[\[\]{{}}:,])""",
    re.DOTALL | re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|\r\n|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "0": "\0"}
_ESCAPED |= {"\n": "", "\r\n": "", "\r": ""}  # a continued line


def _to_strict(text: str) -> str:
    """JSON5 tokens rewritten as JSON; the grammar is left to the JSON parser. Raises ValueError."""
    out: list[str] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"unexpected {text[position]!r} at character {position}")
        position, kind, token = match.end(), match.lastgroup, match[0]
        if kind == "skip":
            continue
        if kind == "string":
            out.append(json.dumps(_ESCAPE.sub(_unescape, token[1:-1])))
        elif kind == "number":
            out.append(_number(token))
        elif kind == "name":
            out.append(token)
        else:
            if token in "]}" and len(out) > 1 and out[-1] == "," and out[-2] not in "[{,":
                out.pop()  # one trailing comma
            if token == ":" and len(out) > 1 and out[-2] in "{," and not out[-1].startswith('"'):
                out[-1] = json.dumps(out[-1])
            out.append(token)
    return " ".join(out)


def _unescape(match: re.Match[str]) -> str:
    code = match[1]
    if len(code) > 1 and code[0] in "ux":
        return chr(int(code[1:], 16))
    return _ESCAPED.get(code, code)


def _number(token: str) -> str:
    """`+2`, `.5`, `5.`, `0x1F` as JSON numbers; NaN and Infinity stay for the parser to refuse."""
    sign, digits = ("-" if token[0] == "-" else ""), token.lstrip("+-")
    if digits in ("NaN", "Infinity"):
        return "NaN" if digits == "NaN" else sign + digits
    if digits[:2] in ("0x", "0X"):
        return sign + str(int(digits, 16))
    mantissa, exponent = re.fullmatch(r"([^eE]*)(.*)", digits).groups()  # type: ignore[union-attr]
    if mantissa.startswith("."):
        mantissa = "0" + mantissa
    return sign + mantissa.rstrip(".") + exponent
