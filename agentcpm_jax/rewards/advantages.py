"""From scores to the advantage of every sampled token.

Estimators over the n scores s of one group:
    leave_one_out  A_i = s_i - mean_{j != i} s_j = n/(n-1) (s_i - mean s)   (RLOO; AgentCPM-Explore)
    grpo           A_i = (s_i - mean s) / (std s + 1e-6), std with n - 1    (GRPO, DAPO)
    grpo_no_std    A_i = s_i - mean s                   (Dr.GRPO, MiniRL, REINFORCE++-baseline)
    raw            A_i = s_i                                              (REINFORCE++)
The batch-wide normalisation of REINFORCE++ is part of the train step (`loss.normalize`): only there
the whole batch is seen. Its discount is 1, so every token's return is its trajectory's score.

AgentCPM-Explore's rule then shapes it: A <- min(A, 0) for malformed calls and repeated turns (blame
stays, credit goes), A <- min(A, 0) when s <= 0.5 and max(A, 0) otherwise (sign clamp), then
A <- scale A, and what is 0 leaves the loss.

Soft overlong punishment (DAPO, arXiv 2503.14476), with len = the sampled tokens of a trajectory:
    s <- s + factor min((L_max - L_buffer - len) / L_buffer, 0)
It moves the advantages alone: the filters see the scores as they were graded.

Deviations from the original:
1. The baseline holds the scores of valid samples only; the original also counts environment
   failures, as 0 (`denoise` removes them first).
2. A malformed call loses the credit of its own tokens; the original mutes the whole turn, well
   formed calls included. Only when the call cannot be located is it the whole turn.
3. The bound of a repeated turn and that of a malformed call do not overwrite each other.
4. A group of equal scores has advantages of exactly 0, whatever the rounding.
5. A group of one has advantage 0 with every estimator but `raw`.
6. The overlong punishment counts what the policy wrote, not what its tools returned.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from agentcpm_jax.ranges import check_choice
from agentcpm_jax.types import Credit, Trajectory, TrajectoryGroup, Turn, TurnFlag, UserError

ESTIMATORS = ("leave_one_out", "grpo", "grpo_no_std", "raw")
EPS = 1e-6  # of the division by the standard deviation


@dataclass(frozen=True)
class AdvantageConfig:
    """Which estimator, and how its result is shaped (defaults: the original's released recipe).

    Without an estimator the loss chooses it, and the shaping that its paper has: `for_loss`.
    """

    estimator: str | None = None  # leave_one_out | grpo | grpo_no_std | raw; None: the loss's
    scale: float = 2.0  # factor on every advantage
    sign_clamp: bool = True  # no blame for right answers, no credit for wrong ones
    right_above: float = 0.5  # the sign clamp's threshold: a score above it is right
    drop_zero: bool = True  # tokens of advantage 0 leave the loss
    minimal: float | None = None  # tokens of a lower advantage leave the loss; None: none do
    singleton: str = "zero"  # advantage of a group of one: zero | raw (its score)
    overlong_max: int = 0  # L_max in sampled tokens; 0: no soft overlong punishment
    overlong_buffer: int = 4096  # L_buffer, in tokens
    overlong_factor: float = 1.0

    def __post_init__(self) -> None:
        choices = {"estimator": ESTIMATORS, "singleton": ("zero", "raw")}
        check_choice(self, "advantages", choices)
        if self.overlong_max and not 0 < self.overlong_buffer <= self.overlong_max:
            raise UserError(
                f"overlong_buffer={self.overlong_buffer} must lie between 1 and "
                f"overlong_max={self.overlong_max}"
            )


def for_loss(cfg: AdvantageConfig, loss: str, estimator: str) -> AdvantageConfig:
    """`cfg` with the `estimator` of the loss named `loss`, unless it names one itself.

    Scale, sign clamp and the removal of zeros are the original recipe's: the estimators of other
    losses come without them.

    Raises:
      UserError: the estimator is left open, and a shaping option that the loss's recipe does not
        have was set to something else than its default.
    """
    if cfg.estimator:
        return cfg
    chosen = replace(cfg, estimator=estimator)
    if loss == "minirl":
        return chosen
    plain = {"scale": 1.0, "sign_clamp": False, "drop_zero": False}
    default = AdvantageConfig()
    for key, value in plain.items():
        given = getattr(cfg, key)
        if given not in (value, getattr(default, key)):
            raise UserError(
                f"advantages.{key}={given} would be ignored: {loss!r} has {value}; name "
                f"advantages.estimator ({estimator!r}) to shape it yourself"
            )
    return replace(chosen, **plain)


def credit_group(
    group: TrajectoryGroup,
    cfg: AdvantageConfig,
    scores: Sequence[float] | None = None,
    muted_turns: Set[tuple[int, int]] = frozenset(),
) -> list[list[Credit]]:
    """The credit of every token of a group.

    Every sampled token carries its trajectory's advantage, except: a malformed call's tokens and
    a repeated turn's get min(0, A). Truncated and muted turns are not trained, nor is what a fork
    shares with its parent.

    Args:
      group: its trajectories are the ones to train; each has a reward.
      scores: the baseline's scores, those of the trajectories among them (samples that are valid
        but not trained count too); None: the rewards of the trajectories.
      muted_turns: (sample, turn index) of turns that are not trained.
    Returns:
      One list per trajectory, with one `Credit` per segment.
    Raises:
      ValueError: a trajectory without a finite reward, or with a reward that `scores` lacks.
    """
    rewards = [_reward(t) for t in group.trajectories]
    scores = rewards if scores is None else [float(s) for s in scores]
    by_score = dict(zip(scores, estimate(scores, cfg).tolist(), strict=True))
    credits = []
    for trajectory, reward in zip(group.trajectories, rewards, strict=True):
        if reward not in by_score:
            raise ValueError(f"reward {reward} of sample {trajectory.sample} is not in {scores}")
        credits.append(_credit_trajectory(trajectory, by_score[reward], reward, cfg, muted_turns))
    return credits


def estimate(scores: Sequence[float] | np.ndarray, cfg: AdvantageConfig) -> np.ndarray:
    """f64[n] of the configured estimator, before shaping."""
    if cfg.estimator == "raw":
        return np.asarray(scores, np.float64).copy()
    if cfg.estimator in (None, "leave_one_out"):
        lone = np.asarray(scores, np.float64).copy()
        return lone if len(lone) == 1 and cfg.singleton == "raw" else leave_one_out(scores)
    return grpo(scores, std=cfg.estimator == "grpo", singleton=cfg.singleton)


def leave_one_out(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    """Each score minus the mean of the others: f64[n], summing to 0; 0 for a group of one."""
    s = np.asarray(scores, np.float64)
    if len(s) < 2 or np.ptp(s) == 0:
        return np.zeros(len(s))
    return s - (s.sum() - s) / (len(s) - 1)


def grpo(
    scores: Sequence[float] | np.ndarray, std: bool = True, singleton: str = "zero"
) -> np.ndarray:
    """Scores centred on the group's mean, over (std + 1e-6) unless `std` is off: f64[n].

    A group of one has advantage 0, or its score with `singleton="raw"`.
    """
    s = np.asarray(scores, np.float64)
    if len(s) == 1 and singleton == "raw":
        return s / (1.0 + EPS) if std else s.copy()
    if len(s) < 2 or np.ptp(s) == 0:
        return np.zeros(len(s))
    centred = s - s.mean()
    return centred / (s.std(ddof=1) + EPS) if std else centred


def punish_overlong(
    trajectories: Sequence[Trajectory], cfg: AdvantageConfig
) -> tuple[Trajectory, ...]:
    """The trajectories with the soft overlong punishment taken off their rewards.

    Call it after the filters, on the trajectories to train and on those of the baseline.
    """
    if not cfg.overlong_max:
        return tuple(trajectories)
    lengths = [sum(int(s.sampled.sum()) for s in t.segments) for t in trajectories]
    penalties = soft_overlong(
        lengths, cfg.overlong_max, cfg.overlong_buffer, cfg.overlong_factor
    ).tolist()
    return tuple(
        t if t.reward is None else replace(t, reward=t.reward + penalty)
        for t, penalty in zip(trajectories, penalties, strict=True)
    )


def soft_overlong(
    lengths: Sequence[int] | np.ndarray, max_length: int, buffer: int, factor: float = 1.0
) -> np.ndarray:
    """DAPO's penalty f64[n], 0 up to max_length - buffer tokens, -factor at max_length."""
    left = max_length - buffer - np.asarray(lengths, np.float64)
    return factor * np.minimum(left / buffer, 0.0)


