"""Reward denoising: an ordered list of named filters over one group of samples.

A filter is a pure function of the group as the filters before it left it, and returns decisions
with reasons; `denoise` applies them. A decision *drops* a sample (it leaves the group and its
baseline), *mutes* a sample or a turn (not trained; a muted sample's score stays in the baseline,
for it is a true score of this policy), drops the whole group, or only *notes* something to count.

Filters, in the default order (ours; then AgentCPM-Explore's condition):

environment    drop a sample whose stop is engine_error, infra_error, judge_error or cancelled
               (a failing engine, tool server or judge; a timeout; a broken connection), whose
               verdict is unknown (the judge abstained, or its votes disagree), or whose reward is
               missing or not finite. `rollout.groups` has tried it again before. Original: final
               state "failed_error" is abandoned, after its 0 entered the baseline. [1,2]
disagreement   of samples of one group with the same answer (normalised) but different verdicts,
               drop those of the rarer verdict; all of them, unless more than half of them have
               the other one. Original: none. [10]
contamination  drop a sample when a tool result or call argument of it holds one of the texts in
               `contaminated` (case ignored); drop the group when its task's uid is one of them.
               Original: URLs with "huggingface" are cut from the results, tasks are not
               checked. [11]
format         note each malformed call by its parse error, and each call that its tool refused for
               its arguments; `advantages` takes the credit of its tokens. Original: the whole turn
               loses its credit when a call is malformed or lacks an argument (but not code). [3]
repeated       note each turn whose text stood earlier; `advantages` takes its credit. Original: the
               same, but the label replaces that of a malformed call. [4]
extreme        mute samples whose stop is in `extreme_stops`. Original: context and turn limits,
               but for a random reserve, of which its recipe has none. [5]
no_search      mute right samples without a well-formed call. Original: right within `min_turns` = 1
               turns. [7]
long_turn      mute turns that end beyond `max_turn_tokens` tokens of their segment (prompt
               included; None: off). Original: the same, where records are converted.
too_few        drop the group when its baseline has fewer than 2 scores, or nothing is left to
               train. Original: none, a lone sample gets advantage 0. [8]
zero_variance  drop the group when max - min of its baseline's scores is below `min_spread`.
               Original: the same at 0.1, but over scores that hold environment failures as 0. [1]
balance        (not in the default list) with m = min(right, wrong), mute all but the first m + 2
               right and m + 1 wrong samples. Original: a random choice. [6,9]

Deviations from the original:
1. Environment failures leave before baseline and variance are computed.
2. A judge that fails gives unknown, not wrong.
3. Credit is taken per call, not per turn.
4. Labels are independent flags: none replaces another.
5. Repetition and truncated stops are extreme too; `extreme_stops=("max_turns", "max_context")` is
   the original's list (it trains repetition as wrong and skips single truncated turns).
6. Samples to keep are chosen by index, so that a group always gives the same decisions; samples
   are exchangeable, so this is as fair as a draw.
7. Calls are counted, not turns: a first turn that searches and answers is not muted, a right answer
   after idle talk is.
8. A group that cannot give a gradient is dropped, to be refilled.
9. Balancing is a filter among the others; the original returns early and skips the rest.
10. A judge sees question, accepted answers and answer, so different verdicts on the same answer
   are its error. Leave the filter out when the reward looks at more than the answer.
11. What an agent saw is not edited: the sample that met a leak leaves, and is counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from agentcpm_jax.rewards.grade import normalize, unknown_reason
from agentcpm_jax.types import (
    Decision,
    StopReason,
    Trajectory,
    TrajectoryGroup,
    TurnFlag,
    UserError,
    Verdict,
)

#: The share of equal answers that a verdict must have more of to be believed: a majority.
AGREEMENT = 0.5
#: Scores that a baseline needs.
MIN_SAMPLES = 2


@dataclass(frozen=True)
class DenoiseConfig:
    """The filters in order, and their thresholds."""

    filters: tuple[str, ...] = (
        "environment",
        "disagreement",
        "contamination",
        "format",
        "repeated",
        "extreme",
        "no_search",
        "long_turn",
        "too_few",
        "zero_variance",
    )
    # Hosts, canary strings, uids of held-out tasks. Benchmarks are published with their answers.
    contaminated: tuple[str, ...] = ("huggingface.co/datasets", "hf.co/datasets")
    extreme_stops: tuple[str, ...] = ("max_turns", "max_context", "repetition", "truncated")
    max_turn_tokens: int | None = None  # of prompt and turn together; None: any length
    min_spread: float = 0.1  # between the best and the worst score of a group

    def __post_init__(self) -> None:
        unknown = [f for f in self.filters if f not in FILTERS]
        if unknown:
            raise UserError(f"unknown denoise filter {unknown[0]!r}; use {', '.join(FILTERS)}")
        if self.filters[:1] != ("environment",):
            raise UserError(
                f"denoise.filters {self.filters!r} must begin with 'environment': the filters "
                "after it read scores, which samples of unknown verdict do not have"
            )
        if not all(text.strip() for text in self.contaminated):
            raise UserError("denoise.contaminated holds an empty text, which is in every page")
        stops = [s for s in self.extreme_stops if s not in set(StopReason)]
        if stops:
            raise UserError(f"unknown stop {stops[0]!r}; use {', '.join(StopReason)}")


@dataclass(frozen=True)
class DenoisedGroup:
    """A group after (some of) the filters.

    Attributes:
      group: the trajectories to train.
      baseline: those whose scores enter the baseline: `group` and the muted samples.
      muted_turns: (sample, turn index) of turns that are not trained.
      decisions: everything that was decided, in order.
      keep: False when the group as a whole was dropped.
    """

    group: TrajectoryGroup
    baseline: tuple[Trajectory, ...]
    muted_turns: frozenset[tuple[int, int]] = frozenset()
    decisions: tuple[Decision, ...] = ()
    keep: bool = True

    @property
    def scores(self) -> tuple[float, ...]:
        """Rewards of the baseline's samples."""
        return tuple(float(t.reward) for t in self.baseline if t.reward is not None)

    @property
    def counts(self) -> dict[str, int]:
        """Decisions by `filter/reason`."""
        return dict(Counter(f"{d.filter}/{d.reason}" for d in self.decisions))


