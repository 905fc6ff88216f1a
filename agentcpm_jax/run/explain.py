"""What a configuration will take, before anything is started: memory, time, traffic, cost.

Every figure says where it comes from: `exact` is arithmetic on shapes, `estimate` a formula with
assumptions (stated beside it), `AOT` the compiler's own figure for the target slice. Nothing is
measured here, and no accelerator is needed.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh

from agentcpm_jax.config import ExperimentConfig, RLStage, Stage, TrainShape
from agentcpm_jax.model import params as model_params
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.sharding import AXES, make_mesh, mesh_shape
from agentcpm_jax.train import flops, memory
from agentcpm_jax.train.aot import TOPOLOGIES, compile_ahead, topology_devices
from agentcpm_jax.train.optimizer import OptimizerConfig, make_optimizer
from agentcpm_jax.train.placement import abstract_inputs, step_shardings
from agentcpm_jax.train.step import make_rl_step, make_sft_step, needs_reference
from agentcpm_jax.types import UserError

GIB = 2**30
#: Bytes of one recorded token before compression: id, provenance, log-probability, version.
LOG_BYTES = 13
MFU = 0.5


def explain(cfg: ExperimentConfig, slice_name: str, *, compiled: bool, prices: str = "") -> str:
    """A page of text.

    Args:
      slice_name: the TPU slice to run on, a key of `aot.TOPOLOGIES`.
      compiled: also compile every step for it (minutes; needs libtpu).
      prices: a JSON file of {"v5p": [low, high]}, per chip and hour, in any currency.
    Raises:
      UserError: unknown slice, a mesh that does not divide, a step that does not fit.
    """
    if slice_name not in TOPOLOGIES:
        raise UserError(f"unknown TPU slice {slice_name!r}; use one of {', '.join(TOPOLOGIES)}")
    kind, grid = TOPOLOGIES[slice_name].split(":")
    devices = math.prod(int(size) for size in grid.split("x"))
    shape = mesh_shape(cfg.mesh, devices)
    count = model_params.count(cfg.model)
    lines = [
        f"{cfg.name} on {slice_name}: {devices} chips of {flops.CHIPS[kind].hbm_bytes / GIB:.2f} "
        "GiB, mesh " + ", ".join(f"{a} {n}" for a, n in zip(AXES, shape, strict=True) if n > 1),
        _line("parameters", f"{count:,}", "exact"),
        _line("a published version", _size(count * memory.BYTES[cfg.model.param_dtype]), "exact"),
    ]
    for stage in cfg.stages:
        section = stage.sft or stage.rl
        if section is not None:
            lines += ["", f"stage {stage.name} ({stage.kind})"]
            lines += _stage_lines(cfg, stage, section, shape, slice_name, compiled, prices)
    return "\n".join(lines)


def _stage_lines(
    cfg: ExperimentConfig,
    stage: Stage,
    section: Any,
    mesh_sizes: tuple[int, ...],
    slice_name: str,
    compiled: bool,
    prices: str,
) -> list[str]:
    shape: TrainShape = section.shape
    kind, devices = slice_name.split("-")[0], math.prod(mesh_sizes)
    chip, tokens = flops.CHIPS[kind], shape.rows * shape.row_length
    tx, _ = make_optimizer(_scheduled(section.optimizer))
    mesh: Any = AbstractMesh(mesh_sizes, AXES)
    found = memory.estimate(cfg.model, tx, mesh, shape.rows, shape.row_length, shape.micro_rows)
    useful = flops.train_flops(cfg.model, shape.rows, shape.row_length)
    needed = flops.hardware_flops(cfg.model, shape.rows, shape.row_length)
    seconds = flops.step_seconds(useful, chip, devices, MFU)
    state = count_state_bytes(cfg.model, tx)
    lines = [
        _line("tokens a step", f"{tokens:,} ({shape.rows} x {shape.row_length:,})", "exact"),
        _line("HBM per device", _size(found.total), "estimate")
        + f": state {_size(found.arguments)}, saved {_size(found.saved)}, gradients "
        f"{_size(found.gradients)}, a layer {_size(found.layer)}, logits {_size(found.head)}",
        _line("arithmetic of a step", f"{useful / 1e12:,.0f} TFLOP", "exact")
        + f", {needed / 1e12:,.0f} with what is computed twice",
        _line("step time", f"{seconds:,.2f} s", "estimate")
        + f" at {MFU:.0%} of peak; roofline {flops.step_seconds(needed, chip, devices, 1.0):,.2f}",
        _line("a checkpoint", _size(state), "exact"),
    ]
    if found.total > chip.hbm_bytes:
        lines.append(f"  does not fit the {_size(chip.hbm_bytes)} of a chip (estimate)")
    if compiled:
        done = compile_stage(cfg, section, slice_name, tx)
        lines.append(_line("HBM per device", _size(done.hbm_bytes), "AOT"))
    if stage.rl is not None:
        lines += [
            _line("rollouts to keep up", f"{tokens / seconds:,.0f} tokens/s", "estimate")
            + " if every token of a batch was sampled",
            _line("log", _size(LOG_BYTES * tokens * shape.steps), "estimate")
            + f" for {shape.steps:,} steps, {LOG_BYTES} bytes a token",
        ]
    if shape.steps > 1:
        hours = seconds * shape.steps * devices / 3600
        lines.append(_line("chip hours", f"{hours:,.0f}", "estimate") + _cost(prices, kind, hours))
    return lines


def compile_stage(
    cfg: ExperimentConfig, section: Any, slice_name: str, tx: optax.GradientTransformation
) -> Any:
    """The stage's step, compiled for the slice; raises `UserError` when it does not fit."""
    shape: TrainShape = section.shape
    mesh = make_mesh(cfg.mesh, topology_devices(slice_name, cfg.mesh.slices))
    shardings = step_shardings(mesh, cfg.model, tx, shape.micro_rows or shape.rows)
    state, batch = abstract_inputs(cfg.model, tx, shape.rows, shape.row_length, shardings)
    options: dict[str, Any] = {"micro_rows": shape.micro_rows, "shardings": shardings}
    if not isinstance(section, RLStage):
        return compile_ahead(make_sft_step(cfg.model, tx, **options), state, batch)
    step = make_rl_step(cfg.model, section.loss, tx, **options)
    rest = [state.params] if needs_reference(section.loss) else []
    return compile_ahead(step, state, batch, jax.ShapeDtypeStruct((), jnp.int32), *rest)


def count_state_bytes(model: ModelConfig, tx: optax.GradientTransformation) -> int:
    """Bytes of parameters and optimiser state, over all devices."""
    state, _ = abstract_inputs(model, tx, 1, 1)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


def _scheduled(optimizer: OptimizerConfig) -> OptimizerConfig:
    return optimizer if optimizer.total_steps else replace(optimizer, total_steps=1)


def _cost(prices: str, kind: str, hours: float) -> str:
    if not prices:
        return "; give --prices=FILE for the cost"
    try:
        low, high = json.loads(Path(prices).read_text())[kind]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"prices {prices}: no pair of prices for {kind} ({error}); write "
            f'{{"{kind}": [low, high]}}, per chip and hour'
        ) from error
    return f"; cost {hours * low:,.0f} to {hours * high:,.0f}"


def _line(name: str, value: str, source: str) -> str:
    return f"  {name}: {value} [{source}]"


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.1f} MiB"
