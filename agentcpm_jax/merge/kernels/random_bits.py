"""Random bits that are a function of (seed, tensor name, model, element) and of nothing else.

Order of tensors, chunking, sharding, device and library therefore cannot change a mask. The
element's index passes through a bijection of the 32-bit integers: three rounds of xor-shift and
odd multiplication (constants of C. Wellons' triple32), with half of a 64-bit key before the first
round and the other half before the second. The key is BLAKE2b of the seed, the name and the model.

Deviation: this is a hash, not a cryptographic or crush-tested generator. Within one tensor no two
draws are equal.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

ROUNDS = ((17, 0xED5AD4BB, 11), (0, 0xAC4C1B51, 15), (0, 0x31848BAB, 14))


Key = tuple[Any, Any]  # two uint32


def stream_key(seed: int, name: str, model: int) -> Key:
    """Two 32-bit words for one tensor of one model."""
    text = f"{name}\0{model}\0{seed}".encode()
    word = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return np.uint32(word & 0xFFFFFFFF), np.uint32(word >> 32)


def bits_at(index: Any, key: Key) -> Any:
    """uint32 bits for uint32 element indices (numpy or JAX), uniform over [0, 2**32).

    A numpy `index` is overwritten with the result.
    """
    x = index
    x ^= key[0]
    for turn, (before, factor, after) in enumerate(ROUNDS):
        if turn == 1:
            x += key[1]
        if before:
            x ^= x >> np.uint32(before)
        x *= np.uint32(factor)
        x ^= x >> np.uint32(after)
    return x


def probability_bits(p: float) -> int:
    """A draw is below this number with probability `p`, to 32 bits, but never 0 or 1."""
    return min(max(round(p * 2**32), 1), 2**32 - 1)
