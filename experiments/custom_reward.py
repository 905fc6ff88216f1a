"""A reward and a tool of one's own: a config names them as `package.module:function`.

python launch/train.py --config=configs/tiny.py --workdir=runs/custom \
    --config.stage.rl.grader=experiments.custom_reward:short_and_right
"""

from agentcpm_jax.rewards.grade import grade_exact
from agentcpm_jax.types import Task, Trajectory, Verdict


def short_and_right(task: Task, trajectory: Trajectory) -> float:
    """A right answer earns 1, less 0.05 for each call beyond two per hop; a wrong one 0."""
    answer = trajectory.answer
    if answer is None or grade_exact(answer, task.answers) is Verdict.WRONG:
        return 0.0
    spare_calls = max(0, trajectory.num_calls - 2 * len(task.meta["relations"]))
    return max(0.6, 1.0 - 0.05 * spare_calls)


def multiply(a: float, b: float) -> float:
    """Multiply two numbers."""  # --config.tools="('experiments.custom_reward:multiply',)"
    return a * b
