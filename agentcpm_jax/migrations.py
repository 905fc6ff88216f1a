"""Stored configurations of earlier schema versions, brought up to today's one step at a time.

A path leads from the top of a configuration, through every element of a list:
`stages.rl.stream.retries` is that key of every RL stage.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from agentcpm_jax.types import UserError

#: Raised when a key is renamed, moved or removed or a default changes, with an entry in
#: `MIGRATIONS`. A new key whose default keeps the old behaviour needs neither.
SCHEMA_VERSION = 2

Raw = dict[str, Any]


class Migration(NamedTuple):
    """From a stored configuration of one schema version to the next, in this order.

    Attributes:
        defaults: of the keys whose default the next version changes, as they were.
        respell: renames, moves and merges keys of the stored dict, in place.
        fixed: the keys that the next version has no more -> the value that it has in their place.
            A configuration with another value would not mean the same: it is refused.
        unset: how it said what the next version says with None.
    """

    defaults: Mapping[str, Any] = {}
    respell: Callable[[Raw], None] = lambda raw: None
    fixed: Mapping[str, Any] = {}
    unset: Mapping[str, Any] = {}


def migrate(raw: Mapping[str, Any], file: str | Path = "config.json") -> Raw:
    """A stored configuration as this release would have written it.

    A key that it lacks has the default that it had in the version of the file; a key that was added
    since has today's, when it is read.

    Raises:
        UserError: no version, a newer one, one that is too old, or a value of a key that is gone.
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
        try:
            _step(new, MIGRATIONS[step])
        except Gone as gone:
            raise UserError(
                f"{file}: {gone} since schema version {step + 1}; use the release that wrote it"
            ) from None
        except (AttributeError, KeyError, TypeError) as error:
            kind = type(error).__name__
            raise UserError(f"{file} is not a run's configuration ({kind}); restore it") from None
    return new | {"schema_version": SCHEMA_VERSION}


class Gone(Exception):
    """A stored value that the next version cannot have."""

    def __init__(self, where: str, value: Any, fixed: Any) -> None:
        super().__init__(f"config.{where} is {value!r}; it is fixed at {fixed!r}")


def rename(raw: Raw, path: str, name: str) -> None:
    """Gives a key of a stored configuration another name in the same section."""
    for section, key, _ in places(raw, path):
        if key in section:
            section[name] = section.pop(key)


def places(raw: Any, path: str, where: str = "") -> Iterator[tuple[Raw, str, str]]:
    """(section, key, its full path) of every place that a path leads to, be the key there or not.

    The full path counts the elements of a list: `stages[3].rl.stream.retries`.
    """
    if isinstance(raw, list | tuple):
        for number, element in enumerate(raw):
            yield from places(element, path, f"{where}[{number}]")
    elif isinstance(raw, dict):
        head, _, rest = path.partition(".")
        full = f"{where}.{head}" if where else head
        if rest:
            yield from places(raw.get(head), rest, full)
        else:
            yield raw, head, full


def _step(raw: Raw, migration: Migration) -> None:
    for path, default in migration.defaults.items():
        for section, key, _ in places(raw, path):
            section.setdefault(key, default)
    migration.respell(raw)
    for path, value in migration.fixed.items():
        for section, key, where in places(raw, path):
            _take(section, key, where, value)
    for path, spelt in migration.unset.items():
        for section, key, _ in places(raw, path):
            if key in section and section[key] == spelt:
                section[key] = None


def _take(section: Raw, key: str, where: str, *values: Any) -> None:
    """Removes a key that may hold one of these values alone, the last of which is what it means."""
    if key not in section:
        return
    found = section.pop(key)
    if (list(found) if isinstance(found, tuple) else found) not in values:
        raise Gone(where, found, values[-1])


# --- version 1 ------------------------------------------------------------------------------------

_JUDGES = ("stages.rl.judge", "stages.eval.judge", "stages.merge.validation.judge")
_ENGINES = ("stages.rl.engine", "stages.eval.engine", "stages.merge.validation.engine")
_OPTIMIZERS = ("stages.pretrain.phases.optimizer", "stages.sft.optimizer", "stages.rl.optimizer")
_EVALUATIONS = ("stages.eval", "stages.merge.validation")
_WORLDS = ("train_tasks", "test_tasks")
_MIXES = {  # name -> what sets it off from the other
    "easy": {"recall": 5.0, "add": 2.0, "recall_facts": [2, 4], "recall_pages": [1, 1]},
    "full": {"recall": 4.0, "add": 1.5, "recall_facts": [4, 8], "recall_pages": [1, 2]},
}
_ALL_MIXES = {"sort": 1.0, "repeat": 1.5, "repeat_names": [2, 6], "recall_drills": 3}
_NUDGE = (
    "Your message held neither a tool call nor an answer. "
    "Call a tool, or give the final answer between <answer> and </answer>."
)


