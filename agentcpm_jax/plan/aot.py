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
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from agentcpm_jax.files import size_text
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.plan.memory import MemoryEstimate, estimate
from agentcpm_jax.plan.slices import TOPOLOGIES
from agentcpm_jax.train.losses.config import LossConfig
from agentcpm_jax.train.optimizer import Schedule
from agentcpm_jax.train.placement import abstract_base, abstract_inputs, step_shardings
from agentcpm_jax.train.step import Frozen, make_rl_step, make_sft_step, needs_reference
from agentcpm_jax.types import UserError

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Compiled(NamedTuple):
    """The compiler's figures for a step; bytes are per device."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    collectives: dict[str, int]
    pallas_calls: int

    @property
    def hbm_bytes(self) -> int:
        """Memory held while the step runs; donated arguments count once."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes


def topology_devices(name: str, slices: int = 1) -> Sequence[Any]:
    """Devices of a slice that is not here, for `sharding.make_mesh`.

    Raises:
      UserError: unknown name, or libtpu is not installed.
    """
    if name not in TOPOLOGIES:
        raise UserError(
            f"{name!r} cannot be compiled for from here; use one of {', '.join(TOPOLOGIES)}"
        )
    # Else libtpu looks for the metadata server of a TPU host and for other users of the chips.
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
    if TOPOLOGIES[name] == "v5e:1x1":  # libtpu assumes four chips per host
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=TOPOLOGIES[name], **options
        )
    except Exception as error:
        if "not installed" in str(error) or "libtpu" in str(error):
            raise UserError(
                f"compiling for {kind} needs libtpu, which is not installed; "
                "pip install 'agentcpm_jax[tpu]'"
            ) from error
        raise
    return description.devices


def compile_step(
    model: ModelConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rows: int,
    row_length: int,
    *,
    micro_rows: int = 0,
    loss: LossConfig | None = None,
    schedule: Schedule | None = None,
) -> Compiled:
    """Compile the SFT step, or with `loss` the RL step, for batches of rows x row_length tokens.

    Raises:
      UserError: the mesh does not divide model or rows, or the step does not fit a device.
    """
    shardings = step_shardings(mesh, model, tx, micro_rows or rows)
    state, batch = abstract_inputs(model, tx, rows, row_length, shardings)
    base = abstract_base(model, shardings) if model.lora_rank else None
    options: dict[str, Any] = {"micro_rows": micro_rows, "shardings": shardings}
    expected = estimate(model, tx, mesh, rows, row_length, micro_rows)
    if loss is None:
        step = make_sft_step(model, tx, schedule, **options)
        return compile_ahead(step, state, batch, Frozen(base), estimate=expected)
    step = make_rl_step(model, loss, tx, schedule, **options)
    version = jax.ShapeDtypeStruct((), jnp.int32)
    whole = state.params if base is None else base
    frozen = Frozen(base, whole if needs_reference(loss) else None)
    return compile_ahead(step, state, batch, version, frozen, estimate=expected)


def compile_ahead(step: Any, *arguments: Any, estimate: MemoryEstimate | None = None) -> Compiled:
    """Compiles a jitted step for abstract arguments (`placement.abstract_inputs`).

    Raises:
      UserError: the step does not fit the device, see `raise_if_too_large`.
    """
    try:
        compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        raise_if_too_large(error, estimate)
        raise
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    return Compiled(
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
        analysis.alias_size_in_bytes,
        analysis.temp_size_in_bytes,
        {name: _count(name, text) for name in COLLECTIVES},
        text.count('custom_call_target="tpu_custom_call"'),
    )


def raise_if_too_large(error: Exception, estimate: MemoryEstimate | None = None) -> None:
    """Turns RESOURCE_EXHAUSTED of a compiler or a device into a `UserError` of one line.

    It gives the memory needed, the estimate and its biggest parts (the compiler names no buffers),
    and three things to change. Other errors pass.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return
    found = re.search(r"([\d.]+[KMG])\)? exceeds (?:available HBM )?\(?([\d.]+[KMG])", text)
    said = f"it needs {found[1]} of {found[2]} per device" if found else text.splitlines()[0]
    expected = ""
    if estimate is not None:
        parts = sorted(estimate.parts.items(), key=lambda part: -part[1])[:3]
        listed = ", ".join(f"{name} {size_text(size, binary=True)}" for name, size in parts)
        expected = f" (estimate {size_text(estimate.total, binary=True)}, the biggest: {listed})"
    raise UserError(
        f"the step does not fit: {said}{expected}; split it over more devices (mesh.fsdp, "
        "mesh.context), keep less (model.remat='full', a smaller model.logits_chunk), or feed "
        "fewer tokens at a time (shape.micro_rows, shape.row_length)"
    ) from error


def _count(name: str, text: str) -> int:
    return len(re.findall(rf"= [^=]*? {name}(?:-start)?\(", text))