def shape(advantage: float, score: float, cfg: AdvantageConfig) -> float:
    """An estimator's advantage, or its bound -> that of tokens: sign clamp, then scale."""
    if cfg.sign_clamp:
        right = score > cfg.right_above
        advantage = max(advantage, 0.0) if right else min(advantage, 0.0)
    return advantage * cfg.scale


def is_trained(advantage: float, cfg: AdvantageConfig) -> bool:
    """Whether tokens of this (shaped) advantage stay in the loss."""
    if cfg.minimal is not None and advantage < cfg.minimal:
        return False
    return not (cfg.drop_zero and advantage == 0.0)


def _reward(trajectory: Trajectory) -> float:
    if trajectory.reward is None or not np.isfinite(trajectory.reward):
        raise ValueError(
            f"sample {trajectory.sample} has reward {trajectory.reward}: samples of unknown "
            "verdict leave the group before credit is given (rewards.denoise)"
        )
    return float(trajectory.reward)


def _credit_trajectory(
    trajectory: Trajectory,
    raw: float,
    score: float,
    cfg: AdvantageConfig,
    muted_turns: Set[tuple[int, int]],
) -> list[Credit]:
    blamed = [np.zeros(len(s), bool) for s in trajectory.segments]  # where A is at most 0
    kept = [s.sampled & trajectory.trainable for s in trajectory.segments]
    for segment, keep in zip(trajectory.segments, kept, strict=True):
        keep[: segment.shared_prefix_len] = False
    for index, turn in enumerate(trajectory.turns):
        span = slice(turn.sample_start, turn.end)
        if (trajectory.sample, index) in muted_turns or TurnFlag.TRUNCATED in turn.flags:
            kept[turn.segment][span] = False
        for without_credit in _spans_without_credit(turn):
            blamed[turn.segment][without_credit] = True
    return [
        _credit_segment(keep, blame, raw, score, cfg)
        for keep, blame in zip(kept, blamed, strict=True)
    ]


def _spans_without_credit(turn: Turn) -> list[slice]:
    """Where A is bounded by 0: malformed calls, or the whole turn."""
    whole = [slice(turn.sample_start, turn.end)]
    malformed = [call for call, _ in turn.bad_calls]
    if TurnFlag.REPEATED in turn.flags or any(c.span[0] < 0 for c in malformed):
        return whole
    if TurnFlag.FORMAT_ERROR in turn.flags and not malformed:
        return whole
    return [slice(*c.span) for c in malformed]


def _credit_segment(
    keep: np.ndarray, blamed: np.ndarray, raw: float, score: float, cfg: AdvantageConfig
) -> Credit:
    advantage = np.zeros(len(keep), np.float32)
    keep = keep.copy()
    for here, estimated in ((keep & ~blamed, raw), (keep & blamed, min(raw, 0.0))):
        value = shape(estimated, score, cfg)
        if is_trained(value, cfg):
            advantage[here] = value
        else:
            keep[here] = False
    return Credit(advantage, keep)