def denoise(group: TrajectoryGroup, cfg: DenoiseConfig) -> DenoisedGroup:
    """Run the configured filters over a scored group; a dropped group ends the run.

    Give the result to `credit_group(d.group, ..., scores=d.scores, muted_turns=d.muted_turns)`.

    Raises:
      ValueError: two trajectories of the group have the same sample index.
    """
    samples = [t.sample for t in group.trajectories]
    if len(set(samples)) != len(samples):
        raise ValueError(f"group {group.issue_id}: sample indices {samples} are not unique")
    state = DenoisedGroup(group, group.trajectories)
    for name in cfg.filters:
        state = _apply(state, FILTERS[name](state, cfg))
        if not state.keep:
            break
    return state


def environment(state: DenoisedGroup, cfg: DenoiseConfig) -> list[Decision]:
    """Samples that say nothing about the policy leave before the baseline."""
    return [
        _drop("environment", reason, t)
        for t in state.group.trajectories
        if (reason := unknown_reason(t))
    ]


def disagreement(state: DenoisedGroup, cfg: DenoiseConfig) -> list[Decision]:
    """Equal answers that were judged differently: the rarer verdict is the judge's error."""
    by_answer: defaultdict[str, list[Trajectory]] = defaultdict(list)
    for t in state.group.trajectories:
        if t.answer is not None:
            by_answer[normalize(t.answer)].append(t)
    found = []
    for same in by_answer.values():
        counts = Counter(t.verdict for t in same)
        if len(counts) < 2:
            continue
        (common, count), *_ = counts.most_common()
        settled = count > AGREEMENT * len(same)
        doubted = [t for t in same if not (settled and t.verdict == common)]
        found += [_drop("disagreement", "same_answer_other_verdict", t) for t in doubted]
    return found


def contamination(state: DenoisedGroup, cfg: DenoiseConfig) -> list[Decision]:
    """Samples that met a listed text, and groups whose task is listed."""
    if state.group.task.uid in cfg.contaminated:
        return [_drop_group("contamination", "held_out_task")]
    texts = [text.casefold() for text in cfg.contaminated]
    return [
        _drop("contamination", "contaminated_source", t)
        for t in state.group.trajectories
        if texts and any(text in seen for seen in _texts_seen(t) for text in texts)
    ]


def malformed_calls(state: DenoisedGroup, cfg: DenoiseConfig) -> list[Decision]:
    """Counts malformed calls, one note per call."""
    found = []
    for t in state.group.trajectories:
        for i, turn in enumerate(t.turns):
            errors = [why for _, why in turn.bad_calls]
            if TurnFlag.FORMAT_ERROR in turn.flags and not errors:
                errors = ["not_located"]
            found += [Decision(t.sample, "format", e, "note", i) for e in errors]
    return found


