"""What a configuration will take, before anything is started: memory, time, traffic, cost.

Every figure says where it comes from: `exact` is arithmetic on shapes, `estimate` a formula whose
assumptions are printed with it, `AOT` the compiler's figure for the target slice, `measured` a
figure of a run that is committed under experiments/results. No accelerator is needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, Mesh

from agentcpm_jax.config import ExperimentConfig, RLStage, Stage, TrainShape, outside_models
from agentcpm_jax.files import size_text
from agentcpm_jax.hf.shape import shape_text, where_said
from agentcpm_jax.mesh import AXES, mesh_shape
from agentcpm_jax.model import params as model_params
from agentcpm_jax.model.attention.choice import fit_to
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.plan import flops, memory
from agentcpm_jax.plan.aot import (
    Compiled,
    compile_step,
    raise_if_too_large,
    topology_devices,
)
from agentcpm_jax.plan.slices import TOPOLOGIES, device_count
from agentcpm_jax.sharding import make_mesh
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.train.losses.config import LossConfig
from agentcpm_jax.train.optimizer import make_optimizer
from agentcpm_jax.train.placement import (
    abstract_inputs,
    report_text,
    sharding_report,
    step_shardings,
)
from agentcpm_jax.types import UserError

#: Bytes per token in the experience log: where a third of the tokens are sampled, where all are.
LOG_BYTES = (2.99, 5.24)

_size = partial(size_text, binary=True)
MFU = 0.5
#: CUDA compute capability by the first part of a slice's name.
CAPABILITY = {"t4": 7.5, "h200": 9.0}


class Step(NamedTuple):
    """One compiled step of a stage; `loss` is None except in RL."""

    name: str
    shape: TrainShape
    optimizer: OptimizerConfig
    loss: LossConfig | None = None
    epochs: int | None = None


def explain(
    cfg: ExperimentConfig,
    slice_name: str = "",
    *,
    compiled: bool = False,
    arrays: bool = False,
    prices: str = "",
) -> str:
    """The plan of a run as a page of text.

    Args:
      slice_name: a TPU slice (a key of `slices.TOPOLOGIES`) or GPUs ('t4-1'), used `mesh.slices`
        times. Empty: the smallest slice that the estimate fits.
      compiled: also compile every step for the slice (minutes; needs libtpu).
      arrays: also list the sharding of every array of the state and the batch.
      prices: a JSON file of {"v5p": [low, high]}, per chip and hour, in any currency.
    Raises:
      UserError: unknown slice, a mesh that does not divide it, a step that does not fit.
    """
    slice_name = slice_name or smallest_slice(cfg)
    kind = slice_name.split("-")[0]
    shape = _mesh_sizes(cfg, slice_name)
    model, changes = as_run_on(cfg.model, kind)
    cfg = replace(cfg, model=model)
    split = ", ".join(f"{a} {n}" for a, n in zip(AXES, shape, strict=True) if n > 1)
    published = model.dtype if any(stage.rl for stage in cfg.stages) else model.param_dtype
    published_bytes = model_params.count(model) * memory.BYTES[published]
    chips = f"{math.prod(shape)} chips of {_size(flops.CHIPS[kind].hbm_bytes)}"
    where = slice_name if cfg.mesh.slices == 1 else f"{cfg.mesh.slices} x {slice_name}"
    lines = [
        f"{cfg.name} on {where}: {chips}, mesh {split or 'of one device'}",
        *(f"  {change}" for change in changes),
        _line("model", shape_text(model), "exact")
        + f" by {where_said(outside_models(cfg, cfg.stages))}",
        _line("parameters", f"{model_params.count(model):,}", "exact"),
        _line("a published version", _size(published_bytes), "exact") + f" in {published}",
    ]
    if model.lora_rank:
        lines.insert(-1, _line("trained (adapters)", f"{flops.count_adapters(model):,}", "exact"))
    for stage in cfg.stages:
        for step in steps_of(stage):
            lines += ["", f"stage {step.name} ({stage.kind})"]
            lines += _step_lines(cfg, step, slice_name, prices)
            if compiled:
                done = compile_for(cfg, step, slice_name)
                lines.append(_line("HBM per device", _size(done.hbm_bytes), "AOT"))
            if arrays:
                lines.append(_arrays(cfg, step, slice_name))
        if stage.rl is not None and not stage.rl.pool.urls:
            lines.append(_engine_line(model, stage.rl))
    return "\n".join(lines)


def smallest_slice(cfg: ExperimentConfig) -> str:
    """The slice of least memory that the mesh divides and every step fits, by estimate.

    Raises:
      UserError: there is none; names the largest slice that the mesh divides.
    """
    why: UserError | None = None
    for name in sorted(TOPOLOGIES, key=lambda name: device_count(name) * _chip(name).hbm_bytes):
        try:
            need = max((_memory(cfg, s, name).total for _, s in _all_steps(cfg)), default=0.0)
        except UserError as error:
            why = why or error
            continue
        if need <= _chip(name).hbm_bytes:
            return name
        why = UserError(
            f"no slice is known that holds a step: on {name} it needs {_size(need)} per device, "
            f"a chip has {_size(_chip(name).hbm_bytes)}; feed fewer tokens at a time "
            "(shape.micro_rows), keep less (model.remat='full') or split more (mesh.context)"
        )
    raise why or UserError("config.stages is empty; name at least one stage")


def steps_of(stage: Stage) -> Iterator[Step]:
    """The steps of a stage: one per phase of pretraining, one for SFT or RL."""
    if stage.pretrain is not None:
        for number, phase in enumerate(stage.pretrain.phases):
            yield Step(f"{stage.name} {number + 1}", phase.shape, phase.optimizer)
    if stage.sft is not None:
        yield Step(stage.name, stage.sft.shape, stage.sft.optimizer, epochs=stage.sft.epochs)
    if stage.rl is not None:
        yield Step(stage.name, stage.rl.shape, stage.rl.optimizer, stage.rl.loss)


@contextmanager
def naming_what_is_too_large(cfg: ExperimentConfig, stage: Stage, mesh: Mesh) -> Iterator[None]:
    """Turns running out of device memory inside it into a `UserError` with the estimate."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        sizes = [_estimate(cfg.model, step, mesh) for step in steps_of(stage)]
        raise_if_too_large(error, max(sizes, key=lambda size: size.total, default=None))
        raise


