"""One experiment = one frozen dataclass, composed from those in the folders that read them.

At the edge it is an ml_collections `ConfigDict` (`configs/*.py`, `--config.a.b=value`); inside it
is `ExperimentConfig`. `from_config_dict` is the only door: it rejects unknown keys and wrong types
by their full path, and completes `config.model` by the shape that the checkpoints say. None is the
one way to say that a value was not given. What a run has stored (`config.json`) comes back through
`config_from_json`, of any schema version (`migrations`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict, config_dict

from agentcpm_jax.data.sft import SFTDataConfig
from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.hf.shape import common_shape
from agentcpm_jax.mesh import MeshConfig
from agentcpm_jax.migrations import SCHEMA_VERSION, migrate
from agentcpm_jax.model.config import SHAPE, TINY, ModelConfig
from agentcpm_jax.pool.config import PoolConfig
from agentcpm_jax.ranges import check_between, check_choice, check_least, did_you_mean
from agentcpm_jax.rewards.advantages import AdvantageConfig, for_loss
from agentcpm_jax.rewards.denoise import DenoiseConfig
from agentcpm_jax.rewards.judge import JudgeConfig
from agentcpm_jax.rollout.config import EpisodeConfig, StreamConfig, WorkerConfig
from agentcpm_jax.tasks.world import WorldTasks
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.train.losses.config import METHODS, LossConfig
from agentcpm_jax.types import UserError
from agentcpm_jax.world.skills import MIXES


@dataclass(frozen=True)
class TrainShape:
    """How a stage trains: rows of `row_length` tokens, of which `rows` make a batch."""

    row_length: int = 256
    rows: int = 8
    micro_rows: int | None = None  # rows fed at a time; None (or 0): the whole batch
    buckets: tuple[int, ...] = ()  # shorter row lengths, compiled too, for batches of short rows
    steps: int = 100
    checkpoint_every: int = 50  # steps
    log_every: int = 1  # steps

    def __post_init__(self) -> None:
        if self.micro_rows == 0:
            object.__setattr__(self, "micro_rows", None)
        counts = ("row_length", "rows", "micro_rows", "buckets", "steps")
        check_least(self, "shape", dict.fromkeys((*counts, "checkpoint_every", "log_every"), 1))


@dataclass(frozen=True)
class PretrainPhase:
    """One leg of next-token training: a mix of documents at one shape."""

    mix: str = "full"  # easy | full: see `world.skills.MIXES`
    shape: TrainShape = TrainShape(row_length=144, rows=14, steps=1000)
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        check_choice(self, "phases", {"mix": tuple(MIXES)})


@dataclass(frozen=True)
class PretrainStage:
    """Next-token training on the world's pages and the general skills."""

    phases: tuple[PretrainPhase, ...] = (PretrainPhase(),)


@dataclass(frozen=True)
class Demonstrations:
    """Episodes of the offline world that an imperfect teacher plays."""

    count: int = 3000

    def __post_init__(self) -> None:
        check_least(self, "demonstrations", {"count": 1})


@dataclass(frozen=True)
class SFTStage:
    """Supervised fine-tuning on a file of conversations, or on the offline world's."""

    data: SFTDataConfig = SFTDataConfig()
    demonstrations: Demonstrations = Demonstrations()  # read without data.path
    shape: TrainShape = TrainShape()
    epochs: int | None = None  # passes over the data; None: shape.steps says how long
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        check_least(self, "sft", {"epochs": 1})


@dataclass(frozen=True)
class EvalStage:
    """Held-out tasks for each model named in `models`: stages, or what is not made here (with a '/'
    or ':' in its name): a directory, a Hub id of the local cache, 'shipped:<name>'."""

    models: tuple[str, ...] = ()
    tasks_path: str | None = None  # a JSONL of tasks; None: those of config.test_tasks
    skip_bad: bool = False  # leave out bad lines of that file
    tasks: int = 400
    samples: int = 4  # of each task, at the episode's temperature
    k: tuple[int, ...] = (1, 2, 4)  # of pass@k
    skill_tasks: int = 200  # documents per general skill
    grader: str = "exact"  # as in RLStage
    judge: JudgeConfig = JudgeConfig()
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        check_least(self, "eval", {"tasks": 0, "samples": 1, "skill_tasks": 0})


