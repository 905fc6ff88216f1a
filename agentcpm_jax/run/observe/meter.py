"""What the rollouts of one training step looked like, whatever later became of them."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np

from agentcpm_jax.evaluate.runner import RunSample
from agentcpm_jax.rewards.grade import reward_metrics
from agentcpm_jax.rollout.policy import TokenPolicy
from agentcpm_jax.run.observe.vitals import LoopLag, Memory, PolicyWatch
from agentcpm_jax.types import Task, Trajectory


class Meter:
    """Listens in the rollout thread; `drain` is the trainer's, once per step."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: list[tuple[str, Trajectory]] = []
        self._lag, self._memory = LoopLag(), Memory()
        self._pool: PolicyWatch | None = None

    def watching_policy(self, policy: TokenPolicy) -> TokenPolicy:
        """`policy`, with its idle time measured here."""
        self._pool = PolicyWatch(policy)
        return self._pool

    def watching(self, run_sample: RunSample) -> RunSample:
        """`run_sample`, with every trajectory counted here and its event loop probed."""

        async def watched(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
            self._lag.ensure()  # from the first episode on, not from its end
            trajectory = await run_sample(task, issue_id, sample, attempt)
            self.see(task, trajectory)
            return trajectory

        return watched

    def see(self, task: Task, trajectory: Trajectory) -> None:
        """Counts a trajectory, whoever made it; in a coroutine, whose event loop is probed."""
        self._lag.ensure()
        with self._lock:
            self._seen.append((task.kind, trajectory))

    def drain(self) -> dict[str, float]:
        """`reward/*`, `episode/*`, `stop/*`, `pool/*`, `loop/*`, `memory/*` since the last call."""
        with self._lock:
            seen, self._seen = self._seen, []
        values = self._lag.drain() | self._memory.drain()
        if self._pool is not None:
            values |= self._pool.drain()
        return values | _episodes(seen)


def _episodes(seen: list[tuple[str, Trajectory]]) -> dict[str, float]:
    if not seen:
        return {}
    trajectories = [t for _, t in seen]
    values = reward_metrics(trajectories) | {
        "episode/samples": float(len(seen)),
        "episode/turns": float(np.mean([len(t.turns) for t in trajectories])),
        "episode/tokens": float(np.mean([t.num_tokens for t in trajectories])),
        "episode/flagged_turns": float(
            np.mean([sum(bool(turn.flags) for turn in t.turns) for t in trajectories])
        ),
    }
    for kind in sorted({kind for kind, _ in seen}):
        known = [t.reward for k, t in seen if k == kind and t.reward is not None]
        if known:
            values[f"reward/{kind}"] = float(np.mean(known))
    stops = Counter(str(t.stop) for t in trajectories)
    return values | {f"stop/{stop}": n / len(seen) for stop, n in stops.items()}