def compile_for(cfg: ExperimentConfig, step: Step, slice_name: str) -> Compiled:
    """Compile the step for the slice; raises `UserError` when it does not fit."""
    mesh = make_mesh(cfg.mesh, topology_devices(slice_name, cfg.mesh.slices))
    shape = step.shape
    return compile_step(
        cfg.model,
        _optimizer(step),
        mesh,
        shape.rows,
        shape.row_length,
        micro_rows=shape.micro_rows or 0,
        loss=step.loss,
    )


def _step_lines(cfg: ExperimentConfig, step: Step, slice_name: str, prices: str) -> list[str]:
    shape, chip, model = step.shape, _chip(slice_name), cfg.model
    devices = device_count(slice_name) * cfg.mesh.slices
    size = (shape.rows, shape.row_length)
    tokens = shape.rows * shape.row_length
    found = _memory(cfg, step, slice_name)
    useful = flops.train_flops(model, *size)
    seconds = flops.seconds(useful, model, chip, devices, MFU)
    roofline = flops.roofline_seconds(model, *size, chip, devices)
    state, _ = abstract_inputs(model, _optimizer(step), 1, 1)
    checkpoint = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    lines = [
        _line("tokens a step", f"{tokens:,} ({shape.rows} x {shape.row_length:,})", "exact"),
        _line("HBM per device", _size(found.total), "estimate")
        + ": "
        + ", ".join(f"{name} {_size(size)}" for name, size in found.parts.items()),
        _line("arithmetic of a step", f"{useful / 1e12:,.2f} TFLOP", "exact"),
        _line("roofline of a step", f"{roofline:,.2f} s", "estimate")
        + " for all that is computed, at peak rates",
        _line("step time", f"{seconds:,.2f} s", "estimate") + f" at {MFU:.0%} MFU (assumed)",
        _line("a checkpoint", _size(checkpoint), "exact"),
    ]
    if found.total > chip.hbm_bytes:
        lines.append(f"  does not fit the {_size(chip.hbm_bytes)} of a chip [estimate]")
    if step.loss is not None:
        low, high = (_size(per_token * tokens * shape.steps) for per_token in LOG_BYTES)
        lines += [
            _line("rollouts to keep up", f"{tokens / seconds:,.0f} tokens/s", "estimate")
            + " if rows are packed full; prompts and tool results count",
            _line("log", f"{low} to {high}", "estimate")
            + f" for {shape.steps:,} steps, {LOG_BYTES[0]} to {LOG_BYTES[1]} bytes a token "
            "[measured]",
        ]
    hours = seconds * devices / 3600
    kind = slice_name.split("-")[0]
    if step.epochs:
        hours *= step.epochs * 1e6 / tokens
        title = f"chip hours for a million tokens of data, {step.epochs} times"
    else:
        hours *= shape.steps
        title = f"chip hours for {shape.steps:,} steps"
    return [*lines, _line(title, f"{hours:,.2f}", "estimate") + _cost(prices, kind, hours)]


