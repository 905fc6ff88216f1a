"""Rebuild the shipped tiny base: `make base`, or python experiments/make_base.py [--out DIR].

It is the base stage of configs/quickstart.py run from scratch: next-token training on the offline
world's pages and general skills, 3.1 M tokens, about ten minutes on two cores. The seed is 1: recall
emerges suddenly and not in every seed within this budget (with seed 0 it had not after 0.6 of the
first phase's steps).
"""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]

from train import progress

from agentcpm_jax.run.commandline import parse
from agentcpm_jax.run.stages import run_experiment


def main() -> None:
    """Train into a work directory, then copy the Hugging Face directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "agentcpm_jax" / "assets" / "tiny_base")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "make_base")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    flags = ["--config=configs/quickstart.py", "--config.base=scratch"]
    config = parse([*flags, f"--config.seed={args.seed}"]).config
    only_base = tuple(stage for stage in config.stages if stage.name == "base")
    run_experiment(
        dataclasses.replace(config, name="make_base", stages=only_base),
        args.workdir,
        progress=progress,
        announce=print,
    )
    shutil.rmtree(args.out, ignore_errors=True)
    shutil.copytree(args.workdir / "base" / "hf", args.out)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
