"""Converts orbax checkpoints to Hugging Face directories, and back.

    python launch/convert.py runs/rl/rl/checkpoints agent/ --dtype=bfloat16
    python launch/convert.py checkpoints/Qwen3-4B-Thinking-2507 checkpoints/qwen3_orbax
    python launch/convert.py --parity agent/       # the same logits as transformers computes?

Tokenizer and chat template go along; what is written for people is a model card (README.md).
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agentcpm_jax.hf.shape import whole_model
from agentcpm_jax.run.start.signals import RESUMABLE, StopSignal, say
from agentcpm_jax.types import UserError


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 1: logits differ; 2: a directory is not what it should be; 130."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="a model, a stage's checkpoints, or one step")
    parser.add_argument("out", type=Path, nargs="?", help="directory to write")
    parser.add_argument("--step", type=int, help="of the checkpoints (default: the newest)")
    parser.add_argument("--tokenizer", default="", help="directory (default: of model or run)")
    parser.add_argument("--dtype", default="", choices=("", "float32", "bfloat16"))
    parser.add_argument("--parity", metavar="DIR", help="a model to compare; converts nothing")
    args = parser.parse_args(argv)
    if not args.parity and args.out is None:
        parser.error("name what to convert and the directory to write, or --parity=DIR")
    try:
        with StopSignal(answer=say, promise="the same command begins anew"):
            return work(args)
    except UserError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return RESUMABLE


def work(args: Namespace) -> int:
    if args.parity:
        directory, _ = whole_model(args.parity)  # a mistake is answered before jax is imported
        from agentcpm_jax.hf.parity import compare_logits

        found = compare_logits(directory)
        print(f"{args.parity}: {found.text()}")
        return 0 if found.same else 1
    from agentcpm_jax.run.inspect.convert import convert

    options = {"step": args.step, "tokenizer": args.tokenizer, "dtype": args.dtype}
    print(convert(Path(args.source), args.out, **options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
