"""What checks from outside call. The code may move; these names, arguments and results stay.

Each is a few lines over the package. `test_adapters.py` holds the signatures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from agentcpm_jax import tree
from agentcpm_jax.chat.format import ChatFormat, template_text
from agentcpm_jax.chat.parse import parse_completion
from agentcpm_jax.data import sft
from agentcpm_jax.data.conversation import Conversation
from agentcpm_jax.hf.tokenizer import load_chat
from agentcpm_jax.records import FileRefused, Flaw
from agentcpm_jax.rollout.staleness import Admission
from agentcpm_jax.tasks.jsonl import each_task
from agentcpm_jax.types import UserError as UserError  # callers catch it

#: The tools that the cases of `parse` may call.
KNOWN_TOOLS = (
    *("search", "fetch_url", "visit", "PythonInterpreter", "execute_code"),
    *("query_table", "list_tools", "f"),
)


class NotOffered(Exception):
    """The package does not compute this; the text says why, or that it is not there yet."""


def render(
    tokenizer_dir: str | Path,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The chat template's text; `template`: a published name, or '' for the directory's own."""
    chat = _chat(tokenizer_dir, template)
    return chat.render(messages, tools or (), add_generation_prompt=add_generation_prompt)


def sft_rows(
    path: str | Path, tokenizer_dir: str | Path, template: str, **options: Any
) -> tuple[list[str], dict[str, int]]:
    """(one text a row with the trained spans in `[[ ]]`, {reason: count} of what was dropped).

    `options` are those of `SFTDataConfig`.
    """
    cfg = sft.SFTDataConfig(path=str(path), **options)
    chat = _chat(tokenizer_dir, template)
    conversations, bad = sft.read_conversations(str(path), cfg.skip_bad)
    rows, counts = sft.conversation_rows(conversations, chat, cfg)
    dropped = {reason: n for reason, n in counts.items() if reason != "kept"}
    if bad:
        dropped["bad"] = dropped.get("bad", 0) + len(bad)
    return [_marked(chat, row.ids, row.loss_mask) for row in rows], dropped


def read_sft(path: str | Path) -> list[dict[str, Any]]:
    """The conversations of a file as canonical records; a bad line is an error record."""
    return _records(
        _error(*found) if isinstance(found, tuple) else _conversation(found)
        for found in sft.each_conversation(str(path))
    )


def read_tasks(path: str | Path) -> list[dict[str, Any]]:
    """The tasks of a file as canonical records; a bad line is an error record."""
    return _records(
        _error(line, found)
        if isinstance(found, Flaw)
        else {**found._asdict(), "answers": list(found.answers)}
        for line, found in each_task(path)
    )


def parse(text: str, style: str = "qwen") -> dict[str, Any]:
    """{"calls": [{"name", "arguments"} or {"error"}], "answer": text or None}."""
    if style != "qwen":
        raise NotOffered(f"style {style!r}: the parser reads 'qwen'")
    turn = parse_completion(text, KNOWN_TOOLS)
    calls = [
        {"error": c.error} if c.error else {"name": c.name, "arguments": c.arguments}
        for c in turn.calls
    ]
    return {"calls": calls, "answer": turn.answer}


def load(directory: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """({parameter path: array}, configuration) of a Hugging Face directory."""
    from agentcpm_jax.hf.load import load_hf

    params, cfg = load_hf(directory)
    arrays = {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}
    return arrays, dataclasses.asdict(cfg)


def logits(directory: str | Path, ids: Sequence[int]) -> np.ndarray:
    """float32[T, V]: the backbone's logits of one sequence."""
    import jax.numpy as jnp

    from agentcpm_jax.hf.load import load_hf
    from agentcpm_jax.model.qwen3 import forward

    params, cfg = load_hf(directory)
    tokens = jnp.asarray(ids, jnp.int32)[None]
    positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
    found = forward(params, cfg, tokens, positions, jnp.ones_like(tokens))
    return np.asarray(found[0], np.float32)


def advantages(case: Any) -> dict[str, Any]:
    """Outputs by name of a case of the RL oracle (`tests/golden/rl/compare.Case`)."""
    return _golden(case)


def loss(case: Any) -> dict[str, Any]:
    """As `advantages`: loss, gradient and what else the case's reference gives."""
    return _golden(case)


def admission(batch: int, max_staleness: int) -> Admission:
    """The staleness controller with as many groups at a time as the budget admits."""
    return Admission(batch, max_staleness, max_concurrent=2**31)


def window(case: Mapping[str, Any]) -> dict[str, Any]:
    """Context windows: schedules, edits and repeats of `case`."""
    raise NotOffered("context policies are not there yet")


def credit(case: Mapping[str, Any]) -> dict[str, Any]:
    """Credit per token, forks and weights of `case`."""
    raise NotOffered("credit rules beside the group's advantage are not there yet")


def _golden(case: Any) -> dict[str, Any]:
    from tests.golden.rl import table

    entry = table.TABLE.get(case.id.split("__")[0])
    if not isinstance(entry, table.Offered):
        raise NotOffered(getattr(entry, "reason", f"{case.id} is in no table"))
    return entry.fn({k: v.copy() for k, v in case.inputs.items()}, dict(case.meta["params"]))


def _chat(tokenizer_dir: str | Path, template: str) -> ChatFormat:
    if not template:
        return load_chat(tokenizer_dir)
    tokenizer = Tokenizer.from_file(str(Path(tokenizer_dir) / "tokenizer.json"))
    return ChatFormat.from_parts(tokenizer, template_text(template))


def _marked(chat: ChatFormat, ids: np.ndarray, trained: np.ndarray) -> str:
    text, before = "", False
    for token, mark in zip(ids, trained, strict=True):
        text += "[[" if mark and not before else "]]" if before and not mark else ""
        text += chat.decode([int(token)])
        before = bool(mark)
    return text + ("]]" if before else "")


def _records(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    try:
        return list(found)
    except FileRefused as refused:
        said = str(refused)
        return [{"error": refused.kind, "line": None, "key": None, "message": said}]


def _error(line: int, flaw: Flaw) -> dict[str, Any]:
    return {"error": flaw.kind, "line": line, "key": flaw.key, "message": str(flaw)}


def _conversation(found: Conversation) -> dict[str, Any]:
    if found.segments:
        return {"segments": [{"text": s.text, "train": s.train} for s in found.segments]}
    messages = [
        {
            "role": m.role,
            "content": m.content,
            "reasoning_content": m.reasoning,
            "tool_calls": [{"name": c.name, "arguments": c.arguments} for c in m.calls],
            "answers": m.answers,
            "train": m.train,
        }
        for m in found.messages
    ]
    kwargs = dict(found.template_kwargs)
    return {"messages": messages, "tools": list(found.tools), "template_kwargs": kwargs}
