"""One experiment = one frozen dataclass, composed from those beside the code that reads them.

At the edge it is an ml_collections `ConfigDict` (`configs/*.py`, `--config.a.b=value`); inside it
is `ExperimentConfig`. `from_config_dict` is the only door: it rejects unknown keys and wrong types
by their full path. What a run has stored (`config.json`) comes back through `config_from_json`,
brought up to today's schema version by `migrate`.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from agentcpm_jax.data.sft import SFTDataConfig
from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.mesh import MeshConfig
from agentcpm_jax.model.config import TINY, ModelConfig
from agentcpm_jax.pool.config import PoolConfig
from agentcpm_jax.rewards.advantages import AdvantageConfig
from agentcpm_jax.rewards.denoise import DenoiseConfig
from agentcpm_jax.rewards.judge import JudgeConfig
from agentcpm_jax.rollout.config import EpisodeConfig, StreamConfig, WorkerConfig
from agentcpm_jax.tasks.world import WorldTasks
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.train.losses.config import LossConfig
from agentcpm_jax.types import UserError
from agentcpm_jax.world.skills import SkillMix

#: Raised when a key is renamed or moved or a default changes, with an entry in `MIGRATIONS`. A new
#: key whose default keeps the old behaviour needs neither.
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TrainShape:
    """Rows of `row_length` tokens; `rows` of them make a batch, fed `micro_rows` at a time."""

    row_length: int = 256
    rows: int = 8
    micro_rows: int = 0  # 0: the whole batch at once
    buckets: tuple[int, ...] = ()  # shorter row lengths, compiled too, for batches of short rows
    steps: int = 100
    checkpoint_every: int = 50
    log_every: int = 1


@dataclass(frozen=True)
class PretrainPhase:
    """One leg of next-token training: a document mix at one row length."""

    mix: SkillMix = SkillMix()
    row_length: int = 144
    rows: int = 14
    steps: int = 1000
    optimizer: OptimizerConfig = OptimizerConfig()
    prompt_weight: float = 0.1  # loss weight of tokens that are not an answer


@dataclass(frozen=True)
class PretrainStage:
    """Next-token training on the world's pages and the general skills."""

    phases: tuple[PretrainPhase, ...] = (PretrainPhase(),)


@dataclass(frozen=True)
class Demonstrations:
    """Oracle trajectories of the offline world, with the faults a noisy teacher makes."""

    count: int = 3000
    wrong_pick: float = 0.2  # share of visits that go to a look-alike page first
    stop_early: float = 0.65  # share of multi-hop demonstrations that answer the inner hop


@dataclass(frozen=True)
class SFTStage:
    """SFT; `data.path` names a JSONL file, empty = the offline world's demonstrations."""

    data: SFTDataConfig = SFTDataConfig()
    demonstrations: Demonstrations = Demonstrations()
    shape: TrainShape = TrainShape()
    epochs: int = 0  # passes over the data, instead of shape.steps; 0: shape.steps
    optimizer: OptimizerConfig = OptimizerConfig()


@dataclass(frozen=True)
class EvalStage:
    """Held-out tasks for each model named in `models` (stage names)."""

    models: tuple[str, ...] = ()
    tasks_path: str = ""
    skip_bad: bool = False  # leave out bad lines of that file
    tasks: int = 400
    hops: tuple[int, ...] = (1, 2)
    samples: int = 4
    k: tuple[int, ...] = (1, 2, 4)
    skill_tasks: int = 200  # documents per general skill
    grader: str = "exact"  # as in RLStage
    judge: JudgeConfig = JudgeConfig()
    engine: EngineConfig = EngineConfig()


