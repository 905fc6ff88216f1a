"""Examine data before a run: rows kept and dropped with reasons, lengths, a row with its loss mask.

    python launch/data.py check conversations.jsonl --template=qwen3-hybrid --tokenizer=MODEL_DIR
    python launch/data.py check tasks.parquet --tasks

FILE: JSON lines, a JSON array, parquet or arrow, gzipped or not. --tokenizer: a Hugging Face
directory or model; --template: a published Qwen3 template instead of the directory's. Exit codes:
0 all is used, 1 some is dropped (each by name), 2 a mistake of yours.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agentcpm_jax.types import UserError


def main(argv: list[str]) -> int:
    """Parse, examine, print."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("command", choices=["check"])
    parser.add_argument("file")
    parser.add_argument("--tasks", action="store_true", help="questions with answers")
    parser.add_argument("--tokenizer", default="shipped:sft")
    parser.add_argument("--template", default="")
    parser.add_argument("--max_length", type=int, default=21_000)
    parser.add_argument("--mask", choices=["all", "last"], default="all")
    asked = parser.parse_args(argv)
    try:
        from agentcpm_jax.data import examine, sft

        if asked.tasks:
            found = examine.examine_tasks(asked.file, skip_bad=True)
        else:
            chat = chat_of(asked.tokenizer, asked.template)
            data = sft.SFTDataConfig(None, asked.max_length, asked.mask, skip_bad=True)
            found = examine.examine_conversations(asked.file, chat, data)[1]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(found.lines()))
    return 1 if found.dropped else 0


def chat_of(tokenizer: str, template: str):
    """A directory's tokenizer with its own template or a published one."""
    from agentcpm_jax.chat.format import ChatFormat, template_text
    from agentcpm_jax.hf.locate import find_model
    from agentcpm_jax.hf.tokenizer import load_chat, load_tokenizer

    if not template:
        return load_chat(tokenizer)
    return ChatFormat.from_parts(load_tokenizer(find_model(tokenizer)), template_text(template))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