@dataclass(frozen=True)
class MergeStage:
    """The stage's model and the general one, merged by a method of the merge package.

    With several values of `alpha` (or `density`) the merge is searched for: every combination is
    measured by `validation`, general skill and agent skill, on questions and documents that neither
    training nor test sees. Of those that keep `keep` of the general model's skill that of the
    largest alpha is taken; when none does, the smallest alpha.

    With `soup` the stage's model is first averaged with further ones: their greedy soup by the same
    two skills; the moving average of a run, `soup` oldest first and the stage's model last; or
    WARP, the spherical mean of how they differ from the general model (alpha is its eta).
    """

    # linear (WiSE-FT): alpha * stage + (1 - alpha) * general; an alpha above 1 is ExPO, a negative
    # one unlearns. task_arithmetic, ties, breadcrumbs, dare_ties, della ...: general + alpha *
    # (what the method leaves of the difference).
    method: str = "linear"
    general: str = "stage:base"
    alpha: tuple[float, ...] = (0.8,)
    density: tuple[float, ...] = (0.5,)  # for the methods that have one
    soup: tuple[str, ...] = ()  # further models
    souping: Literal["greedy", "ema", "warp"] = "greedy"
    where: Literal["host", "mesh"] = "host"  # host: as numpy arrays; mesh: sharded as in training
    keep: float = 0.92
    # Greedy: models, samples and k are not read.
    validation: EvalStage = EvalStage(tasks=64, skill_tasks=100)
    sweep: tuple[float, ...] = ()  # further alphas that the eval stages measure, for the report

    def __post_init__(self) -> None:
        for name in ("alpha", "density"):
            if not getattr(self, name):
                raise UserError(f"merge.{name} is empty; give one value, or several to search")
        check_between(self, "merge", {"density": (0, 1), "keep": (0, 1)})

    @property
    def searched(self) -> bool:
        """Whether there is a choice to be made."""
        return len(self.alpha) > 1 or len(self.density) > 1


@dataclass(frozen=True)
class RLStage:
    """Asynchronous RL on the world's training tasks, or on a JSONL of tasks."""

    tasks_path: str | None = None  # a JSONL of tasks; None: those of config.train_tasks
    skip_bad: bool = False  # leave out bad lines of that file
    shape: TrainShape = TrainShape(row_length=512)  # an episode's tokens fit into a row
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    grader: str = "exact"  # exact | numeric | list | set | judge | package.module:function
    judge: JudgeConfig = JudgeConfig()
    advantages: AdvantageConfig = AdvantageConfig()
    denoise: DenoiseConfig = DenoiseConfig()
    stream: StreamConfig = StreamConfig()
    workers: WorkerConfig = WorkerConfig()  # read when log_url is a PostgreSQL server
    engine: EngineConfig = EngineConfig()
    pool: PoolConfig = PoolConfig()  # with urls: SGLang servers in place of the engine

    @property
    def credit(self) -> AdvantageConfig:
        """`advantages`, completed by what the loss's method wants."""
        return for_loss(self.advantages, self.loss.name, METHODS[self.loss.name].estimator)


