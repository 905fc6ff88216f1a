"""Text to ids and back, where only the program's own markers may become control tokens.

A page or a user can write `<|im_end|>` or `<tool_call>`. Encoded in one go, such text would become
control tokens. Here data is *marked* before it is rendered: a literal of an added token inside data
is replaced by a code after a private-use character, and restored after the split at control tokens.
The text between two control tokens is then encoded in one go by a copy of the tokenizer that has
no added tokens, so the ids of harmless text equal those of the full tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

MARK = "\U0010fffd"  # last private-use character; itself escaped wherever data holds it
OBSERVED = MARK + "t"  # this stretch holds a tool's observation
SLOT = MARK + "s"  # where an assistant's text would stand


class Untrusted(str):
    """Marked text that string tests in a template treat like the unmarked text."""

    original: str

    def startswith(self, prefix: Any, *bounds: Any) -> bool:
        return self.original.startswith(prefix, *bounds)

    def endswith(self, suffix: Any, *bounds: Any) -> bool:
        return self.original.endswith(suffix, *bounds)

    def __contains__(self, part: Any) -> bool:
        return part in self.original


class MarkedTokenizer:
    """A `tokenizers.Tokenizer` with two levels of trust.

    Every added token counts as a control token; those flagged special (`<|im_end|>`) delimit turns,
    the others (`<tool_call>`, `<think>`) structure what an assistant says.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self.full = tokenizer
        self.ids: dict[str, int] = {token.content: i for i, token in added.items()}
        self._literals = list(self.ids)
        self._index = {literal: k for k, literal in enumerate(self._literals)}
        self._control = _any_of(self._literals)
        self._special = _any_of([token.content for token in added.values() if token.special])
        self._plain = _without_added_tokens(tokenizer, self._literals)

    def mark_data(self, text: str) -> Untrusted:
        """Text of a user, a tool or a schema: none of it may become a control token."""
        return self._mark(text, self._control)

    def mark_program(self, text: str) -> Untrusted:
        """Text of the system or an assistant: `<tool_call>` may count, `<|im_end|>` may not."""
        return self._mark(text, self._special)

    def mark_nothing(self, text: str) -> Untrusted:
        """Text that is wholly trusted: each control token in it counts."""
        return self._mark(text, _NOTHING)

    def restore(self, marked: str) -> str:
        """The text with its marks replaced by the original."""
        return _CODE.sub(self._decode_mark, marked)

    def encode(self, marked: str) -> tuple[list[int], list[bool]]:
        """ids and, for each, whether it belongs to a tool's observation."""
        ids: list[int] = []
        observed: list[bool] = []

        def text(chunk: str) -> None:
            found = self._plain.encode(self.restore(chunk), add_special_tokens=False).ids
            ids.extend(found)
            observed.extend([OBSERVED in chunk] * len(found))

        position = 0
        for match in self._control.finditer(marked):
            text(marked[position : match.start()])
            ids.append(self.ids[match[0]])
            observed.append(False)
            position = match.end()
        text(marked[position:])
        return ids, observed

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, control tokens included."""
        return self.full.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_spans(
        self, ids: Sequence[int] | np.ndarray, char_spans: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """The smallest token spans [start, end) of `ids` that cover spans of `decode(ids)`.

        Bisection over decoded prefixes works for any tokenizer. `char_spans` must ascend.
        """
        listed = [int(i) for i in ids]
        text = self.decode(listed)

        def smallest(low: int, reached: Callable[[str], bool]) -> int:
            high = len(listed)
            while low < high:
                middle = (low + high) // 2
                if reached(self.decode(listed[:middle])):
                    high = middle
                else:
                    low = middle + 1
            return low

        spans, first = [], 0
        for start, end in char_spans:
            # a prefix may end inside a character: that decodes to one replacement character
            first = max(smallest(first, lambda prefix, start=start: len(prefix) > start) - 1, 0)
            last = smallest(first, lambda prefix, end=end: prefix[:end] == text[:end])
            spans.append((first, last))
        return spans

    def _mark(self, text: str, literals: re.Pattern[str]) -> Untrusted:
        text = whole_characters(text)
        marked = text.replace(MARK, MARK + "m")
        marked = literals.sub(lambda match: f"{MARK}c{self._index[match[0]]};", marked)
        result = Untrusted(marked)
        result.original = text
        return result

    def _decode_mark(self, match: re.Match[str]) -> str:
        if match[1] is not None:
            return self._literals[int(match[1])]
        return MARK if match[0] == MARK + "m" else ""


def whole_characters(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which no tokenizer takes."""
    return text if text.isascii() else _HALF.sub("\ufffd", text)


_HALF = re.compile("[\ud800-\udfff]")
_NOTHING = re.compile(r"(?!)")
_CODE = re.compile(MARK + r"(?:c(\d+);|[mts])")


def _any_of(literals: Sequence[str]) -> re.Pattern[str]:
    """A pattern that matches any literal, longest first; nothing when there is none."""
    ordered = sorted(literals, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


def _without_added_tokens(tokenizer: Tokenizer, literals: Sequence[str]) -> Tokenizer:
    """A copy that can emit none of `literals`, not even as an entry of its model's vocabulary."""
    spec = json.loads(tokenizer.to_str())
    spec.update(added_tokens=[], post_processor=None, padding=None, truncation=None)
    vocab = spec["model"].get("vocab")
    if isinstance(vocab, dict):
        for literal in literals:
            vocab.pop(literal, None)
    return Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