def _each(sections: Iterable[str], **keys: Any) -> dict[str, Any]:
    return {f"{section}.{key}": value for section in sections for key, value in keys.items()}


def _respell_1(raw: Raw) -> None:
    for stage in raw.get("stages", ()):
        for kind in ("pretrain", "sft", "merge", "rl", "eval"):
            if isinstance(stage, dict) and kind != stage.get("kind"):
                stage.pop(kind, None)
    _worlds_1(raw)
    _optimizers_1(raw)
    for judges, _, _ in _sections(raw, _JUDGES):
        models, votes = judges.get("models", []), judges.pop("votes", 1)
        if models:
            judges["models"] = [models[vote % len(models)] for vote in range(votes)]
    for phase, _, where in _sections(raw, ("stages.pretrain.phases",)):
        phase["shape"] = {"checkpoint_every": 200} | {
            key: phase.pop(key) for key in ("row_length", "rows", "steps") if key in phase
        }
        phase["mix"] = _mix_1(phase.get("mix", {}), where)
    for sft, _, _ in _sections(raw, ("stages.sft",)):
        if sft.get("data", {}).get("path"):  # then no demonstration is made
            sft["demonstrations"] = {"count": sft.get("demonstrations", {}).get("count", 3000)}
    for merge, _, where in _sections(raw, ("stages.merge",)):
        merge["alpha"] = merge.pop("candidates", []) or [merge.get("alpha", 0.8)]
        merge["density"] = merge.pop("densities", []) or [merge.get("density", 0.5)]
        _take(merge, "pick", f"{where}.pick", "largest")
    for rl, _, where in _sections(raw, ("stages.rl",)):
        _rl_1(raw, rl, where)


def _sections(raw: Raw, paths: Iterable[str]) -> list[tuple[Raw, str, str]]:
    """The sections at these paths themselves, with their full path."""
    found = []
    for path in paths:
        for section, key, where in places(raw, path):
            inner = section.get(key)
            elements = enumerate(inner) if isinstance(inner, list | tuple) else [(None, inner)]
            for number, element in elements:
                if isinstance(element, dict):
                    full = where if number is None else f"{where}[{number}]"
                    found.append((element, key, full))
    return found


def _worlds_1(raw: Raw) -> None:
    """The world's section goes; hop counts are a key of the tasks alone."""
    for tasks, name, _ in _sections(raw, _WORLDS):
        world = tasks.pop("world", {})
        for key in ("seed", "split"):  # were replaced
            world.pop(key, None)
        for key in ("tool_fault_rate", "tool_faults"):
            if key in world:
                tasks[key] = world.pop(key)
        fixed = {"entities": 40, "facts": 4, "family": 4, "distractors": 0, "stale": 0.0}
        fixed |= {"contradictory": 0.0, "injections": 0.0, "results": 4}
        for key, value in (fixed | {"tool_latency": 0.0, "tool_latency_sigma": 1.0}).items():
            _take(world, key, f"{name}.world.{key}", value)
        tasks |= world  # unknown keys, for the reader to refuse
        _take(tasks, "seed", f"{name}.seed", 0, *([1] if name == "test_tasks" else []))
    tests = raw.setdefault("test_tasks", {"split": "test"})
    asked = [s.pop("hops", [1, 2]) for s, _, _ in _sections(raw, _EVALUATIONS)]
    for hops in asked:
        if list(hops) != list(asked[0]):
            raise Gone("stages.eval.hops", hops, asked[0])
    if asked:
        tests["hops"] = asked[0]


def _optimizers_1(raw: Raw) -> None:
    for optimizer, _, where in _sections(raw, _OPTIMIZERS):
        share = optimizer.pop("warmup_fraction", 0.0)
        optimizer["warmup"] = float(optimizer.pop("warmup_steps", 0)) or share
        if optimizer.get("schedule") != "flat_linear":  # which alone reads it
            optimizer.pop("flat_fraction", None)
        _take(optimizer, "flat_fraction", f"{where}.flat_fraction", 0.5)