@dataclass(frozen=True)
class MergeStage:
    """The stage's model and the general one, merged by a method of the merge package.

    With `candidates` (and `densities`) the merge is searched for: every combination is measured by
    `validation`, general skill and agent skill, on questions and documents that neither training
    nor test sees. Of those that keep `keep` of the general model's skill one is taken: that of the
    largest alpha, or the best agent. When none does, the smallest alpha is taken.

    With `soup` the stage's model is first averaged with further ones: their greedy soup by the same
    two skills; the moving average of a run, `soup` oldest first and the stage's model last; or
    WARP, the spherical mean of how they differ from the general model (alpha is its eta).
    """

    # linear (WiSE-FT): alpha * stage + (1 - alpha) * general; an alpha above 1 is ExPO, a negative
    # one unlearns. task_arithmetic, ties, breadcrumbs, dare_ties, della ...: general + alpha *
    # (what the method leaves of the difference).
    method: str = "linear"
    general: str = "stage:base"
    alpha: float = 0.8
    density: float = 0.5  # for the methods that have one
    soup: tuple[str, ...] = ()  # further models
    souping: Literal["greedy", "ema", "warp"] = "greedy"
    where: Literal["host", "mesh"] = "host"  # host: as numpy arrays; mesh: sharded as in training
    candidates: tuple[float, ...] = ()  # alphas
    densities: tuple[float, ...] = ()
    keep: float = 0.92
    pick: str = "largest"  # largest | agent
    # models, samples and k are not read; agent skill is greedy
    validation: EvalStage = EvalStage(tasks=64, skill_tasks=100)
    sweep: tuple[float, ...] = ()  # alphas that the eval stages measure beside it, for the report

    def __post_init__(self) -> None:
        if self.pick not in ("largest", "agent"):
            raise UserError(f"merge.pick is {self.pick!r}; use 'largest' or 'agent'")
        if self.densities and not self.candidates:
            raise UserError("merge.densities are searched with merge.candidates; list alphas too")


@dataclass(frozen=True)
class RLStage:
    """Asynchronous RL on the world's training tasks, or on a JSONL of tasks."""

    tasks_path: str = ""
    skip_bad: bool = False  # leave out bad lines of that file
    shape: TrainShape = TrainShape()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    grader: str = "exact"  # exact | numeric | list | set | judge | package.module:function
    judge: JudgeConfig = JudgeConfig()
    advantages: AdvantageConfig = AdvantageConfig()
    denoise: DenoiseConfig = DenoiseConfig()
    stream: StreamConfig = StreamConfig()
    workers: WorkerConfig = WorkerConfig()  # read when log_url is a PostgreSQL server
    engine: EngineConfig = EngineConfig()
    pool: PoolConfig = PoolConfig()  # with urls: SGLang servers instead of the engine


SECTIONS: dict[str, type] = {
    "pretrain": PretrainStage,
    "sft": SFTStage,
    "merge": MergeStage,
    "rl": RLStage,
    "eval": EvalStage,
}


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline: of the five sections, the one named after `kind` is set.

    In a `ConfigDict` a stage is flat: `stage.<name>.{kind, init_from, <keys of the section>}`.
    """

    kind: str = "sft"
    name: str = ""
    init_from: str = "random"  # 'random' | 'shipped:<name>' | <HF directory> | 'stage:<name>'
    pretrain: PretrainStage | None = None
    sft: SFTStage | None = None
    merge: MergeStage | None = None
    rl: RLStage | None = None
    eval: EvalStage | None = None


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run depends on."""

    name: str = "experiment"
    workdir: str = "runs/experiment"
    seed: int = 0
    stages: tuple[Stage, ...] = ()
    base: str = (
        "scratch"  # 'scratch' trains the base stage; 'shipped:base' or a directory replaces it
    )
    model: ModelConfig = TINY
    mesh: MeshConfig = MeshConfig()
    tokenizer: str = ""  # directory; empty = the offline world's own tokenizer
    template: str = "qwen3-instruct-2507"  # used with the world's tokenizer
    train_tasks: WorldTasks = field(default_factory=WorldTasks)
    test_tasks: WorldTasks = field(default_factory=lambda: WorldTasks(split="test"))
    episode: EpisodeConfig = EpisodeConfig()
    tools: tuple[str, ...] = ()  # package.module:function of tools beside the world's
    log_url: str = ""  # PostgreSQL URL; empty = workdir/experience.db
    profile: bool = False  # trace a few steps of every training stage, see run/observe/profile.py
    hang_seconds: float = 7200.0  # of several processes: a longer step ends the job; 0: never
    schema_version: int = SCHEMA_VERSION


