"""Gradient bias under noise, for `ablate_denoise.py`: the noise-free gradient is known exactly.

A gradient is linear in the advantages: g = sum_p a_p s_p over parts p (of one trajectory: tokens of
bad calls, those beside them in a turn, of repeated turns, and all others), with
s_p = sum_t grad log pi(y_t) over the part. The inner products K = S S^T are computed once; then
every condition is a vector a.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import noise
import numpy as np
from jax.flatten_util import ravel_pytree

from agentcpm_jax.config import default_config, from_config_dict
from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.engine.local import LocalEngine
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.hf.tokenizer import load_chat
from agentcpm_jax.model.logprobs import token_logprobs
from agentcpm_jax.rewards.advantages import AdvantageConfig, credit_group
from agentcpm_jax.rewards.denoise import DenoiseConfig, denoise
from agentcpm_jax.run.sampling import make_run_sample
from agentcpm_jax.types import Trajectory, TrajectoryGroup, TurnFlag, Verdict
from agentcpm_jax.world.tools import open_toolbox
from configs.tiny import CONTEXT, use_tiny_world

SIZE, SPARES = 8, 4
BARE = ("environment", "too_few", "zero_variance")  # the last two change no gradient
CREDIT = AdvantageConfig(estimator="leave_one_out")
BOOTSTRAPS = 400

#: a group -> (id of a segment, advantage f32[T], 0 where not trained) of what is trained
Coefficients = Callable[[TrajectoryGroup], list[tuple[int, np.ndarray]]]


def measure_bias(groups: int, draws: int, seed: int) -> dict:
    """The table of `bias`: rows of {noise, rule, bias, one, kept}, each (value, low, high)."""
    clean = sample_groups(groups, SIZE + SPARES, seed, truncated=0.0)
    cut = sample_groups(groups, SIZE, seed + 1, truncated=0.3)
    parts = Parts()
    for group in (*clean, *cut):
        for t in group.trajectories:
            parts.add(t)
    gram = parts.gram()
    main = [replace(g, trajectories=g.trajectories[:SIZE]) for g in clean]
    spares = [t for g in clean for t in g.trajectories[SIZE:]]
    study = Study(parts, gram, main, draws)
    rows = [study.row(*condition) for condition in conditions(spares)]
    rows += [truncation(parts, gram, main, [g.trajectories[SIZE:] for g in clean], cut)]
    scores = [_rewards(g) for g in main]
    return {
        "groups": groups,
        "draws": draws,
        "accuracy": float(np.mean(scores)),
        "accuracy_truncated": float(np.mean([_rewards(g) for g in cut])),
        "with_signal": sum(len(set(s)) > 1 for s in scores),
        "rows": rows,
        "notes": [
            "Rows without noise show what a filter changes on clean samples: its price. A leaked "
            "answer is found by the contamination list because the list names its host.",
        ],
    }


def _rewards(group: TrajectoryGroup) -> list[float]:
    return [float(t.reward or 0.0) for t in group.trajectories]


def conditions(spares: Sequence[Trajectory]) -> list[tuple]:
    """(noise, rule, noise function or None, filters, extra) in the order of the table."""
    filters = {f: (*BARE[:1], f, *BARE[1:]) for f in (*DenoiseConfig().filters, "balance")}
    flips, wrong = "judge flips 10 %", "lost judge 20 %"
    tools, leaks = "lost tools 5 % of calls", "leaks 10 %"
    doubt = DenoiseConfig(filters["disagreement"])
    listed = DenoiseConfig(filters["contamination"], contaminated=(noise.LEAK,))
    bare = DenoiseConfig(BARE)
    found: list[tuple] = [
        (flips, "one vote, no filter", noise.flip(0.1), filtered(bare)),
        (flips, "disagreement filter", noise.flip(0.1), filtered(doubt)),
        (flips, "3 votes, majority", noise.flip(0.1, 3), filtered(bare)),
        (flips, "2 votes, else unknown", noise.flip(0.1, 2, "unknown"), filtered(bare)),
        (wrong, "counted wrong (original)", noise.lose_judge(0.2, True), filtered(bare)),
        (wrong, "environment filter", noise.lose_judge(0.2, False), filtered(bare)),
        (tools, "trained as wrong", noise.lose_tools(0.05, True), filtered(bare)),
        (tools, "0 in the baseline (original)", noise.lose_tools(0.05, False), originally),
        (tools, "environment filter", noise.lose_tools(0.05, False), filtered(bare)),
        (tools, "filter and repair", noise.lose_tools(0.05, False, spares), filtered(bare)),
        (leaks, "no filter", noise.leak(0.1), filtered(bare)),
        (leaks, "contamination filter", noise.leak(0.1), filtered(listed)),
    ]
    for name in ("disagreement", "extreme", "no_search", "balance"):
        found.append(("none", f"{name} filter", None, filtered(DenoiseConfig(filters[name]))))
    found.append(("none", "credit taken per turn (original)", None, per_turn))
    found.append(("none", "all default filters", None, filtered(DenoiseConfig())))
    return found


def filtered(cfg: DenoiseConfig) -> Coefficients:
    """Our pipeline with these filters."""

    def coefficients(group: TrajectoryGroup) -> list[tuple[int, np.ndarray]]:
        clean = denoise(group, cfg)
        if not clean.keep:
            return []
        credits = credit_group(clean.group, CREDIT, clean.scores, clean.muted_turns)
        return _by_segment(clean.group.trajectories, credits)

    return coefficients


def originally(group: TrajectoryGroup) -> list[tuple[int, np.ndarray]]:
    """Failures are not trained, but their 0 is in the baseline and in the test of variance."""
    scores = [t.reward or 0.0 for t in group.trajectories]
    valid = tuple(t for t in group.trajectories if t.reward is not None)
    if max(scores) - min(scores) < 0.1 or not valid:
        return []
    return _by_segment(valid, credit_group(replace(group, trajectories=valid), CREDIT, scores))


def per_turn(group: TrajectoryGroup) -> list[tuple[int, np.ndarray]]:
    """One bad call takes the credit of its whole turn."""

    def unlocated(t: Trajectory) -> Trajectory:
        turns = [
            replace(turn, calls=tuple(replace(c, span=(-1, -1)) for c in turn.calls))
            for turn in t.turns
        ]
        return replace(t, turns=tuple(turns))

    marked = replace(group, trajectories=tuple(map(unlocated, group.trajectories)))
    return filtered(DenoiseConfig(BARE))(marked)


def _by_segment(
    trajectories: Sequence[Trajectory], credits: Sequence
) -> list[tuple[int, np.ndarray]]:
    return [
        (id(t.segments[0]), own[0].advantage * own[0].keep)
        for t, own in zip(trajectories, credits, strict=True)
    ]


class Study:
    """One pool of groups, and the cosines of conditions on it."""

    def __init__(
        self, parts: Parts, gram: np.ndarray, groups: list[TrajectoryGroup], draws: int
    ) -> None:
        self.parts, self.gram, self.groups, self.draws = parts, gram, groups, draws
        self.clean = self.vector(filtered(DenoiseConfig(BARE)), None, 0)
        rng = np.random.default_rng(0)
        n = len(groups)
        counts = rng.multinomial(n, [1 / n] * n, BOOTSTRAPS)
        self.weights = np.concatenate([np.ones((1, n)), counts])
        self.member = np.equal.outer(parts.issues, [g.issue_id for g in groups]).astype(float)

    def vector(self, rule: Coefficients, noisy: noise.Noise | None, seed: int) -> np.ndarray:
        """f64[P]: the coefficient of each part."""
        a = np.zeros(len(self.parts.rows))
        for group in self.groups:
            if noisy is not None:
                changed = tuple(noisy(t, seed) for t in group.trajectories)
                group = replace(group, trajectories=changed)
            self.parts.add_to(a, rule(group))
        return a

    def row(self, name: str, rule_name: str, noisy: noise.Noise | None, rule: Coefficients) -> dict:
        """bias, one draw, kept: each (value, low, high)."""
        draws = self.draws if noisy is not None else 1
        vectors = [self.vector(rule, noisy, seed) for seed in range(draws)]
        mean = np.mean(vectors, axis=0)
        one = float(np.nanmean([self.cosines(v)[0] for v in vectors]))
        spread = np.concatenate([self.cosines(v)[1:] for v in vectors])
        bias, (low, high) = self.cosines(mean), _interval(self.cosines(mean)[1:])
        kept = self.kept(mean)
        return {
            "noise": name,
            "rule": rule_name,
            "bias": [float(bias[0]), low, high],
            "one": [one, *_interval(spread)],
            "kept": [float(kept[0]), *_interval(kept[1:])],
        }

    def cosines(self, a: np.ndarray) -> np.ndarray:
        """cos(g_a, g_clean): of all groups first, then of each bootstrap sample."""
        with np.errstate(invalid="ignore"):
            return self._dot(a, self.clean) / np.sqrt(
                self._dot(a, a) * self._dot(self.clean, self.clean)
            )

    def kept(self, a: np.ndarray) -> np.ndarray:
        """<g_a, g_clean> / <g_clean, g_clean>."""
        return self._dot(a, self.clean) / self._dot(self.clean, self.clean)

    def _dot(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """<g_a, g_b> of all groups, then of each bootstrap sample, through the groups' blocks."""
        i, j = np.flatnonzero(a), np.flatnonzero(b)
        left, right = self.member[i] * a[i, None], self.member[j] * b[j, None]
        blocks = left.T @ self.gram[np.ix_(i, j)] @ right
        return np.einsum("ng,gh,nh->n", self.weights, blocks, self.weights)


