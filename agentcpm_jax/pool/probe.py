"""Is this server what the trainer thinks it is? Questions that only the right answer passes.

Asked of every worker before it gets a request: does it speak the trainer's vocabulary and chat
template, does it hold the run's weights, and do its log-probabilities mean what the trainer's mean?
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.pool.protocol import Chunk
from agentcpm_jax.pool.worker import Server

PROMPTS, TOKENS = 4, 8  # of a fingerprint: prompts, and greedy tokens of each
CONVENTION_TEMPERATURE = 0.7

# Without tools: SGLang 0.5.23 writes a key of its own into each schema before it renders them.
_MESSAGES = (
    {"role": "system", "content": "Answer from the pages. 2 + 2 = 4."},
    {"role": "user", "content": "Who wrote it,\nand when?  Naïve café."},
    {"role": "assistant", "content": "I do not know yet."},
    {"role": "user", "content": "Look again."},
)

#: What two models have to share, or the weights of one do not fit into the other.
_SHAPE = (
    *("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
)

#: i32[T] -> f32[T]: log p(token t | the tokens before t) at index t, temperature 1.
Logprobs = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Trainer:
    """What the workers are held against. Without `chat` no text is compared."""

    vocab_size: int  # ids that the trainer has rows for
    chat: ChatFormat | None = None
    logprobs: Logprobs | None = None  # of the weights that the pool starts with
    temperature: float = 1.0  # at which the run samples
    config: Mapping[str, Any] = field(default_factory=dict)  # config.json of the run's model


class Mismatch(Exception):
    """The server is not what the trainer needs; one line says what differs and what to do."""


@dataclass(frozen=True)
class Answer:
    """A probe prompt and what a server made of it."""

    prompt: np.ndarray  # i32[P]
    chunk: Chunk


def probe_prompts(vocab_size: int) -> list[np.ndarray]:
    """Fixed random prompts; the last one ends with the highest id there is."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocab_size, 12).astype(np.int32) for _ in range(PROMPTS)]
    prompts[-1][-1] = vocab_size - 1
    return prompts


def gap_to_trainer(answers: Sequence[Answer], logprobs: Logprobs) -> float:
    """Mean |log-prob of the server - of the trainer| over all tokens of the answers (nats)."""
    gaps = [
        np.abs(
            a.chunk.logprobs - logprobs(np.concatenate([a.prompt, a.chunk.ids]))[len(a.prompt) :]
        )
        for a in answers
    ]
    flat = np.concatenate(gaps)
    return float(flat.mean()) if len(flat) else float("inf")


def gap_between(first: Sequence[Answer], second: Sequence[Answer]) -> float:
    """The same between two servers, over the ids that both sampled greedily.

    Two right servers may part at a near-tie; if less than a quarter is common, it is another model.
    """
    gaps, total = [], 0
    for a, b in zip(first, second, strict=True):
        shortest = min(len(a.chunk.ids), len(b.chunk.ids))
        differ = np.flatnonzero(a.chunk.ids[:shortest] != b.chunk.ids[:shortest])
        common = int(differ[0]) if len(differ) else shortest
        gaps.append(np.abs(a.chunk.logprobs[:common] - b.chunk.logprobs[:common]))
        total += len(a.chunk.ids)
    flat = np.concatenate(gaps)
    return float(flat.mean()) if len(flat) and 4 * len(flat) >= total else float("inf")


def check_model(server: Server, info: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Before any weights are sent: SGLang 0.5 does not survive those of another shape.

    Compares what `/model_info` says, and the served directory's config.json where this machine
    sees it, with the run's own. Raises `Mismatch`.
    """
    served = {key: info[key] for key in _SHAPE if info.get(key)}
    file = Path(str(info.get("model_path"))) / "config.json"
    if file.is_file():
        served |= json.loads(file.read_text())
    for key in _SHAPE:
        if key in served and key in config and served[key] != config[key]:
            raise Mismatch(
                f"wrong model on {server.url}: {info.get('model_path')} has {key} {served[key]}, "
                f"the run's model {config[key]}; serve the run's model"
            )


async def check_text(server: Server, chat: ChatFormat) -> str:
    """The server's tokenizer and template against the trainer's; the template's hash.

    'unverified' where the server has no /tokenize route. Raises `Mismatch`.
    """
    for message in _MESSAGES:
        text = message["content"]
        found = await server.tokenize({"prompt": text, "add_special_tokens": False})
        if found is None:
            return "unverified"
        expected = chat.encode_text(text).tolist()
        if found != expected:
            raise Mismatch(
                f"vocabulary mismatch: {server.url} reads {text[:24]!r} as {found[:8]}..., the "
                f"trainer as {expected[:8]}...; give the server the run's tokenizer"
            )
    ours = chat.prompt_ids(_MESSAGES).tolist()
    theirs = await server.tokenize({"messages": list(_MESSAGES)})
    if theirs != ours:
        raise Mismatch(
            f"chat template mismatch: {server.url} has template hash {_hash(theirs or [])}, the "
            f"trainer {_hash(ours)}; give the server the run's chat_template.jinja"
        )
    return _hash(ours)


def check_gap(server: Server, gap: float, allowed: float, against: str) -> None:
    """Raises `Mismatch` when the weights of a server are not those expected."""
    if not gap <= allowed:  # also when it is not a number
        raise Mismatch(
            f"version mismatch: {server.url} holds other weights than it says: its log-probs are "
            f"{gap:.3g} nats from {against} (pool.max_gap={allowed:g})"
        )


def check_temperature(
    server: Server, temperature: float, gap: float, allowed: float, convention: str
) -> None:
    """Raises `Mismatch` when log-probs at the run's temperature are not the trainer's."""
    if gap <= allowed:
        return
    raise Mismatch(
        f"log-prob convention: {server.url} is {gap:.3g} nats from the trainer at temperature "
        f"{temperature:g} ({convention}; pool.max_gap={allowed:g}); sample at temperature 1 or "
        "start SGLang with SGLANG_RETURN_ORIGINAL_LOGPROB=1"
    )


def _hash(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(ids, np.int32).tobytes()).hexdigest()[:12]
