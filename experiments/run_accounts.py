"""What a killed run owed: nothing recorded is lost or made anew, every figure can be made again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sqlite3
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax import tree
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.model.logprobs import token_logprobs
from agentcpm_jax.run.inspect.replay import HEADLINE, replay
from agentcpm_jax.run.observe.metrics import read_metrics
from agentcpm_jax.types import UNKNOWN_STOPS
from configs.tiny import CONTEXT

GAP = 1e-4  # nats between two float32 computations of one log-probability


class Sample(NamedTuple):
    """A recorded sample: the SHA-256 of all of it, and the version of its oldest token."""

    sha: str
    oldest: int


@dataclass(frozen=True)
class Held:
    """What a log holds: the batches by step, and the samples that ended with a verdict."""

    steps: dict[int, list[Any]] = field(default_factory=dict)
    samples: dict[tuple[int, int], Sample] = field(default_factory=dict)

    def owed(self, end: Held, eta: int) -> dict[str, int]:
        """What of it the log at the `end` has lost, and what was sampled again without need.

        A sample of a group in flight is drawn anew when it is older than `eta` versions by then.
        """
        both = [(old, end.samples[key]) for key, old in self.samples.items() if key in end.samples]
        anew = [old.oldest >= new.oldest - eta for old, new in both if old.sha != new.sha]
        return {
            "steps": len(self.steps),
            "samples": len(self.samples),
            "steps_lost": sum(end.steps.get(n) != batch for n, batch in self.steps.items()),
            "samples_lost": len(self.samples) - len(both),
            "samples_repeated": sum(anew),
            "samples_too_old": len(anew) - sum(anew),
        }


def held(url: str) -> Held:
    """Reads a log; one that is not there yet holds nothing."""
    found = Held()
    if "://" not in url and not _has_issues(url):
        return found
    with ExperienceLog.open(url) as log:
        for row in log.rows("shipped"):
            entry = [row[k] for k in ("ordinal", "issue_id", "sample", "segment")]
            found.steps.setdefault(row["step"], []).append([*entry, _sha(row["credit"])])
        for row in log.rows("trajectory"):
            if row["verdict"] != "unknown" and row["stop"] not in UNKNOWN_STOPS:
                sample = Sample(_sha(row["payload"]), row["oldest_version"])
                found.samples[row["issue_id"], row["sample"]] = sample
    return found


def _has_issues(path: str) -> bool:
    """Whether a trainer has made a log: to open one that it is making would be to make it, too."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as conn:
            return conn.execute("SELECT 1 FROM issue").fetchone() is not None
    except sqlite3.OperationalError:
        return False


def verify(arguments: list[str]) -> int:
    """[workdir, log, steps, eta, file for the answer] of a finished run: what is true of it."""
    workdir, url, steps, eta, answer = arguments
    rows = read_metrics(Path(workdir) / "rl" / "metrics.jsonl")
    broken = []
    if [row["step"] for row in rows] != list(range(1, int(steps) + 1)):
        broken.append(f"the metrics hold the steps {[row['step'] for row in rows]}")
    if any(row.get(name) is None for row in rows for name in HEADLINE):
        broken.append("a step has no loss")
    if any(row.get("pool/uncertain_tokens") for row in rows):
        broken.append("tokens whose version is uncertain")
    for step in (int(steps) - 2, int(steps)):  # from the first parameters, from a checkpoint
        found = replay(workdir, step)
        if not found.equal:
            broken.append(f"step {step} is not recomputed: {found.differing}")
    with ExperienceLog.open(url) as log:
        figures = trained_tokens(log, Path(workdir).with_suffix(".versions"), int(steps))
    if not figures["gap"] <= GAP:
        broken.append(f"log-probs are {figures['gap']:.3g} nats from those of their version")
    if figures["age"] > int(eta):
        broken.append(f"a sample is {figures['age']} versions old")
    Path(answer).write_text(json.dumps(figures | {"broken": broken}))
    return 0


def trained_tokens(log: ExperienceLog, versions: Path, steps: int) -> dict[str, Any]:
    """Every trained token against the weights of the version that it names, in nats.

    `gap` is the largest difference; `other` is the median, over spans of one version, of the
    largest difference under the version before or after; `age` is the oldest in versions.
    """
    logprobs = partial(_logprobs, versions)
    gaps, others, ages, tokens = [0.0], [], [0], 0
    for step in range(steps):
        for segment in (shipped.segment for shipped in log.shipped("rl", step)):
            sampled = segment.sampled
            ages.append(step - int(segment.version[sampled].min()))
            for version in np.unique(segment.version[sampled]).tolist():
                mine = sampled & (segment.version == version)
                tokens += int(mine.sum())
                wrong = [
                    float(np.abs(segment.logprob - logprobs(v, segment.ids))[mine].max())
                    for v in (version, version - 1 if version else 1)
                ]
                gaps.append(wrong[0])
                others.append(wrong[1])
    other = float(np.median(others)) if others else math.nan
    return {"tokens": tokens, "gap": max(gaps), "other": other, "age": max(ages)}


def _logprobs(versions: Path, version: int, ids: np.ndarray) -> np.ndarray:
    """float32 under the weights of `version`; 0 is the agent that the run began with."""
    if version not in _loaded:
        params, model = load_hf(SHIPPED["shipped:sft"])
        if version:
            with np.load(versions / f"{version}.npz") as stored:
                params = tree.unflatten({name: jnp.asarray(stored[name]) for name in stored.files})
        _loaded[version] = partial(jax.jit(token_logprobs, static_argnums=1), params, model)
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(ids)] = ids
    positions = np.arange(CONTEXT, dtype=np.int32)[None]
    segments = (positions < len(ids)).astype(np.int32)
    arrays = map(jnp.asarray, (padded, positions, segments))
    return np.asarray(_loaded[version](*arrays))[0, : len(ids)]


_loaded: dict[int, Any] = {}


def _sha(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()
