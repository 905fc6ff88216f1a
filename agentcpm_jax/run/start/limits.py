"""What can be known before anything runs is refused before anything runs."""

from __future__ import annotations

from agentcpm_jax.config import EvalStage, ExperimentConfig, RLStage, TrainShape
from agentcpm_jax.engine.config import check_capacity
from agentcpm_jax.mesh import check_divides
from agentcpm_jax.types import UserError


def check_limits(cfg: ExperimentConfig) -> None:
    """Check that the limits of the stages agree with each other and with those of an episode.

    Raises `UserError` with the two values that contradict each other.
    """
    if not cfg.stages:
        raise UserError("config.stages is empty; name at least one stage")
    for stage in cfg.stages:
        key = f"config.stage.{stage.name}"
        if stage.pretrain is not None:
            for number, phase in enumerate(stage.pretrain.phases):
                _check_shape(cfg, phase.shape, f"{key}.phases[{number}].shape", 1)
        if stage.sft is not None:
            _check_shape(cfg, stage.sft.shape, f"{key}.shape", 1)
        if stage.rl is not None:
            _check_rl(cfg, stage.rl, key)
        if stage.merge is not None and (stage.merge.searched or stage.merge.soup):
            _check_eval(cfg, stage.merge.validation, f"{key}.validation", attempts=False)
        if stage.eval is not None:
            _check_eval(cfg, stage.eval, key)


def _check_mesh(cfg: ExperimentConfig, shape: TrainShape, key: str, updates: int) -> None:
    """What a stage trains is split evenly over the mesh: parameters, and the rows of an update."""
    model = cfg.model
    split = {"num_heads": model.num_heads, "ffw": model.ffw, "vocab_size": model.vocab_size}
    check_divides(cfg.mesh, ("tensor",), {f"model.{name}": n for name, n in split.items()})
    check_divides(cfg.mesh, ("fsdp", "context"), {"model.width": model.width})
    together = "micro_rows" if shape.micro_rows else "rows"
    rows = shape.micro_rows or shape.rows // updates
    check_divides(cfg.mesh, ("data", "fsdp"), {f"{key}.{together}": rows})


def _check_shape(cfg: ExperimentConfig, shape: TrainShape, key: str, updates: int) -> None:
    if shape.rows % (updates * (shape.micro_rows or 1)):
        of = "" if updates == 1 else f"loss.updates={updates} x "
        raise UserError(
            f"{key}.rows={shape.rows} is not a multiple of {of}micro_rows={shape.micro_rows}; "
            "change one of them"
        )
    if longer := [b for b in shape.buckets if b > shape.row_length]:
        raise UserError(
            f"{key}.buckets holds {longer[0]}, rows have row_length={shape.row_length} tokens; "
            "leave it out"
        )
    _check_mesh(cfg, shape, key, updates)


def _check_rl(cfg: ExperimentConfig, rl: RLStage, key: str) -> None:
    _check_shape(cfg, rl.shape, f"{key}.shape", rl.loss.updates)
    longest = cfg.episode.max_context
    if rl.shape.row_length < longest:
        raise UserError(
            f"{key}.shape.row_length={rl.shape.row_length} is shorter than an episode may be, "
            f"config.episode.max_context={longest}; raise the one or lower the other"
        )
    if not (rl.pool.urls or rl.pool.urls_file):
        check_capacity(rl.engine, longest)


def _check_eval(cfg: ExperimentConfig, spec: EvalStage, key: str, attempts: bool = True) -> None:
    """No eval stage reports on more attempts than it draws."""
    if spec.tasks:
        check_capacity(spec.engine, cfg.episode.max_context)
    if attempts and not all(1 <= k <= spec.samples for k in spec.k):
        key = key.removeprefix("config.")
        raise UserError(
            f"{key}.k is {spec.k} and {key}.samples is {spec.samples}: "
            f"pass@k needs k samples per task; keep k from 1 to {spec.samples} or raise samples"
        )