def _mix_1(mix: Raw, where: str) -> str:
    for name, differs in _MIXES.items():
        if {k: list(v) if isinstance(v, tuple) else v for k, v in mix.items()} == (
            differs | _ALL_MIXES
        ):
            return name
    raise Gone(f"{where}.mix", mix, tuple(_MIXES))


def _rl_1(raw: Raw, rl: Raw, where: str) -> None:
    loss, stream, pool = (rl.get(key, {}) for key in ("loss", "stream", "pool"))
    method = loss.get("name", "minirl")
    own = "batch" if method.startswith("reinforce_pp") else "none"
    _take(loss, "normalize", f"{where}.loss.normalize", "", own)
    rules = [dict(rule) for rule in loss.get("corrections", ())]
    for rule in rules:
        for bound in ("low", "high"):
            if rule.get(bound) == -1.0:
                rule[bound] = None
    loss["corrections"] = [rule for rule in rules if rule["name"] != "none"] if rules else None
    stall = stream.get("stall_timeout", 900.0)
    _take(stream, "sample_deadline", f"{where}.stream.sample_deadline", 3600.0, 4 * stall)
    least = min(2, stream.get("group_size", 8))
    _take(stream, "min_valid", f"{where}.stream.min_valid", least)
    dtype = raw.get("model", {}).get("dtype", "float32")
    if not pool.get("urls") and not pool.get("urls_file"):  # nothing is published
        pool.pop("weights_dtype", None)
    _take(pool, "weights_dtype", f"{where}.pool.weights_dtype", "", dtype)


MIGRATIONS: dict[int, Migration] = {  # by the older of the two versions
    1: Migration(
        defaults=_each(("stages.sft.demonstrations",), wrong_pick=0.2, stop_early=0.65)
        | _each(_OPTIMIZERS, flat_fraction=0.3),
        respell=_respell_1,
        fixed=_each(
            ("episode",),
            no_progress_stop=20,
            truncated_stop=1,
            turn_deadline=None,
            max_tool_chars=20_000,
            nudge=_NUDGE,
            nudge_truncated="Your message was cut off because it was too long. Be brief.",
        )
        | _each(
            _JUDGES,
            retries=2,
            retry_delay=1.0,
            concurrency=16,
            max_tokens=1024,
            max_chars=4000,
            cache="",
        )
        | _each(_ENGINES, deterministic=False, prefill_tokens=8192, reuse=True, prefill_rows=[])
        | _each(_OPTIMIZERS, b1=0.9, muon_momentum=0.95, total_steps=0)
        | _each(("stages.pretrain.phases",), prompt_weight=0.1)
        | _each(("stages.sft.demonstrations",), wrong_pick=0.1, stop_early=0.6)
        | _each(("stages.rl.denoise",), agreement=0.5, reserve=0, min_calls=0, min_samples=2)
        | _each(("stages.rl.stream",), retry_delay=0.5, reissues=1, epoch_size=0, barren_batches=50)
        | _each(
            ("stages.rl.pool",),
            admin_key_env="SGLANG_ADMIN_API_KEY",
            ca_file="",
            allow_unversioned=False,
            affinity_slack=8,
            max_failures=8,
            backoff=0.2,
            backoff_max=8.0,
            prefetch_timeout=900.0,
            health_timeout=25.0,
        ),
        unset={"tokenizer": "", "log_url": "", "episode.system_prompt": ""}
        | _each(("stages.rl", *_EVALUATIONS), tasks_path="")
        | _each(_JUDGES, url="", key_env="")
        | {"stages.sft.data.path": "", "stages.sft.epochs": 0}
        | _each(("stages.sft.shape", "stages.rl.shape"), micro_rows=0)
        | _each(
            ("stages.rl.loss",),
            objective="",
            region="",
            proximal="",
            kl="",
            aggregation="",
            eps_low=-1.0,
            eps_high=-1.0,
            dual_clip=-1.0,
            ratio_cap=-1.0,
            kl_coef=-1.0,
            norm=-1.0,
        )
        | {"stages.rl.advantages.estimator": "", "stages.rl.workers.trainer_groups": -1}
        | _each(("stages.rl.pool",), urls_file="", router_url="", weights_dir="", agent_port=0),
    ),
}
