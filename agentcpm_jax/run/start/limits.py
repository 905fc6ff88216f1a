"""What can be known before anything runs is refused before anything runs."""

from __future__ import annotations

import os
from pathlib import Path

from agentcpm_jax.config import EvalStage, ExperimentConfig, RLStage, Stage, TrainShape
from agentcpm_jax.engine.config import check_capacity
from agentcpm_jax.merge.kernels.methods import METHODS
from agentcpm_jax.mesh import check_divides
from agentcpm_jax.ranges import check_choice
from agentcpm_jax.types import UserError

#: Methods whose result is the general model plus lambda times what the method makes of the rest.
SCALED_BY_LAMBDA = [name for name, method in METHODS.items() if "lambda" in method.global_params]


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
        if stage.merge is not None:
            check_choice(stage.merge, key, {"method": ("linear", *sorted(SCALED_BY_LAMBDA))})
            if asking(stage) is not None:
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


def asking(stage: Stage) -> RLStage | EvalStage | None:
    """What says which questions a stage asks and how their answers are graded; None: it asks none.

    A merge asks when there is something to choose.
    """
    if (merge := stage.merge) is None:
        return stage.rl or stage.eval
    greedy = bool(merge.soup) and merge.souping == "greedy"
    return merge.validation if merge.searched or greedy else None


def check_files(cfg: ExperimentConfig, workdir: Path) -> None:
    """Check that the files of data that the stages still to run name can be opened.

    What is in them is read when the run begins. Raises `UserError`.
    """
    for stage in cfg.stages:
        if (workdir / stage.name / "DONE").exists():
            continue
        key = f"config.stage.{stage.name}"
        if stage.sft is not None:
            _check_file(stage.sft.data.path, f"{key}.data.path", "conversations")
        if (asked := asking(stage)) is not None:
            inner = ".validation" if stage.merge is not None else ""
            _check_file(asked.tasks_path, f"{key}{inner}.tasks_path", "tasks")


def check_worker(cfg: ExperimentConfig, workdir: Path) -> None:
    """Check that a run can have rollout workers, and has begun. Raises `UserError`."""
    if not (cfg.log_url or "").startswith("postgresql"):
        raise UserError(
            f"config.log_url={cfg.log_url!r}: an SQLite log is for one process; "
            "use PostgreSQL (--config.log_url=postgresql+psycopg://...) for trainer and workers"
        )
    stages = [stage for stage in cfg.stages if stage.rl is not None]
    if not stages:
        raise UserError("config.stages holds no RL stage: there is nothing to sample for")
    for stage in stages:
        if stage.rl is not None and stage.rl.stream.deterministic:
            raise UserError(
                f"config.stage.{stage.name}.stream.deterministic=True runs in one process; "
                "set it to False, or start no workers"
            )
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds no run; start the trainer with the same --workdir first")


def _check_file(name: str | None, key: str, holds: str) -> None:
    if not name:
        return
    path, wanted = Path(name), f"give a file of {holds}"
    if not path.exists():
        raise UserError(f"{key}={name!r}: no such file; {wanted}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{key}={name!r} may not be read; {wanted} that may")
    if path.is_dir():
        columns = [*path.glob("*.arrow"), *path.glob("*.parquet"), *path.glob("state.json")]
        if not columns:
            raise UserError(f"{key}={name!r} is a folder without arrow or parquet files; {wanted}")
    elif path.is_file() and not path.stat().st_size:
        raise UserError(f"{key}={name!r} is empty; {wanted}")


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
