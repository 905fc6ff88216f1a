"""The tiny tokenizer: Qwen3's special tokens, and every word of the offline world kept whole.

A tiny model learns in minutes to copy what followed the same token earlier, so a name must be two
tokens everywhere. Words that another word follows carry their trailing space ("Kar " + "Vel");
fixed text of the chat template and of the tool schemas is one token per phrase. Everything else
falls back to bytes, so any text round-trips. The files load in `AutoTokenizer`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentcpm_jax.world.names import FIRST, RELATIONS, SECOND
from agentcpm_jax.world.tools import SCHEMAS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Qwen3's added tokens in the order of their ids; True = special in the tokenizer's sense.
QWEN3_ADDED_TOKENS: tuple[tuple[str, bool], ...] = (
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<|object_ref_start|>", True),
    ("<|object_ref_end|>", True),
    ("<|box_start|>", True),
    ("<|box_end|>", True),
    ("<|quad_start|>", True),
    ("<|quad_end|>", True),
    ("<|vision_start|>", True),
    ("<|vision_end|>", True),
    ("<|vision_pad|>", True),
    ("<|image_pad|>", True),
    ("<|video_pad|>", True),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<|fim_prefix|>", False),
    ("<|fim_middle|>", False),
    ("<|fim_suffix|>", False),
    ("<|fim_pad|>", False),
    ("<|repo_name|>", False),
    ("<|file_sep|>", False),
    ("<tool_response>", False),
    ("</tool_response>", False),
    ("<think>", False),
    ("</think>", False),
)

SYSTEM_PROMPT = "Answer with the tools."
NUMBERS = tuple(f"{n} " for n in range(32))
SKILL_WORDS = ("recall ", "sort ", "add ", "repeat ", "= ", "\n")

_BEFORE_TOOLS = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_AFTER_TOOLS = (
    "\n</tools>\n\nFor each function call, return a json object with function name and "
    "arguments within "
)
_PHRASES: tuple[str, ...] = (
    "system\n",
    "user\n",
    "assistant\n",
    SYSTEM_PROMPT,
    _BEFORE_TOOLS,
    _AFTER_TOOLS,
    " XML tags:\n",
    '\n{"name": <function-name>, "arguments": <args-json-object>}\n',
    '\n{"name": "search", "arguments": {"query": "',
    '\n{"name": "visit", "arguments": {"title": "',
    '"}}\n',
    "<answer>",
    "</answer>",
    "What is the ",
    "of the ",
    "of ",
    "?",
    "\n\n",
)


def vocabulary() -> list[str]:
    """Model vocabulary in id order, without the added tokens: 256 bytes, then words and phrases."""
    tools = [json.dumps(s, ensure_ascii=False) for s in SCHEMAS]
    words = [f"{w} " for w in FIRST] + list(SECOND) + [f"{r} " for r in RELATIONS]
    return [f"<0x{b:02X}>" for b in range(256)] + list(
        dict.fromkeys([*SKILL_WORDS, *NUMBERS, *words, *_PHRASES, *tools])
    )


def build_tokenizer() -> Tokenizer:
    """A whole-word tokenizer with byte fallback: ids 0..len(vocabulary())-1, then added tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = vocabulary()
    longest_first = sorted(vocab[256:], key=len, reverse=True)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(vocab)},
            merges=[],
            byte_fallback=True,
            ignore_merges=True,
        )
    )
    pattern = "|".join(re.escape(word) for word in longest_first)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens(
        [AddedToken(t, special=special, normalized=False) for t, special in QWEN3_ADDED_TOKENS]
    )
    return tokenizer


def write_tokenizer(directory: str | Path, chat_template: str) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `directory`."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(path / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (path / "chat_template.jinja").write_text(chat_template)