def truncation(parts: Parts, gram: np.ndarray, main: list, spares: list, cut: list) -> dict:
    """Cosine of the expected gradients with and without truncated pages, from disjoint halves:
    <t1, c2> / sqrt(<t1, t2> <c1, c2>) has no bias from the noise of sampling in its products."""
    rule = filtered(DenoiseConfig(BARE))

    def vectors(halves: Sequence[Sequence[Trajectory]], group: TrajectoryGroup) -> list:
        out = []
        for half in halves:
            a = np.zeros(len(parts.rows))
            parts.add_to(a, rule(replace(group, trajectories=tuple(half))))
            out.append(a)
        return out

    h = SIZE // 2
    per_group = [
        vectors((c.trajectories[:h], c.trajectories[h:], s), c)
        + vectors((t.trajectories[:h], t.trajectories[h:]), t)
        for c, s, t in zip(main, spares, cut, strict=True)
    ]
    stacked = np.array(per_group)  # [groups, 5, P]

    def cosine(weights: np.ndarray) -> float:
        c1, c2, c3, t1, t2 = np.einsum("g,gvp->vp", weights, stacked)
        dots = gram @ np.stack([c1, c2, c3, t1, t2]).T
        across = np.mean([t @ dots[:, i] for t in (t1, t2) for i in range(3)])
        own = np.mean([c1 @ dots[:, 1], c1 @ dots[:, 2], c2 @ dots[:, 2]])
        theirs = t1 @ dots[:, 4]
        return float(across / np.sqrt(own * theirs)) if own > 0 and theirs > 0 else float("nan")

    n = len(per_group)
    rng = np.random.default_rng(1)
    spread = [cosine(w) for w in rng.multinomial(n, [1 / n] * n, 200).astype(float)]
    value = [cosine(np.ones(n)), *_interval(np.array(spread))]
    nothing = [float("nan")] * 3
    rule_name = "no filter sees it (corrected)"
    return {
        "noise": "truncated pages 30 % of calls",
        "rule": rule_name,
        "bias": value,
        "one": nothing,
        "kept": nothing,
    }