def _engine_line(model: ModelConfig, rl: RLStage) -> str:
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    cache = per_token * memory.BYTES[model.dtype] * rl.engine.slots * rl.engine.capacity
    return (
        _line("key/value cache of the engine", _size(cache / rl.engine.tensor), "exact")
        + f" on each of {rl.engine.tensor} devices ({rl.engine.slots} slots); none with pool.urls"
    )


def _memory(cfg: ExperimentConfig, step: Step, slice_name: str) -> memory.MemoryEstimate:
    mesh: Any = AbstractMesh(_mesh_sizes(cfg, slice_name), AXES)
    model, _ = as_run_on(cfg.model, slice_name.split("-")[0])
    return _estimate(model, step, mesh)


def _estimate(model: ModelConfig, step: Step, mesh: Mesh | AbstractMesh) -> memory.MemoryEstimate:
    rows = (step.shape.rows, step.shape.row_length, step.shape.micro_rows or 0)
    return memory.estimate(model, _optimizer(step), mesh, *rows)


def _arrays(cfg: ExperimentConfig, step: Step, slice_name: str) -> str:
    mesh: Any = AbstractMesh(_mesh_sizes(cfg, slice_name), AXES)
    shape, tx = step.shape, _optimizer(step)
    shardings = step_shardings(mesh, cfg.model, tx, shape.micro_rows or shape.rows)
    state, batch = abstract_inputs(cfg.model, tx, shape.rows, shape.row_length, shardings)
    return report_text(sharding_report({"state": state, "batch": batch}))


def _all_steps(cfg: ExperimentConfig) -> list[tuple[Stage, Step]]:
    return [(stage, step) for stage in cfg.stages for step in steps_of(stage)]


def _mesh_sizes(cfg: ExperimentConfig, slice_name: str) -> tuple[int, ...]:
    return mesh_shape(cfg.mesh, device_count(slice_name) * cfg.mesh.slices)


def as_run_on(model: ModelConfig, kind: str) -> tuple[ModelConfig, list[str]]:
    """`fit_to` for an accelerator of `kind`."""
    return fit_to(model, "gpu" if kind in CAPABILITY else "tpu", CAPABILITY.get(kind, 0.0))


def _chip(slice_name: str) -> flops.Chip:
    return flops.CHIPS[slice_name.split("-")[0]]


def _optimizer(step: Step) -> optax.GradientTransformation:
    return make_optimizer(step.optimizer, 1)[0]  # of its schedule nothing here depends


def _cost(prices: str, kind: str, hours: float) -> str:
    if not prices:
        return "; give --prices=FILE for the cost"
    try:
        low, high = (float(x) for x in json.loads(Path(prices).read_text())[kind])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"prices {prices}: no pair of prices for {kind} ({error}); write "
            f'{{"{kind}": [low, high]}}, per chip and hour'
        ) from error
    return f"; cost {hours * low:,.2f} to {hours * high:,.2f} [estimate]"


def _line(name: str, value: str, source: str) -> str:
    return f"  {name}: {value} [{source}]"
