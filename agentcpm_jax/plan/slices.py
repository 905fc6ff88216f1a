"""The slices and GPUs that a plan can be made for, by name; without jax."""

from __future__ import annotations

import math

from agentcpm_jax.ranges import did_you_mean
from agentcpm_jax.types import UserError

#: Cloud name of a slice (v5p counts cores, two per chip) -> libtpu's name of its topology.
TOPOLOGIES = {
    "v5e-1": "v5e:1x1",
    "v5e-8": "v5e:2x4",
    "v5e-64": "v5e:8x8",
    "v6e-64": "v6e:8x8",
    "v5p-32": "v5p:2x2x4",
    "v5p-64": "v5p:2x4x4",
    "v5p-128": "v5p:4x4x4",
}
#: GPUs, named '<kind>-<count>': only estimated, because their compiler needs the device itself.
GPUS = ("t4", "h200")


def device_count(name: str) -> int:
    """Chips of a slice, or GPUs of 't4-1', 'h200-8'; raises `UserError` for an unknown name."""
    if name in TOPOLOGIES:
        return math.prod(int(size) for size in TOPOLOGIES[name].split(":")[1].split("x"))
    kind, _, count = name.partition("-")
    if kind in GPUS and count.isdigit() and int(count):
        return int(count)
    known = [*TOPOLOGIES, "t4-1", "h200-1"]
    raise UserError(
        f"unknown slice {name!r}; use one of {', '.join(known)}; {did_you_mean(name, known)}"
    )