_PLAIN, _BESIDE_BAD_CALL, _BAD_CALL, _REPEATED, _UNTRAINED = range(5)


class Parts:
    """The parts of trajectories and their score vectors."""

    def __init__(self) -> None:
        path = SHIPPED["shipped:sft"]
        self.params, self.model = load_hf(path)
        self.rows: list[np.ndarray] = []
        self.issues: list[int] = []
        self.of: dict[int, list[tuple[int, np.ndarray]]] = {}
        self._alive: list[Trajectory] = []  # keeps the ids of segments unique
        flat, _ = ravel_pytree(self.params)
        self._size = len(flat)

        def score(params, tokens, mask):
            positions = jnp.arange(tokens.shape[1])[None]
            where = (tokens, positions, jnp.ones_like(tokens))
            return jnp.sum(token_logprobs(params, self.model, *where) * mask)

        self._score = jax.jit(lambda *xs: ravel_pytree(jax.grad(score)(*xs))[0])

    def add(self, t: Trajectory) -> None:
        """Split a trajectory by where credit may differ, and differentiate each part."""
        (segment,) = t.segments
        label = np.where(segment.sampled, _PLAIN, _UNTRAINED)
        for turn in t.turns:
            span = slice(turn.sample_start, turn.end)
            if turn.bad_calls or TurnFlag.FORMAT_ERROR in turn.flags:
                label[span] = _BESIDE_BAD_CALL
            for call, _ in turn.bad_calls:
                if call.span[0] >= 0:
                    label[slice(*call.span)] = _BAD_CALL
            if TurnFlag.REPEATED in turn.flags:
                label[span] = _REPEATED
            if TurnFlag.TRUNCATED in turn.flags:
                label[span] = _UNTRAINED
        self._alive.append(t)
        tokens = np.zeros((1, CONTEXT), np.int32)
        tokens[0, : len(segment)] = segment.ids
        self.of[id(segment)] = []
        for kind in sorted(set(label) - {_UNTRAINED}):
            part = label == kind
            mask = np.zeros((1, CONTEXT), np.float32)
            mask[0, : len(segment)] = part
            self.of[id(segment)].append((len(self.rows), part))
            self.rows.append(np.asarray(self._score(self.params, tokens, mask), np.float16))
            self.issues.append(t.issue_id)

    def add_to(self, a: np.ndarray, trained: Sequence[tuple[int, np.ndarray]]) -> None:
        """Add these advantages to the coefficients of the parts, in which they are constant."""
        for segment, advantage in trained:
            for index, tokens in self.of[segment]:
                values = np.unique(advantage[tokens])
                if len(values) > 1:
                    raise ValueError(
                        f"advantages {values} in one part of issue {self.issues[index]}"
                    )
                a[index] += values[0]

    def gram(self, block: int = 32768) -> np.ndarray:
        """K = S S^T, f64[P, P]."""
        out = np.zeros((len(self.rows), len(self.rows)))
        for start in range(0, self._size, block):
            piece = np.stack([row[start : start + block] for row in self.rows]).astype(np.float32)
            out += piece @ piece.T
        return out