Section = PretrainStage | SFTStage | MergeStage | RLStage | EvalStage
SECTIONS: dict[str, type] = {
    "pretrain": PretrainStage,
    "sft": SFTStage,
    "merge": MergeStage,
    "rl": RLStage,
    "eval": EvalStage,
}


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline; what it does follows from its section.

    In a `ConfigDict` a stage is flat: `stage.<name>.{kind, init_from, <keys of the section>}`.
    """

    name: str
    section: Section
    init_from: str = "random"  # 'random' | 'shipped:<name>' | <HF directory> | 'stage:<name>'

    @property
    def kind(self) -> str:
        """pretrain | sft | merge | rl | eval."""
        return next(kind for kind, cls in SECTIONS.items() if isinstance(self.section, cls))

    @property
    def pretrain(self) -> PretrainStage | None:
        return self.section if isinstance(self.section, PretrainStage) else None

    @property
    def sft(self) -> SFTStage | None:
        return self.section if isinstance(self.section, SFTStage) else None

    @property
    def merge(self) -> MergeStage | None:
        return self.section if isinstance(self.section, MergeStage) else None

    @property
    def rl(self) -> RLStage | None:
        return self.section if isinstance(self.section, RLStage) else None

    @property
    def eval(self) -> EvalStage | None:
        return self.section if isinstance(self.section, EvalStage) else None


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run depends on."""

    name: str = "experiment"
    workdir: str = "runs/experiment"
    seed: int = 0
    stages: tuple[Stage, ...] = ()
    base: str = "scratch"  # trained by the base stage; 'shipped:base' or a directory replaces it
    model: ModelConfig = TINY  # at the edge its shape is None: the checkpoint gives it
    mesh: MeshConfig = MeshConfig()
    tokenizer: str | None = None  # a directory; None: the offline world's
    template: str = "qwen3-instruct-2507"  # of the offline world's tokenizer
    train_tasks: WorldTasks = WorldTasks()
    test_tasks: WorldTasks = WorldTasks(split="test")
    episode: EpisodeConfig = EpisodeConfig()
    tools: tuple[str, ...] = ()  # package.module:function of tools, which the world's stay with
    log_url: str | None = None  # of a PostgreSQL server; None: workdir/experience.db
    profile: bool = False  # trace a few steps of every training stage, see run/observe/profile.py
    hang_seconds: float = 7200.0  # of several processes: a longer step ends the job; 0: never

    def __post_init__(self) -> None:
        check_between(self, "config", {"seed": (0, 2**32 - 1)})
        check_least(self, "config", {"hang_seconds": 0})


def to_config_dict(config: Any) -> ConfigDict:
    """A mutable `ConfigDict` of a dataclass: what `configs/*.py` return.

    What is None can still be given on the command line: its place knows its type.
    """
    return ConfigDict(_at_the_edge(config))


def default_config() -> Any:
    """A `ConfigDict` of every top-level key; stages are added with `stage_dict`.

    Typed `Any`: the keys of a `ConfigDict` are attributes that no checker knows.
    """
    config: Any = to_config_dict(ExperimentConfig())
    kinds = typing.get_type_hints(ModelConfig)
    for name in SHAPE:
        config.model[name] = config_dict.FieldReference(None, field_type=kinds[name])
    config.stages = ()
    config.stage = ConfigDict()
    return config


def edge_of(cfg: ExperimentConfig) -> Any:
    """The `ConfigDict` that a file of `configs` would have returned for `cfg`."""
    return _edge(cfg, vars(cfg.model))


def given_config(raw: Mapping[str, Any]) -> Any:
    """The same of the keys of a YAML or JSON document; a shape that it leaves out stays out.

    Raises `UserError` as `from_config_dict` does, but for what checkpoints say.
    """
    return _edge(*_read(raw))


def stage_dict(kind: str, init_from: str = "random", **section: Any) -> ConfigDict:
    """A stage of `kind`: where it starts, and its section's defaults updated with `section`."""
    chosen = dataclasses.replace(SECTIONS[kind](), **section)
    return ConfigDict({"kind": kind, "init_from": init_from} | _at_the_edge(chosen))


def from_config_dict(
    config: Mapping[str, Any], workdir: Path | None = None, *, planned: bool = False
) -> ExperimentConfig:
    """Checked conversion. `stages` lists names in order; `stage.<name>` holds each one.

    Args:
      workdir: of the run, if there may be one: its model has the shape that it began with.
      planned: nothing is started; the checkpoints need not be here if their shape is known.

    Raises:
      UserError: unknown key (with the nearest known one), wrong type, unknown stage or kind, or a
        checkpoint that is not here, or not of the model that is configured.
    """
    cfg, model = _read(config)
    recorded, todo = None, list(cfg.stages)
    if workdir is not None and (workdir / "config.json").is_file():
        recorded = read_config(workdir).model
        todo = [stage for stage in todo if not (workdir / stage.name / "DONE").exists()]
    given = {name: model.pop(name) for name in SHAPE if name in model}
    shape = common_shape(
        given if cfg.stages else _shape(TINY) | given,
        outside_models(cfg, todo),
        _shape(recorded) if recorded else None,
        planned=planned,
    )
    return dataclasses.replace(cfg, model=ModelConfig(**model, **shape))


