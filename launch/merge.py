"""Merges checkpoints by a recipe in mergekit's YAML.

    python launch/merge.py recipe.yaml merged/

Relative model paths are looked for in the working directory, then beside the recipe.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agentcpm_jax.merge.recipe import load_recipe
from agentcpm_jax.merge.streaming import merge_checkpoints
from agentcpm_jax.types import UserError


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 when the recipe or a checkpoint is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="YAML file")
    parser.add_argument("out", type=Path, help="directory to write; must not exist yet")
    args = parser.parse_args(argv)
    try:
        recipe = load_recipe(args.recipe)
        result = merge_checkpoints(
            recipe, args.out, roots=(Path(), args.recipe.parent), progress=_show_progress
        )
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(
        f"{result.directory}: {result.tensors} tensors, {result.parameters:,} parameters, "
        f"{result.nbytes / 1e6:,.1f} MB"
    )
    return 0


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} tensors", end="\n" if done == total else "", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