def sample_groups(count: int, size: int, seed: int, truncated: float) -> list[TrajectoryGroup]:
    """Groups of the shipped agent on training questions, truly graded."""
    c = default_config()
    use_tiny_world(c)
    c.train_tasks.tool_fault_rate = truncated
    c.train_tasks.tool_faults = ("truncated",)
    cfg = from_config_dict(c)
    params, model = load_hf(SHIPPED["shipped:sft"])
    chat = load_chat(SHIPPED["shipped:sft"])
    engine = LocalEngine(params, model, EngineConfig(slots=64, capacity=CONTEXT, row_buckets=()))
    run = make_run_sample(engine, chat, cfg.episode, open_toolbox, seed=seed)
    order = np.random.default_rng(7).permutation(len(cfg.train_tasks))

    async def group(n: int) -> TrajectoryGroup:
        task = cfg.train_tasks.task_at(int(order[n]))
        drawn = await asyncio.gather(*(run(task, n, s, 0) for s in range(size)))
        if any(t.verdict == Verdict.UNKNOWN for t in drawn):
            raise RuntimeError("an episode without a verdict in a world without lost tools")
        return TrajectoryGroup(n, task, tuple(drawn))

    async def everything() -> list[TrajectoryGroup]:
        return await asyncio.gather(*map(group, range(count)))

    try:
        return asyncio.run(everything())
    finally:
        engine.close()


def _interval(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
