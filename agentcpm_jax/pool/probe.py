"""Checks that a server's model, tokenizer and log-probabilities are those the trainer expects.

Every worker must pass them before it gets a request: same vocabulary and chat template, the run's
weights, and log-probabilities under the trainer's convention.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.pool.errors import shown
from agentcpm_jax.pool.fields import Fields
from agentcpm_jax.pool.protocol import Chunk
from agentcpm_jax.pool.worker import Server, asked
from agentcpm_jax.records import parse_json

PROMPTS, TOKENS = 4, 8  # of a fingerprint: number of prompts, greedy tokens per prompt
CONVENTION_TEMPERATURE = 0.7
CONFIG_BYTES = 1 << 20  # a larger config.json is none

# Without tools: SGLang 0.5.23 writes a key of its own into each schema before it renders them.
_MESSAGES = (
    {"role": "system", "content": "Answer from the pages. 2 + 2 = 4."},
    {"role": "user", "content": "Who wrote it,\nand when?  Naïve café."},
    {"role": "assistant", "content": "I do not know yet."},
    {"role": "user", "content": "Look again."},
)

#: Keys of config.json that must be equal for the run's weights to fit the served model.
_SHAPE = (
    *("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
)

#: i32[T] -> f32[T]: log p(token t | the tokens before t) at index t, temperature 1.
Logprobs = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Trainer:
    """What the workers are compared with. Without `chat` no text is compared."""

    vocab_size: int  # rows of the trainer's embedding
    chat: ChatFormat | None = None
    logprobs: Logprobs | None = None  # of the weights that the pool starts with
    temperature: float = 1.0  # at which the run samples
    config: Mapping[str, Any] = field(default_factory=dict)  # config.json of the run's model


class Mismatch(Exception):
    """The server is not what the trainer needs; one line says what differs and what to do."""


@dataclass(frozen=True)
class Answer:
    """A probe prompt and a server's completion of it."""

    prompt: np.ndarray  # i32[P]
    chunk: Chunk


def probe_prompts(vocab_size: int) -> list[np.ndarray]:
    """Fixed random prompts, i32[12] each; the last one ends with the highest id."""
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
    """Mean |log-prob difference| of two servers over their common greedy ids (nats).

    Equal models may diverge at a near-tie; with less than a quarter in common the gap is infinite.
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


def check_model(server: Server, info: Fields, config: Mapping[str, Any]) -> None:
    """Compare the served model's shape with the run's `config`; raises `Mismatch`.

    Run it before sending weights: SGLang 0.5 exits on weights of another shape. The served shape
    is from `/model_info`, and from the served config.json where this machine can read it.
    """
    served = {key: info.values[key] for key in _SHAPE if info.values.get(key)}
    path = info.text("model_path") or ""
    served |= _served_config(path)
    for key in _SHAPE:
        if key in served and key in config and served[key] != config[key]:
            raise Mismatch(
                f"wrong model on {server.url}: {shown(path)} has {key} {shown(served[key])}, "
                f"the run's model {config[key]}; serve the run's model"
            )


def _served_config(path: str) -> dict[str, Any]:
    """The config.json below a path that a server named; empty where there is none to compare."""
    file = Path(path) / "config.json"
    try:
        whole = file.is_file() and file.stat().st_size <= CONFIG_BYTES
        found = parse_json(file.read_bytes()) if whole else None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


async def check_text(server: Server, chat: ChatFormat) -> str:
    """Compare the server's tokenizer and template with the trainer's; returns the template's hash.

    Returns 'unverified' where the server has no /tokenize route. Raises `Mismatch`.
    """
    for message in _MESSAGES:
        text = message["content"]
        plain = {"prompt": text, "add_special_tokens": False}
        found = await asked(partial(server.tokenize, plain))
        if found is None:
            return "unverified"
        expected = chat.encode_text(text).tolist()
        if found != expected:
            raise Mismatch(
                f"vocabulary mismatch: {server.url} reads {text[:24]!r} as {found[:8]}..., the "
                f"trainer as {expected[:8]}...; give the server the run's tokenizer"
            )
    ours = chat.prompt_ids(_MESSAGES).tolist()
    theirs = await asked(partial(server.tokenize, {"messages": list(_MESSAGES)}))
    if theirs != ours:
        raise Mismatch(
            f"chat template mismatch: {server.url} has template hash {_hash(theirs or [])}, the "
            f"trainer {_hash(ours)}; give the server the run's chat_template.jinja"
        )
    return _hash(ours)


def check_gap(server: Server, gap: float, allowed: float, against: str) -> None:
    """Raises `Mismatch` when `gap` (nats) exceeds `allowed`: the server holds other weights."""
    if not gap <= allowed:  # also when it is NaN
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
