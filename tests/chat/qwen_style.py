"""A small tokenizer of Qwen3's kind: byte-level BPE, its split, its added tokens."""

from __future__ import annotations

import functools

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.trainers import BpeTrainer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>")
STRUCTURAL = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXT = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.",
    "system\n user\n assistant\n tool im_start im_end think tool_call tool_response answer",
    '{"type": "function", "function": {"name": "search", "description": "Search the web",',
    '"arguments": {"query": ["x"]}}\n The capital of Liechtenstein is Vaduz. 瓦杜兹 é',
)


@functools.cache
def qwen_style_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(_SPLIT), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=500, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in STRUCTURAL])
    return tokenizer
