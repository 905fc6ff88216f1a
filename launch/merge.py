"""Merges checkpoints by a recipe in mergekit's YAML.

    python launch/merge.py recipe.yaml merged/
    python launch/merge.py recipe.yaml --plan

Models are directories (relative to here or to the recipe) or repositories of the local Hub cache;
`model+adapter` adds a LoRA adapter first (docs/adapters.md). Exit: 0, 2 a mistake, 130 interrupted.
"""

import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agentcpm_jax.types import UserError


def main(argv: list[str] | None = None) -> int:
    """Merge, or say why not; a signal may come while all the rest is still imported."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return merge(argv)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def merge(argv: list[str] | None) -> int:
    from agentcpm_jax.merge.recipe import COMPAT, load_recipe

    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML file")
    parser.add_argument("out", type=Path, nargs="?", help="directory to write; must not exist yet")
    parser.add_argument("--plan", action="store_true", help="show what would be done, no more")
    parser.add_argument("--compat", default="", help=f"{COMPAT}: as that tool, see README")
    parser.add_argument("--seed", type=int, default=0, help="of random masks (default 0)")
    args = parser.parse_args(argv)
    if args.out is None and not args.plan:
        parser.error("out is missing: the directory to write")
    recipe, roots = load_recipe(args.recipe, args.compat), (Path(), args.recipe.parent)
    from agentcpm_jax.merge import plan, streaming

    if args.plan:
        print(plan.plan_merge(recipe, roots, args.out or Path(), args.seed).text())
        return 0
    show = plan.ProgressLine(sys.stderr).show
    result = streaming.merge_checkpoints(recipe, args.out or Path(), roots, show, args.seed)
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    print(result.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