def outside_models(cfg: ExperimentConfig, stages: Iterable[Stage]) -> list[str]:
    """Names of the models that these stages read and that the run does not make."""
    names = dict.fromkeys(name for stage in stages for name in sources_of(cfg, stage))
    return [n for n in names if n != "random" and not n.startswith("stage:")]


def sources_of(cfg: ExperimentConfig, stage: Stage) -> list[str]:
    """Names of the models that a stage begins with, as `Stage.init_from` spells them."""
    if stage.pretrain is not None and cfg.base != "scratch":
        return [cfg.base]
    if stage.merge is not None:
        return [stage.init_from, stage.merge.general, *stage.merge.soup]
    if stage.eval is not None:
        return [model_source(name) for name in stage.eval.models]
    return [stage.init_from]


def model_source(name: str) -> str:
    """A name of `EvalStage.models` as `Stage.init_from` spells it."""
    return name if "/" in name or ":" in name else f"stage:{name}"


def to_json(config: ExperimentConfig) -> dict[str, Any]:
    """A JSON-able dict, for config.json and checkpoints."""
    stages = tuple(
        {"kind": s.kind, "name": s.name, "init_from": s.init_from, s.kind: _plain(s.section)}
        for s in config.stages
    )
    return _plain(config) | {"stages": stages, "schema_version": SCHEMA_VERSION}


def config_from_json(raw: Mapping[str, Any], file: str | Path = "config.json") -> ExperimentConfig:
    """Inverse of `to_json`, whichever release wrote it.

    Raises:
        UserError: as `migrate` and `from_config_dict` do, beginning with the name of the file.
    """
    raw = migrate(raw, file)
    try:
        for i, stage in enumerate(raw["stages"]):
            names = ("kind", "name", "init_from", stage["kind"])
            _check_keys(names, stage, f"config.stages[{i}]")
        flat: dict[str, Any] = {k: v for k, v in raw.items() if k != "stages"}
        flat["stages"] = [stage["name"] for stage in raw["stages"]]
        flat["stage"] = {
            stage["name"]: {"kind": stage["kind"], "init_from": stage["init_from"]}
            | stage[stage["kind"]]
            for stage in raw["stages"]
        }
        cfg, model = _read(flat)
        return dataclasses.replace(cfg, model=ModelConfig(**model))
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
        if not isinstance(raw, dict):
            raise ValueError(raw)
    except ValueError as error:
        kind = type(error).__name__
        raise UserError(
            f"{file} is damaged ({kind}); remove it (rm {file}), and the same command goes on with "
            "what the newest checkpoint says"
        ) from None
    return config_from_json(raw, file)


def _read(config: Mapping[str, Any]) -> tuple[ExperimentConfig, dict[str, Any]]:
    """The configuration without its model, and what it gives of that."""
    raw = dict(config.to_dict() if isinstance(config, ConfigDict) else config)
    sections = _section_at("config.stage", raw.pop("stage", {}))
    stages = []
    for name in _value(tuple[str, ...], raw.pop("stages", ()), "config.stages"):
        if name not in sections:
            hint = did_you_mean(name, sorted(sections))
            raise UserError(f"config.stages: there is no section config.stage.{name}; {hint}")
        stages.append(_stage(name, _section_at(f"config.stage.{name}", sections[name])))
    _check_order(stages)
    version = raw.pop("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise UserError(
            f"config.schema_version={version}, this release has {SCHEMA_VERSION}; leave it out"
        )
    model = raw.pop("model", {})
    model = vars(model) if isinstance(model, ModelConfig) else _model(model)
    cfg = dataclasses.replace(_build(ExperimentConfig, raw, "config"), stages=tuple(stages))
    return cfg, dict(model)


def _edge(cfg: ExperimentConfig, model: Mapping[str, Any]) -> ConfigDict:
    made = default_config()
    for key, value in to_config_dict(cfg).items():
        if key not in ("stages", "model"):
            made[key] = value
    for key, value in model.items():
        made.model[key] = value
    made.stages = tuple(stage.name for stage in cfg.stages)
    for stage in cfg.stages:
        made.stage[stage.name] = stage_dict(stage.kind, stage.init_from, **vars(stage.section))
    return made


