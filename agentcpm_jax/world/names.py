"""The words of the offline world: 96 first words, 96 second words, 10 relations, three splits.

A name is "First Second". All name words have three letters, so none is a prefix of another; the two
tables begin with different consonants, so they share no word.
"""

from __future__ import annotations

import itertools

FIRST: tuple[str, ...] = tuple(map("".join, itertools.product("BDFKMPRT", "aeio", "lnr")))
SECOND: tuple[str, ...] = tuple(map("".join, itertools.product("GHJLNSVZ", "aeiu", "lmn")))

RELATIONS: tuple[str, ...] = (
    "founder",
    "mayor",
    "rival",
    "mentor",
    "partner",
    "sibling",
    "heir",
    "tutor",
    "patron",
    "envoy",
)

SPLITS: tuple[str, ...] = ("train", "validation", "test")


def split_of(i: int, j: int) -> str:
    """The split that owns the pair (FIRST[i], SECOND[j]): 1 in 10 test, 1 in 10 validation.

    The products modulo the prime 97 are a Latin square: every word has exactly 10 pairs in either
    held-out split, so families of look-alikes can be as large there as in training.
    """
    return {1: "test", 2: "validation"}.get((i + 1) * (j + 1) % 97 % 10, "train")


def seconds_of(i: int, split: str) -> list[int]:
    """The second words that may follow FIRST[i] in a split, ascending."""
    return [j for j in range(len(SECOND)) if split_of(i, j) == split]
