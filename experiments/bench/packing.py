"""How much of a forward pass is padding, on the quickstart's mix of row lengths.

    python experiments/bench/packing.py                           # the committed lengths, seconds
    python experiments/bench/packing.py --log runs/quickstart/experience.db --save

The lengths are those of the rows that RL batches of a quickstart run were made of, after prefix
merging (experiments/bench/packing_lengths.json: for each run and batch, how many rows had which
length; `--save` adds the run of `--log`). Each batch is packed as the trainer packs it; tokens are
counted in the micro-batches that the step makes a pass over: those with at least one token.

Writes experiments/results/packing.{json,md}; exits 1 when the quickstart's shape fills less than
95 %.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np

from agentcpm_jax.data.pack import forward_fill, pack
from agentcpm_jax.data.rows import shipped_rows, text_row
from agentcpm_jax.log.experience import ExperienceLog

LENGTHS = Path(__file__).with_name("packing_lengths.json")
RESULTS = ROOT / "experiments" / "results"
LIMIT = 0.95
#: (row_length, rows, micro_rows): compared beside the quickstart's own.
SHAPES = ((384, 8, 8), (384, 48, 1), (448, 48, 1), (504, 32, 1), (504, 32, 2), (512, 32, 1))

Lengths = Sequence[Sequence[int]]  # of the rows, by batch


def main() -> int:
    """Pack every recorded batch in every shape; say whether the quickstart's own holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log", default="", help="an experience log instead of the committed file")
    parser.add_argument("--stage", default="rl")
    parser.add_argument("--save", action="store_true", help="add its lengths to that file")
    parser.add_argument("--name", default="", help="of the run in that file; default: its folder")
    args = parser.parse_args()
    runs = read_lengths()
    if args.log:
        name = args.name or Path(args.log).resolve().parent.name
        mine = {name: lengths_of(args.log, args.stage)}
        if args.save:
            save_lengths(runs | mine)
        runs = mine
    own = quickstart_shape()
    table = [
        row_of(name, lengths, shape)
        for name, lengths in runs.items()
        for shape in dict.fromkeys((own, *SHAPES))
    ]
    holds = all(row["fill"] >= LIMIT for row in table if tuple(row["shape"]) == own)
    write(table, own, holds)
    return 0 if holds else 1


def quickstart_shape() -> tuple[int, int, int]:
    """(row_length, rows, micro_rows) of the quickstart's RL stage."""
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    shape = config.stage.rl.shape
    return shape.row_length, shape.rows, shape.micro_rows


def row_of(name: str, lengths: Lengths, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Fill and shapes of a run's batches, and how much attention work a token is paired with."""
    row_length, rows, micro_rows = shape
    tokens = cells = 0.0
    shapes, passes = set(), []
    for batch_lengths in lengths:
        texts = [text_row([1] * n) for n in batch_lengths]
        batch = pack(texts, row_length, row_multiple=rows, micro_rows=micro_rows).batch
        used = float((batch.segment_ids > 0).sum())
        forwarded = used / forward_fill(batch.segment_ids, micro_rows)
        tokens, cells = tokens + used, cells + forwarded
        shapes.add(batch.shape)
        passes.append(forwarded / row_length / (micro_rows or rows))
    return {
        "run": name,
        "shape": list(shape),
        "fill": tokens / cells,
        "compiled_shapes": len(shapes),
        "forward_tokens_per_batch": cells / len(lengths),
        "passes_per_batch": float(np.mean(passes)),
    }


def lengths_of(log: str, stage: str) -> list[list[int]]:
    """The row lengths of every batch that a log recorded."""
    with ExperienceLog.open(log) as experience:
        steps = range(experience.last_shipped_step(stage) + 1)
        return [[len(r) for r in shipped_rows(experience.shipped(stage, n))] for n in steps]


def read_lengths() -> dict[str, list[list[int]]]:
    """Run -> lengths, of the committed file."""
    if not LENGTHS.exists():
        return {}
    stored = json.loads(LENGTHS.read_text())
    return {
        name: [[int(n) for n, count in b.items() for _ in range(count)] for b in batches]
        for name, batches in stored.items()
    }


def save_lengths(runs: Mapping[str, Lengths]) -> None:
    """One line per run: a list of {length: rows}."""
    lines = [
        f"{json.dumps(name)}: {json.dumps([dict(sorted(Counter(b).items())) for b in batches])}"
        for name, batches in runs.items()
    ]
    LENGTHS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def write(table: Sequence[Mapping[str, Any]], own: tuple[int, int, int], holds: bool) -> None:
    """experiments/results/packing.{json,md}."""
    command = " ".join(["python experiments/bench/packing.py", *sys.argv[1:]])
    content = {
        "command": command,
        "versions": {"python": sys.version.split()[0], "numpy": np.__version__},
        "quickstart": list(own),
        "limit": LIMIT,
        "holds": holds,
        "table": list(table),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "packing.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [
        "# Padding in the quickstart's RL batches",
        "",
        f"`{command}`. The quickstart packs rows of {own[0]} tokens, {own[2]} to a pass, row "
        f"counts in multiples of {own[1]}; at least {LIMIT:.0%} of the tokens in forward passes "
        f"are not padding: {'held' if holds else 'MISSED'}.",
        "",
        "| run | row length | multiple of | rows to a pass | fill | shapes | tokens forwarded |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {r['run']} | {r['shape'][0]} | {r['shape'][1]} | {r['shape'][2]} | "
            f"{r['fill']:.1%} | {r['compiled_shapes']} | {r['forward_tokens_per_batch']:,.0f} |"
            for r in table
        ),
    ]
    (RESULTS / "packing.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