def to_config_dict(config: Any) -> ConfigDict:
    """A mutable `ConfigDict` of a dataclass: what `configs/*.py` return."""
    return ConfigDict(_plain(config))


def default_config() -> Any:
    """A `ConfigDict` of every top-level key; stages are added with `stage_dict`.

    Typed `Any`: the keys of a `ConfigDict` are attributes that no checker knows.
    """
    config: Any = to_config_dict(ExperimentConfig())
    config.stages = ()
    config.stage = ConfigDict()
    return config


def stage_dict(kind: str, init_from: str = "random", **section: Any) -> ConfigDict:
    """A stage of `kind`: its section's defaults updated with `section`, beside kind and source."""
    chosen = dataclasses.replace(SECTIONS[kind](), **section)
    return ConfigDict({"kind": kind, "init_from": init_from} | _plain(chosen))


def from_config_dict(config: Mapping[str, Any]) -> ExperimentConfig:
    """Checked conversion. `stages` lists names in order; `stage.<name>` holds each one.

    Raises:
        UserError: unknown key (with the nearest known one), wrong type, unknown stage or kind.
    """
    raw = dict(config.to_dict() if isinstance(config, ConfigDict) else config)
    sections = dict(raw.pop("stage", {}))
    stages = []
    for name in raw.pop("stages", ()):
        if name not in sections:
            known = ", ".join(sorted(sections)) or "none"
            raise UserError(f"stages: no section stage.{name}; defined: {known}")
        stages.append(_stage(name, dict(sections[name])))
    _check_order(stages)
    built = _build(ExperimentConfig, raw, "config")
    if built.schema_version > SCHEMA_VERSION:
        raise UserError(
            f"config.schema_version={built.schema_version} is newer than {SCHEMA_VERSION}; "
            "update agentcpm_jax"
        )
    return dataclasses.replace(built, stages=tuple(stages))


def to_json(config: ExperimentConfig) -> dict[str, Any]:
    """A JSON-able dict, for config.json and checkpoints."""
    return _plain(config)


def config_from_json(raw: Mapping[str, Any], file: str | Path = "config.json") -> ExperimentConfig:
    """Inverse of `to_json`, whichever release wrote it.

    Raises:
        UserError: as `migrate` and `from_config_dict` do, beginning with the name of the file.
    """
    raw = migrate(raw, file)
    try:
        for i, stage in enumerate(raw["stages"]):
            _check_keys(Stage, stage, f"config.stages[{i}]")
        flat: dict[str, Any] = {k: v for k, v in raw.items() if k != "stages"}
        flat["stages"] = [stage["name"] for stage in raw["stages"]]
        flat["stage"] = {
            stage["name"]: {"kind": stage["kind"], "init_from": stage["init_from"]}
            | stage[stage["kind"]]
            for stage in raw["stages"]
        }
        return from_config_dict(flat)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (KeyError, TypeError) as error:
        kind = type(error).__name__
        raise UserError(f"{file} is not a run's configuration ({kind}); restore it") from None


def read_config(workdir: Path) -> ExperimentConfig:
    """The configuration that a run was started with.

    Raises `UserError`: no run, not JSON, of a newer schema version, or with keys that are no longer
    known.
    """
    file = workdir / "config.json"
    if not file.is_file():
        raise UserError(f"no run in {workdir}: it has no config.json; give the --workdir of a run")
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        kind = type(error).__name__
        raise UserError(f"{file} is not a run's configuration ({kind}); restore it") from None
    return config_from_json(raw, file)


class Migration(NamedTuple):
    """From a stored configuration of one schema version to the next.

    Attributes:
        defaults: of the keys whose default the next version changes, as they were. A key is a path
            that leads through every element of a list: `stages.rl.stream.retries`.
        respell: renames and moves keys of the stored dict, in place.
    """

    defaults: Mapping[str, Any] = {}
    respell: Callable[[dict[str, Any]], None] = lambda raw: None


#: By the older of the two versions.
MIGRATIONS: dict[int, Migration] = {}


