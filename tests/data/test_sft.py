"""Demonstrations: assistant spans alone are trained, and a bad line is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from agentcpm_jax.chat.format import ChatFormat, template_text
from agentcpm_jax.data.sft import SFTDataConfig, conversation_rows, last_span, read_conversations
from agentcpm_jax.types import UserError

CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "kar"}}}
SEARCH = {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "who?"},
        {"role": "assistant", "content": "looking", "tool_calls": [CALL]},
        {"role": "tool", "content": "kar vel"},
        {"role": "assistant", "content": "<answer>vel</answer>"},
    ],
    "tools": [{"type": "function", "function": {"name": "search", "parameters": {}}}],
}
SHORT = {"messages": SEARCH["messages"][1:2] + SEARCH["messages"][4:]}
FIRST = (
    'looking\n<tool_call>\n{"name": "search", "arguments": {"query": "kar"}}\n</tool_call>'
    "<|im_end|>"
)
SECOND = "<answer>vel</answer><|im_end|>"


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    """One token per byte, and Qwen3's control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    return ChatFormat.from_parts(tokenizer, template_text("qwen3-instruct-2507"))


def write(path: Path, *lines: str | dict) -> str:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n")
    return str(path)


@pytest.mark.parametrize(("mask", "expected"), [("all", [FIRST, SECOND]), ("last", [SECOND])])
def test_assistant_spans_are_trained(chat, tmp_path, mask: str, expected: list[str]) -> None:
    conversations, bad = read_conversations(write(tmp_path / "a.jsonl", SEARCH))
    assert not bad
    (row,), counts = conversation_rows(conversations, chat, SFTDataConfig(mask=mask))
    assert counts == {"kept": 1}
    spans = np.split(row.ids, np.flatnonzero(np.diff(row.loss_mask)) + 1)
    trained = [chat.decode(span) for span in spans[1::2]]
    assert trained == expected
    assert not row.loss_mask[0]


def test_long_conversations_are_dropped_and_counted(chat, tmp_path) -> None:
    conversations, _ = read_conversations(write(tmp_path / "a.jsonl", SEARCH, SHORT, SEARCH))
    (short,), _ = conversation_rows(conversations[1:2], chat, SFTDataConfig())
    rows, counts = conversation_rows(conversations, chat, SFTDataConfig(max_length=len(short)))
    assert counts == {"kept": 1, "too_long": 2}
    np.testing.assert_array_equal(rows[0].ids, short.ids)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"messages": [', "not JSON"),
        ('["messages"]', "not a JSON object but list"),
        ('{"messages": "hello"}', 'not an object with a list "messages"'),
        ('{"messages": [{"role": "bot"}]}', r"messages\[0\] has role 'bot'"),
        ('{"messages": ["hello"]}', r"messages\[0\] has role None"),
        ('{"messages": [{"role": "user", "content": "q"}]}', "no assistant message"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "tools": "x"}', "list of objects"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line: str, complaint: str) -> None:
    path = write(tmp_path / "a.jsonl", SHORT, "", line, SHORT)
    with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{complaint}.*skip_bad"):
        read_conversations(path)
    conversations, bad = read_conversations(path, skip_bad=True)
    assert [c.where for c in conversations] == [f"{path}:1", f"{path}:4"]
    assert len(bad) == 1 and bad[0].startswith(f"{path}:3: ")


def test_bytes_that_are_not_utf8_are_named(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(SHORT).encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: not UTF-8 \(byte 14\)"):
        read_conversations(str(path))


def test_nothing_to_read_is_said(tmp_path) -> None:
    with pytest.raises(UserError, match="no such file: "):
        read_conversations(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="no usable conversation"):
        read_conversations(write(tmp_path / "a.jsonl", "{"), skip_bad=True)
    with pytest.raises(UserError, match=r"unknown data\.mask 'first'"):
        SFTDataConfig(mask="first")


def test_a_conversation_that_cannot_be_rendered_is_named_or_counted(chat, tmp_path) -> None:
    """It begins with an assistant's turn, which no template shows."""
    path = write(tmp_path / "a.jsonl", SHORT, {"messages": SHORT["messages"][-1:]})
    conversations, _ = read_conversations(path)
    with pytest.raises(UserError, match=r"a\.jsonl:2: it begins with an assistant's turn"):
        conversation_rows(conversations, chat, SFTDataConfig())
    rows, counts = conversation_rows(conversations, chat, SFTDataConfig(skip_bad=True))
    assert len(rows) == 1 and counts == {"kept": 1, "bad": 1}


def test_last_span() -> None:
    mask = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1, 0], bool)
    np.testing.assert_array_equal(np.flatnonzero(last_span(mask)), [7, 8])
    np.testing.assert_array_equal(np.flatnonzero(last_span(mask[:3])), [1, 2])
    assert not last_span(np.zeros(3, bool)).any()
