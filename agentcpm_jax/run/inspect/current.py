"""Log-probabilities of stored tokens under the newest checkpoint of their stage."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from agentcpm_jax.checkpoint import Checkpointer
from agentcpm_jax.model.logprobs import token_logprobs
from agentcpm_jax.run.inspect.opened import Run
from agentcpm_jax.run.learner import make_learner
from agentcpm_jax.types import Segment, UserError

LENGTH_MULTIPLE = 256  # segments are padded to one length, so that one program serves them all


def current_logprobs(
    run: Run, stage: str, segments: Sequence[Segment]
) -> tuple[list[np.ndarray] | None, str]:
    """(f32[T] of each segment, in nats, and where they come from).

    Returns None and the reason when the stage has no checkpoint that can be read here.
    """
    checkpoints = Checkpointer(run.workdir / stage / "checkpoints")
    if (step := checkpoints.latest_step()) is None:
        return None, "No checkpoint yet: log-probabilities are those of sampling only."
    try:
        state = make_learner(run.context(), *run.stage(stage)).state
        restored = checkpoints.restore(step, abstract_state=state)
    except UserError as error:
        return None, f"Without current log-probabilities: {error}"
    assert restored is not None
    length = -(-max(map(len, segments), default=1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    compute = jax.jit(lambda p, *where: token_logprobs(p, run.cfg.model, *where))
    found = []
    for segment in segments:
        n = len(segment)
        ids = np.zeros((1, length), np.int32)
        ids[0, :n] = segment.ids
        here = np.arange(length, dtype=np.int32)[None] < n
        positions = np.where(here, np.arange(length, dtype=np.int32), 0)
        values = compute(restored.state.params, ids, positions, here.astype(np.int32))
        found.append(np.asarray(values, np.float32)[0, :n])
    return found, f"'now' and 'change' are under the parameters after step {step}."