def _section_at(path: str, raw: Any) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise UserError(f"{path}={raw!r}; expected a section with keys")
    return dict(raw)


def _model(raw: Any) -> dict[str, Any]:
    """What is given of the model, with its types checked; None of its shape: not given."""
    raw = _section_at("config.model", raw)
    hints = typing.get_type_hints(ModelConfig)
    _check_keys(list(hints), raw, "config.model")
    given = {k: v for k, v in raw.items() if v is not None or k not in SHAPE}
    return {k: _value(hints[k], v, f"config.model.{k}") for k, v in given.items()}


def _shape(model: ModelConfig) -> dict[str, Any]:
    return {name: getattr(model, name) for name in SHAPE}


def _stage(name: str, raw: dict[str, Any]) -> Stage:
    path = f"config.stage.{name}"
    kind, init_from = raw.pop("kind", None), raw.pop("init_from", "random")
    if kind not in SECTIONS:
        hint = did_you_mean(str(kind), SECTIONS)
        raise UserError(f"{path}.kind={kind!r}; one of {', '.join(SECTIONS)}; {hint}")
    section = _build(SECTIONS[kind], raw, path)
    source = _value(str, init_from, f"{path}.init_from")
    return Stage(name, section, source)


def _check_order(stages: list[Stage]) -> None:
    seen: set[str] = set()
    for stage in stages:
        sources = [stage.init_from]
        if stage.merge is not None:
            sources += [stage.merge.general, *stage.merge.soup]
        if stage.eval is not None:
            sources += map(model_source, stage.eval.models)
            if stage.init_from != "random":
                path = f"config.stage.{stage.name}"
                raise UserError(
                    f"{path}.init_from={stage.init_from!r} is not read by an eval stage; name the "
                    f"model in {path}.models"
                )
        for source in sources:
            if source.startswith("stage:") and source[6:] not in seen:
                near = did_you_mean(source[6:], seen)
                raise UserError(
                    f"config.stage.{stage.name} reads {source!r}, which does not run before it; "
                    f"order of config.stages: {', '.join(s.name for s in stages)}; {near}"
                )
        if stage.name in seen:
            raise UserError(f"config.stages names {stage.name!r} twice")
        seen.add(stage.name)


def _build(cls: type, raw: Mapping[str, Any], path: str) -> Any:
    _check_keys([f.name for f in dataclasses.fields(cls)], raw, path)
    hints = typing.get_type_hints(cls)
    values = {k: _value(hints[k], v, f"{path}.{k}") for k, v in raw.items()}
    try:
        return cls(**values)
    except UserError as error:  # a section names itself; where it stands is known here
        raise UserError(str(error) if path == "config" else f"{path}: {error}") from None


def _check_keys(names: Iterable[str], raw: Mapping[str, Any], path: str) -> None:
    for key in raw:
        if key not in names:
            raise UserError(f"unknown config key {path}.{key}; {did_you_mean(key, names)}")


def _value(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = _given(hint)
        if value is None or (value == "" and inner is str):  # `--config.tokenizer=`
            return None
        return _value(inner, value, path)
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
        return _build(hint, _section_at(path, value), path)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path}={value}; give a finite number")
    if isinstance(hint, type) and (
        not isinstance(value, hint) or (hint is int and isinstance(value, bool))
    ):
        found = type(value).__name__
        raise UserError(f"{path}={value!r} is of type {found}; expected {hint.__name__}")
    return value


def _given(hint: Any) -> Any:
    """Of a hint `T | None` the T; None for another hint."""
    kinds = typing.get_args(hint)
    if type(None) not in kinds:
        return None
    return next(kind for kind in kinds if kind is not type(None))


def _at_the_edge(config: Any) -> dict[str, Any]:
    """Plain values; what may be None keeps its type, whichever of the two it is set to."""
    hints = typing.get_type_hints(type(config))
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            found[name] = _at_the_edge(value)
        elif (given := _given(hints[name])) is not None:
            kind = typing.get_origin(given) or given
            found[name] = config_dict.FieldReference(_plain(value), field_type=kind)
        else:
            found[name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return tuple(_plain(v) for v in value)
    return value
