"""Which of our functions computes each reference case of other RL projects, and how closely.

    python experiments/rl_oracle.py [FOLDER]

FOLDER holds batches.npz, outputs.npz and index.json in the layout of tests/golden/rl (default: that
folder, 501 cases, recorded by running the peers' own functions). Writes
experiments/results/rl_oracle.{json,md} for the default folder; exits 1 when a case fails.
"""

from __future__ import annotations

import json
import platform
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from tests.golden.rl import compare
from tests.golden.rl.table import TABLE, NotOffered, Offered

RESULTS = ROOT / "experiments" / "results"


def main(argv: list[str]) -> int:
    folder = Path(argv[0]) if argv else compare.HERE
    rows = [check(case) for case in compare.load(folder)]
    for row in rows:
        if row["result"] == "fails":
            print(f"{row['id']}: {row['why']}")
    counts = Counter(row["result"] for row in rows)
    print(", ".join(f"{n} {what}" for what, n in counts.most_common()))
    if not argv:
        write(rows, counts)
    return int(counts["fails"] > 0)


def check(case: compare.Case) -> dict[str, str]:
    """One row of the table."""
    entry = TABLE.get(case.id.split("__")[0])
    row = {"id": case.id, "family": case.meta["family"], "source": case.meta["source"]}
    if isinstance(entry, NotOffered):
        return row | {"ours": "", "result": "not offered", "why": entry.reason}
    if entry is None:
        return row | {"ours": "", "result": "fails", "why": "not in the table"}
    assert isinstance(entry, Offered)
    wrong = compare.check(case, entry.fn)
    why = "; ".join(f"{name}: {what}" for name, what in wrong.items())
    return row | {"ours": entry.ours, "result": "fails" if wrong else "passes", "why": why}


def write(rows: list[dict[str, str]], counts: Counter[str]) -> None:
    """experiments/results/rl_oracle.json and .md."""
    about = {
        "command": "python experiments/rl_oracle.py",
        "python": platform.python_version(),
        "machine": platform.machine(),
        "jax": version("jax"),
        "counts": dict(counts),
    }
    text = json.dumps({"about": about, "cases": rows}, indent=0)
    (RESULTS / "rl_oracle.json").write_text(text + "\n")
    lines = [
        "# Losses, advantages and corrections against their peers",
        "",
        "Every reference case was recorded by running the named public function; ours is compared",
        "with it at the case's own tolerance (mostly 2e-5 relative, 2e-6 absolute), gradients",
        "included. Made by `python experiments/rl_oracle.py`, Python "
        f"{about['python']}, jax {about['jax']}, {about['machine']}.",
        "",
        ", ".join(f"**{n} {what}**" for what, n in counts.most_common()),
        "",
        "| case | peer's function | ours | result |",
        "|---|---|---|---|",
    ]
    for row in rows:
        result = row["result"] + (f": {row['why']}" if row["why"] else "")
        lines.append(f"| `{row['id']}` | `{row['source']}` | {row['ours']} | {result} |")
    (RESULTS / "rl_oracle.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
