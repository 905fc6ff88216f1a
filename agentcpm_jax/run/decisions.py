"""Teacher-forced accuracy of each kind of decision on flawless held-out episodes.

End-to-end accuracy hides which part fails; these four name it:

    syntax     the agent writes well-formed calls and answers (everything that is not below)
    relation   the relation word of the next query or of the answer
    lookup     the name that stands behind that word, found on a page
    copying    a name repeated from the question or from its own query
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.qwen3 import forward
from agentcpm_jax.types import Provenance, Task
from agentcpm_jax.world.names import FIRST, RELATIONS, SECOND
from agentcpm_jax.world.questions import demonstration
from agentcpm_jax.world.search import search_index
from agentcpm_jax.world.tools import SCHEMAS, config_of

DECISIONS = ("syntax", "relation", "lookup", "copying")


def decision_accuracy(
    params: Any,
    model: ModelConfig,
    chat: ChatFormat,
    tasks: Sequence[Task],
    system_prompt: str,
    length: int = 512,
    rows: int = 16,
) -> dict[str, tuple[int, int]]:
    """decision -> (tokens predicted right by the argmax, tokens)."""
    kinds = _word_kinds(chat)
    tokens, labels = [], []
    for task in tasks:
        ids, label = _labelled(chat, task, system_prompt, kinds)
        if len(ids) <= length:
            tokens.append(np.pad(ids, (0, length - len(ids))))
            labels.append(np.pad(label, (0, length - len(ids)), constant_values=-1))
    while len(tokens) % rows:
        tokens.append(np.zeros(length, np.int32))
        labels.append(np.full(length, -1))
    counts: dict[str, tuple[int, int]] = dict.fromkeys(DECISIONS, (0, 0))
    for start in range(0, len(tokens), rows):
        batch, label = (
            np.stack(tokens[start : start + rows]),
            np.stack(labels[start : start + rows]),
        )
        right = np.asarray(_argmax(params, model, batch))[:, :-1] == batch[:, 1:]
        for code, name in enumerate(DECISIONS):
            here = label[:, 1:] == code
            r, n = counts[name]
            counts[name] = (r + int(right[here].sum()), n + int(here.sum()))
    return counts


def _argmax(params: Any, model: ModelConfig, tokens: np.ndarray) -> jax.Array:
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return _predict(params, model, tokens, positions, np.ones(tokens.shape, np.int32))


@partial(jax.jit, static_argnums=1)
def _predict(params: Any, model: ModelConfig, *arrays: jax.Array) -> jax.Array:
    return forward(params, model, *arrays).argmax(axis=-1)


def _word_kinds(chat: ChatFormat) -> dict[int, str]:
    """token id -> 'relation' | 'name' for tokens that are whole words of the world."""
    kinds: dict[int, str] = {}
    for words, kind in (
        ([f"{r} " for r in RELATIONS], "relation"),
        ([f"{f} " for f in FIRST] + list(SECOND), "name"),
    ):
        for word in words:
            ids = chat.encode_text(word)
            if len(ids) == 1:
                kinds[int(ids[0])] = kind
    return kinds


def _labelled(
    chat: ChatFormat, task: Task, system_prompt: str, kinds: dict[int, str]
) -> tuple[np.ndarray, np.ndarray]:
    """ids i32[T] of the flawless episode and, for what the agent writes, the decision's index.

    A name behind a relation word of the same message is a lookup, any other name is copied.
    """
    world = search_index(config_of(task.meta)).world
    messages = demonstration(task, world, rng=random.Random(0)).messages
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    segment = chat.demo_segment(system + messages, SCHEMAS)
    labels = np.full(len(segment), -1)
    behind_relation = False
    for t in np.flatnonzero(segment.provenance == Provenance.DEMO):
        kind = kinds.get(int(segment.ids[t]))
        if kind == "relation":
            labels[t], behind_relation = 1, True
        elif kind == "name":
            labels[t] = 2 if behind_relation else 3
        else:
            labels[t], behind_relation = 0, False
    return segment.ids, labels