def migrate(raw: Mapping[str, Any], file: str | Path = "config.json") -> dict[str, Any]:
    """A stored configuration as this release would have written it.

    A key that it lacks has the default that it had in the version of the file; a key that was added
    since has today's, when it is read.

    Raises:
        UserError: no version, a newer one, or one that is too old.
    """
    version = raw.get("schema_version") if isinstance(raw, Mapping) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise UserError(f"{file} is not a run's configuration (no schema_version); restore it")
    steps = range(version, SCHEMA_VERSION)
    if version > SCHEMA_VERSION or any(step not in MIGRATIONS for step in steps):
        newer = version > SCHEMA_VERSION
        fix = "upgrade agentcpm_jax" if newer else "use the release that wrote it"
        raise UserError(
            f"{file} has schema version {version}, this release reads {SCHEMA_VERSION}; {fix}"
        )
    new = copy.deepcopy(dict(raw))
    for step in steps:
        for path, default in MIGRATIONS[step].defaults.items():
            for section, key in _places(new, path):
                section.setdefault(key, default)
        MIGRATIONS[step].respell(new)
    return new | {"schema_version": SCHEMA_VERSION}


def rename(raw: dict[str, Any], path: str, name: str) -> None:
    """Gives a key of a stored configuration another name in the same section."""
    for section, key in _places(raw, path):
        if key in section:
            section[name] = section.pop(key)


def _places(raw: Any, path: str) -> Iterator[tuple[dict[str, Any], str]]:
    """(section, key) of every place that a path leads to, whether the key is there or not."""
    if isinstance(raw, list | tuple):
        for element in raw:
            yield from _places(element, path)
    elif isinstance(raw, dict):
        head, _, rest = path.partition(".")
        if rest:
            yield from _places(raw.get(head), rest)
        else:
            yield raw, head


def _stage(name: str, raw: dict[str, Any]) -> Stage:
    path = f"config.stage.{name}"
    kind, init_from = raw.pop("kind", None), raw.pop("init_from", "random")
    if kind not in SECTIONS:
        raise UserError(f"{path}.kind={kind!r}; one of {', '.join(SECTIONS)}")
    section = _build(SECTIONS[kind], raw, path)
    source = _value(str, init_from, f"{path}.init_from")
    return Stage(kind=kind, name=name, init_from=source, **{kind: section})


def _check_order(stages: list[Stage]) -> None:
    seen: set[str] = set()
    for stage in stages:
        sources = [stage.init_from]
        if stage.merge is not None:
            sources.append(stage.merge.general)
        if stage.eval is not None:
            sources += [f"stage:{m}" for m in stage.eval.models]
        for source in sources:
            if source.startswith("stage:") and source[6:] not in seen:
                raise UserError(
                    f"config.stage.{stage.name} reads {source!r}, which does not run before it; "
                    f"order of config.stages: {', '.join(s.name for s in stages)}"
                )
        if stage.name in seen:
            raise UserError(f"config.stages names {stage.name!r} twice")
        seen.add(stage.name)


def _build(cls: type, raw: Mapping[str, Any], path: str) -> Any:
    _check_keys(cls, raw, path)
    hints = typing.get_type_hints(cls)
    return cls(**{k: _value(hints[k], v, f"{path}.{k}") for k, v in raw.items()})


def _check_keys(cls: type, raw: Mapping[str, Any], path: str) -> None:
    names = [f.name for f in dataclasses.fields(cls)]
    for key in raw:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
            raise UserError(f"unknown config key {path}.{key}; {hint}")


def _value(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = [a for a in args if a is not type(None)]
        return _value(inner[0], value, path)
    if origin is typing.Literal:
        if value not in args:
            raise UserError(f"{path}={value!r}; one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path}={value!r} is not a list")
        element = args[0]
        return tuple(_value(element, v, f"{path}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise UserError(f"{path}={value!r}; expected a section with keys")
        return _build(hint, value, path)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (
        not isinstance(value, hint) or (hint is int and isinstance(value, bool))
    ):
        found = type(value).__name__
        raise UserError(f"{path}={value!r} is of type {found}; expected {hint.__name__}")
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return tuple(_plain(v) for v in value)
    return value
