"""Metrics of the samples that a step trains: rewards, lengths, why they ended, who got credit.

All are read from the experience log, where the batch was recorded before the step: equal lockstep
runs have equal figures, and so have a run that was killed and one that was not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.rewards.grade import reward_metrics, unknown_reason
from agentcpm_jax.types import ShippedSegment, Trajectory


def outcome_metrics(log: ExperienceLog, shipped: Sequence[ShippedSegment]) -> dict[str, float]:
    """`reward/*`, `episode/*`, `stop/*`, `unknown/*` and `advantage/*` of a batch.

    Of all samples of its groups: one that a filter muted was scored too, and a mean without it
    would not be the policy's. `reward/unknown` and `unknown/<reason>` are shares of all attempts,
    those included that were repeated; the others are of each sample's last one.
    """
    kinds: dict[str, list[Trajectory]] = {}
    attempts: list[Trajectory] = []
    for issue_id in dict.fromkeys(s.issue_id for s in shipped):
        issue, tried = log.find_issue(issue_id), log.attempts(issue_id)
        assert issue is not None, "it is recorded before a step"
        attempts += tried
        kinds.setdefault(issue.task.kind, []).extend({t.sample: t for t in tried}.values())
    if not attempts:
        return {}
    samples = [t for group in kinds.values() for t in group]
    reasons = Counter(reason for t in attempts if (reason := unknown_reason(t)))
    values = reward_metrics(samples) | _shape(samples) | _credit(shipped)
    values["reward/unknown"] = reasons.total() / len(attempts)
    values |= {f"unknown/{reason}": n / len(attempts) for reason, n in reasons.items()}
    for kind, found in kinds.items():
        mean = reward_metrics(found)["reward/mean"]
        values |= {f"reward/{kind}": mean} if np.isfinite(mean) else {}
    return values


def _shape(samples: Sequence[Trajectory]) -> dict[str, float]:
    flagged = [sum(bool(turn.flags) for turn in t.turns) for t in samples]
    stops = Counter(str(t.stop) for t in samples)
    return {
        "episode/samples": float(len(samples)),
        "episode/turns": float(np.mean([len(t.turns) for t in samples])),
        "episode/tokens": float(np.mean([t.num_tokens for t in samples])),
        "episode/flagged_turns": float(np.mean(flagged)),
    } | {f"stop/{stop}": n / len(samples) for stop, n in stops.items()}


def _credit(shipped: Sequence[ShippedSegment]) -> dict[str, float]:
    """`advantage/positive` and `advantage/negative`: shares of the trained tokens."""
    advantages = np.concatenate([s.credit.advantage[s.credit.keep] for s in shipped])
    if not len(advantages):
        return {}
    return {
        "advantage/positive": float((advantages > 0).mean()),
        "advantage/negative": float((advantages < 0).mean()),
    }