def repeated(state: DenoisedGroup, cfg: DenoiseConfig) -> list[Decision]:
    """Counts repeated turns, one note per turn."""
    return [
        Decision(t.sample, "repeated", "repeated_turn", "note", i)
        for t in state.group.trajectories
        for i, turn in enumerate(t.turns)
        if TurnFlag.REPEATED in turn.flags
    ]


def extreme(state: DenoisedGroup, cfg: DenoiseConfig) -> list[Decision]:
    """Episodes that ran into a limit."""
    hit = _by_sample(t for t in state.group.trajectories if t.stop in cfg.extreme_stops)
    return [_mute("extreme", str(t.stop), t) for t in hit]


def no_search(state: DenoisedGroup, cfg: DenoiseConfig) -> list[Decision]:
    """Right answers that needed no tool."""
    return [
        _mute("no_search", "answered_without_searching", t)
        for t in state.group.trajectories
        if t.verdict == Verdict.RIGHT
        and not any(c.error is None for turn in t.turns for c in turn.calls)
    ]


def long_turn(state: DenoisedGroup, cfg: DenoiseConfig) -> list[Decision]:
    """Turns whose prompt and reply together are too long."""
    if cfg.max_turn_tokens is None:
        return []
    return [
        Decision(t.sample, "long_turn", "over_long_turn", "mute", i)
        for t in state.group.trajectories
        for i, turn in enumerate(t.turns)
        if turn.end > cfg.max_turn_tokens
    ]


def too_few(state: DenoisedGroup, cfg: DenoiseConfig) -> list[Decision]:
    """Groups without a baseline, or without anything to train."""
    if len(state.baseline) < MIN_SAMPLES:
        return [_drop_group("too_few", "too_few_valid")]
    if not state.group.trajectories:
        return [_drop_group("too_few", "nothing_to_train")]
    return []


def zero_variance(state: DenoisedGroup, cfg: DenoiseConfig) -> list[Decision]:
    """Groups whose scores are all alike: every advantage would be 0."""
    scores = state.scores
    if scores and max(scores) - min(scores) < cfg.min_spread:
        reason = "all_right" if min(scores) > 0.5 else "all_wrong"
        return [_drop_group("zero_variance", reason)]
    return []


def balance(state: DenoisedGroup, cfg: DenoiseConfig) -> list[Decision]:
    """At most two more right than, and one more wrong than, the rarer kind."""
    right = _by_sample(t for t in state.group.trajectories if t.verdict == Verdict.RIGHT)
    wrong = _by_sample(t for t in state.group.trajectories if t.verdict != Verdict.RIGHT)
    m = min(len(right), len(wrong))
    surplus = right[m + 2 :] + wrong[m + 1 :]
    return [_mute("balance", "surplus", t) for t in surplus]


FILTERS: dict[str, Callable[[DenoisedGroup, DenoiseConfig], list[Decision]]] = {
    "environment": environment,
    "disagreement": disagreement,
    "contamination": contamination,
    "format": malformed_calls,
    "repeated": repeated,
    "extreme": extreme,
    "no_search": no_search,
    "long_turn": long_turn,
    "too_few": too_few,
    "zero_variance": zero_variance,
    "balance": balance,
}


def _apply(state: DenoisedGroup, decisions: Sequence[Decision]) -> DenoisedGroup:
    dropped = {d.sample for d in decisions if d.scope == "sample" and d.action == "drop"}
    muted = {d.sample for d in decisions if d.scope == "sample" and d.action == "mute"}
    turns = {(d.sample, d.turn) for d in decisions if d.scope == "turn" and d.action == "mute"}
    left = tuple(t for t in state.group.trajectories if t.sample not in dropped | muted)
    return DenoisedGroup(
        group=replace(state.group, trajectories=left),
        baseline=tuple(t for t in state.baseline if t.sample not in dropped),
        muted_turns=state.muted_turns | turns,
        decisions=state.decisions + tuple(decisions),
        keep=state.keep and not any(d.scope == "group" for d in decisions),
    )


def _by_sample(trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    return sorted(trajectories, key=lambda t: t.sample)


def _texts_seen(trajectory: Trajectory) -> Iterator[str]:
    """Tool results and call arguments, casefolded."""
    for turn in trajectory.turns:
        for result in turn.results:
            yield result.content.casefold()
        for call in turn.calls:
            yield str(call.arguments).casefold()


def _drop(name: str, reason: str, trajectory: Trajectory) -> Decision:
    return Decision(trajectory.sample, name, reason, "drop")


def _drop_group(name: str, reason: str) -> Decision:
    return Decision(-1, name, reason, "drop")


def _mute(name: str, reason: str, trajectory: Trajectory) -> Decision:
    return Decision(trajectory.sample, name, reason, "mute")
