"""The tiny tokenizer: whole words, short prompts, any text, and transformers reads it unchanged."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from agentcpm_jax.chat.format import template_text
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.tokenizer import load_chat
from agentcpm_jax.world.names import FIRST, RELATIONS, SECOND
from agentcpm_jax.world.tools import SCHEMAS
from agentcpm_jax.world.vocabulary import (
    QWEN3_ADDED_TOKENS,
    SYSTEM_PROMPT,
    build_tokenizer,
    vocabulary,
    write_tokenizer,
)
from configs.tiny import VOCABULARY

TOKENIZER = build_tokenizer()
MESSAGES = [
    {"role": "system", "content": SYSTEM_PROMPT},
    {"role": "user", "content": "What is the mayor of the founder of Bal Gem?"},
]


def test_ids_are_dense_and_fit_the_model() -> None:
    words = vocabulary()
    assert len(set(words)) == len(words)
    ids = sorted(TOKENIZER.get_vocab(with_added_tokens=True).values())
    assert ids == list(range(len(words) + len(QWEN3_ADDED_TOKENS)))
    assert len(ids) <= VOCABULARY


@pytest.mark.parametrize("where", ["{}", "of {}?", "founder {}\n", '"query": "{}"}}'])
def test_a_name_is_the_same_two_tokens_wherever_it_stands(where: str) -> None:
    for first, second in zip(FIRST, SECOND, strict=True):
        name = TOKENIZER.encode(f"{first} {second}").ids
        assert len(name) == 2
        text = TOKENIZER.encode(where.format(f"{first} {second}")).ids
        assert any(text[i : i + 2] == name for i in range(len(text)))


def test_relations_and_the_whole_prompt_are_short(tmp_path) -> None:
    for relation in RELATIONS:
        assert len(TOKENIZER.encode(f"{relation} ").ids) == 1
    write_tokenizer(tmp_path, template_text("qwen3-instruct-2507"))
    chat = load_chat(tmp_path)
    prompt = chat.prompt_ids(MESSAGES, SCHEMAS)
    assert len(prompt) <= 40
    assert (prompt < 256).sum() <= 1  # no words spelled in bytes; one newline between two tools


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_survives(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_tokenizers_load_in_transformers_and_agree(name: str) -> None:
    theirs = AutoTokenizer.from_pretrained(SHIPPED[name])
    ours = load_chat(SHIPPED[name])
    rendered = theirs.apply_chat_template(
        MESSAGES, tools=list(SCHEMAS), add_generation_prompt=True, tokenize=False
    )
    assert rendered == ours.render(MESSAGES, SCHEMAS)
    assert theirs(rendered, add_special_tokens=False)["input_ids"] == (
        ours.prompt_ids(MESSAGES, SCHEMAS).tolist()
    )
    assert theirs.eos_token == "<|im_end|>"
    assert theirs.convert_tokens_to_ids("<|im_end|>") == ours.im_end_id
