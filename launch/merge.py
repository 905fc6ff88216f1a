"""Merges checkpoints by a recipe in mergekit's YAML.

    python launch/merge.py recipe.yaml merged/
    python launch/merge.py recipe.yaml --plan

Models are directories (relative to here or to the recipe) or repositories of the local Hub cache;
`model+adapter` adds a LoRA adapter first (docs/adapters.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agentcpm_jax.merge.plan import ProgressLine, plan_merge
from agentcpm_jax.merge.recipe import COMPAT, load_recipe
from agentcpm_jax.merge.streaming import merge_checkpoints
from agentcpm_jax.types import UserError


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 when the recipe or a checkpoint is wrong."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("recipe", type=Path, help="YAML file")
    parser.add_argument("out", type=Path, nargs="?", help="directory to write; must not exist yet")
    parser.add_argument(
        "--plan", action="store_true", help="show what would be done; write nothing"
    )
    compat = f"{COMPAT}: its formulas and quirks; in 16 bits its rounding only nearly (README)"
    parser.add_argument("--compat", default="", help=compat)
    parser.add_argument("--seed", type=int, default=0, help="of random masks (default 0)")
    args = parser.parse_args(argv)
    if args.out is None and not args.plan:
        parser.error("out is missing: the directory to write")
    try:
        recipe = load_recipe(args.recipe, args.compat)
        roots, out = (Path(), args.recipe.parent), args.out or Path()
        if args.plan:
            print(plan_merge(recipe, roots, out, args.seed).text())
            return 0
        line = ProgressLine(sys.stderr)
        result = merge_checkpoints(recipe, out, roots, progress=line.show, seed=args.seed)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    print(result.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
