"""Compiling a train step for accelerators that are not here.

libtpu holds the whole TPU compiler. Given a description of a slice it lowers, shards, schedules and
allocates a step for it on any machine: what comes back says whether the step compiles and fits,
never how fast it runs or what it computes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from agentcpm_jax.types import UserError

#: Slices by the name they are rented under (v5p counts cores, two a chip) -> libtpu's grid.
TOPOLOGIES = {
    "v5e-1": "v5e:1x1",
    "v5e-8": "v5e:2x4",
    "v5e-64": "v5e:8x8",
    "v6e-64": "v6e:8x8",
    "v5p-32": "v5p:2x2x4",
    "v5p-64": "v5p:2x4x4",
    "v5p-128": "v5p:4x4x4",
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Compiled(NamedTuple):
    """What the compiler said; bytes are of one device."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    collectives: dict[str, int]
    pallas_calls: int

    @property
    def hbm_bytes(self) -> int:
        """Held while the step runs; donated arguments are counted once."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes


def topology_devices(name: str, slices: int = 1) -> Sequence[Any]:
    """Devices of a slice that is not here, for `sharding.make_mesh`.

    Raises:
      UserError: unknown name, or libtpu is not installed.
    """
    if name not in TOPOLOGIES:
        raise UserError(f"unknown TPU slice {name!r}; use one of {', '.join(TOPOLOGIES)}")
    # libtpu would look for the metadata server of a TPU host, and for other users of the chips.
    for key, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_WORKER_ID", "0"),
    ):
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    kind = TOPOLOGIES[name].split(":")[0]
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if TOPOLOGIES[name] == "v5e:1x1":  # a host has four chips unless it is told otherwise
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=TOPOLOGIES[name], **options
        )
    except Exception as error:
        if "libtpu" in str(error).lower() or "not found" in str(error).lower():
            raise UserError(
                f"compiling for {kind} needs libtpu, which is not installed; "
                "pip install 'agentcpm_jax[tpu]'"
            ) from error
        raise
    return description.devices


def compile_ahead(step: Any, *arguments: Any) -> Compiled:
    """Compiles a jitted step for abstract arguments (`placement.abstract_inputs`).

    Raises:
      UserError: it does not fit the device; names the need, the biggest buffers, what to change.
    """
    try:
        compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        raise_if_too_large(error)
        raise
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Compiled(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        {name: _count(name, text) for name in COLLECTIVES},
        text.count('custom_call_target="tpu_custom_call"'),
    )


def raise_if_too_large(error: Exception) -> None:
    """Turns the compiler's RESOURCE_EXHAUSTED into a `UserError` of one line."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return
    found = re.search(r"Used ([\d.]+\w?) of ([\d.]+\w?) hbm|([\d.]+\w) exceeds ([\d.]+\w)", text)
    used, limit = [x for x in found.groups() if x] if found else ("more memory", "the device has")
    sizes = re.findall(
        r"Size: ([\d.]+\w).*?(?:Operator: op_name=\"([^\"]*)\"|Shape: (\S+))", text, re.S
    )
    biggest = "; ".join(f"{size} {op.rsplit('/', 1)[-1] or shape}" for size, op, shape in sizes[:3])
    raise UserError(
        f"the step does not fit: it needs {used} of {limit} per device"
        + (f" (biggest buffers: {biggest})" if biggest else "")
        + "; split it over more devices (mesh.fsdp, mesh.context), keep less "
        "(model.remat='full', a smaller model.logits_chunk), or feed fewer tokens at a time "
        "(shape.micro_rows, shape.row_length)"
    ) from error


def _count(name: str, text: str) -> int:
    return len(re.findall(rf"= [^=]*? {name}(?:-start)?\(", text))
