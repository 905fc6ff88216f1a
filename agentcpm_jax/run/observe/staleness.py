"""Metrics of staleness: the ages of a batch, and the samples that were lost to it, by length.

Long trajectories finish last and so grow too old first: a drop rate that rises with length is a
bias of the training data, and hidden in the mean. Hence deciles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.rollout.producer import OVER_AGE
from agentcpm_jax.rollout.staleness import oldest_trained
from agentcpm_jax.types import ShippedSegment

RECENT_ISSUES = 256  # how far back the per-step figures look
DECILES = 10


def age_metrics(shipped: Sequence[ShippedSegment], version: int) -> dict[str, float]:
    """`stale/age_mean`, `stale/age_max` and `stale/age_share/<k>` of a batch trained at `version`.

    The age of a segment is `version` minus that of its oldest trained token; shares are of the
    segments that train anything.
    """
    oldest = [oldest_trained(s.segment, s.credit.keep) for s in shipped]
    ages = [version - v for v in oldest if v is not None]
    if not ages:
        return {}
    found = {"stale/age_mean": float(np.mean(ages)), "stale/age_max": float(max(ages))}
    counts = Counter(ages)
    return found | {f"stale/age_share/{k}": counts[k] / len(ages) for k in sorted(counts)}


def stale_drops(
    log: ExperienceLog, stage: str, recent: int | None = RECENT_ISSUES, steps: int | None = None
) -> list[tuple[int, bool]]:
    """(tokens, lost to staleness) of every sample of a stage that was good enough to be trained.

    These are the samples of shipped groups and of groups dropped as over-age; samples that a filter
    dropped are not counted. `recent`: only the newest `recent` issues; None: all. `steps`: as it
    was after so many steps.
    """
    return log.lengths_and_losses(stage, OVER_AGE, recent, steps)


def drop_metrics(samples: Sequence[tuple[int, bool]]) -> dict[str, float]:
    """`stale/dropped` and `stale/dropped_decile/<0..9>`, shares; deciles need ten samples."""
    if not samples:
        return {}
    found = {"stale/dropped": float(np.mean([lost for _, lost in samples]))}
    for k, tenth in enumerate(length_deciles(samples)):
        found[f"stale/dropped_decile/{k}"] = float(np.mean([lost for _, lost in tenth]))
    return found


def length_deciles(samples: Sequence[tuple[int, bool]]) -> list[list[tuple[int, bool]]]:
    """The samples in ten equal parts from the shortest to the longest; none for fewer than ten."""
    if len(samples) < DECILES:
        return []
    ordered = sorted(samples, key=lambda s: s[0])
    bounds = np.linspace(0, len(ordered), DECILES + 1).round().astype(int)
    return [ordered[a:b] for a, b in pairwise(bounds)]
