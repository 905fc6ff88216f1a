"""Damaged and full disks at every writer, in whole runs: a named error or progress, nothing untrue.

    python experiments/disk_faults.py           # all; as root, who mounts small file systems
    python experiments/disk_faults.py --only=flip_state,full_hf

Real in every trial: launch/train.py on configs/tiny.py in lockstep, in a process of its own, on a
file system of its own (tmpfs). Small: the model, four steps of two groups. What each trial shows:

    damage  a run that stopped after step 3 is damaged; the same command either goes on, or ends
            with exit code 2 and one line; what the line says in brackets (rm, mv) is then done
    full    a file system has no room left, is read-only, limits the size of a file or fails; the
            same command ends with exit code 2 and one line that names the place; then it has room
    always  the same command then ends the run, and the weights are bit for bit those of a run that
            nothing happened to

Writes experiments/results/disk_faults.{json,md} after every trial; with --only the rows of the
others stay. Exits 1 when one is broken.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # a TPU library that is installed would say more
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch"), str(ROOT / "experiments")]

import disk_damages as damages
from disk_damages import Trial
from kill_points import RESULTS

FIX = re.compile(r"\(((?:rm|mv) [^)]*)\)")


def main() -> int:
    """Run the trials, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="names of trials, with commas between them")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of disk_faults.*")
    parser.add_argument("--compiled", type=Path, help="directory of programs compiled before")
    args = parser.parse_args()
    chosen = [t for t in damages.TRIALS if not args.only or t.name in args.only.split(",")]
    began, report = time.monotonic(), kept(args.out, [t.name for t in chosen])
    report["commands"].append(" ".join(["python", "experiments/disk_faults.py", *sys.argv[1:]]))
    before = report["seconds"]
    with tempfile.TemporaryDirectory(prefix="disks-") as scratch:
        mounts = any(trial.mounts for trial in chosen)
        place = damages.Place(Path(scratch), args.compiled or Path(scratch) / "compiled", mounts)
        try:
            begun, whole = place.prepare()
            for trial in chosen:
                report["trials"].append(run(trial, place, begun, whole))
                report["seconds"] = before + round(time.monotonic() - began)
                write(args.out, report)
        finally:
            place.close()
    print(table(report))
    return 1 if any(t["broken"] for t in report["trials"]) else 0


def kept(out: Path, names: list[str]) -> dict[str, Any]:
    """The report that is there, without the trials that are run again."""
    path = out / "disk_faults.json"
    if len(names) == len(damages.TRIALS) or not path.exists():
        return {"commands": [], "trials": [], "seconds": 0}
    report = json.loads(path.read_text())
    return report | {"trials": [t for t in report["trials"] if t["name"] not in names]}


def write(out: Path, report: dict[str, Any]) -> None:
    """Both files; trials in the order in which they are listed."""
    order = [trial.name for trial in damages.TRIALS]
    report["trials"].sort(key=lambda t: order.index(t["name"]))
    out.mkdir(parents=True, exist_ok=True)
    (out / "disk_faults.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "disk_faults.md").write_text(table(report))


def run(trial: Trial, place: damages.Place, begun: Path, whole: Path) -> dict[str, Any]:
    """One trial: what was said, what was done about it, and what is broken."""
    workdir = place.fresh(whole if trial.finished else begun if trial.begun else None)
    row: dict[str, Any] = {"name": trial.name, "writer": trial.writer, "said": "", "fix": ""}
    try:
        undo = trial.apply(workdir, place)
        code, said = place.start(workdir, trial)
        row |= {"said": said, "broken": wrong(trial, code, said)}
        if code and not row["broken"]:
            undo()
            if trial.begun and (fix := FIX.search(said)):
                row["fix"] = fix[1].replace(str(workdir), "W")
                subprocess.run(fix[1], shell=True, check=True)
            code, said = place.start(workdir)
        if code or sha(workdir) != sha(whole):
            row["broken"] = row["broken"] or f"then exit code {code}: {said[-400:]}"
    except Exception as error:
        row["broken"] = f"{type(error).__name__}: {error}"
    row["said"] = row["said"].replace(str(workdir), "W").replace(sys.executable, "python")
    place.clear()
    return row


def wrong(trial: Trial, code: int, said: str) -> str:
    """What is wrong with the end of the first start; empty when nothing is."""
    if trial.goes_on:
        return "" if code == 0 else f"exit code {code}: {said[-400:]}"
    if code != 2 or "\n" in said.strip() or not said.startswith("error: "):
        return f"exit code {code}: {said[-400:]}"
    return "" if trial.words in said else f"{trial.words!r} is not said: {said}"


def sha(workdir: Path) -> str:
    """Of the weights that a run ended with."""
    return hashlib.sha256((workdir / "rl" / "hf" / "model.safetensors").read_bytes()).hexdigest()


def table(report: dict[str, Any]) -> str:
    """Markdown: a line for every trial."""
    lines = ["# Damaged and full disks", "", *(f"`{c}`" for c in report["commands"]), ""]
    lines += [str(__doc__).split("\n\n")[2].strip(), "", str(__doc__).split("\n\n")[3], ""]
    lines += [
        "| trial | what is hit | what is said (W: the workdir) | fix | broken |",
        "|" + "---|" * 5,
    ]
    lines += [
        f"| {t['name']} | {t['writer']} | {t['said'].strip() or 'goes on'} | {t['fix'] or 'room'} "
        f"| {t['broken'] or 'no'} |"
        for t in report["trials"]
    ]
    broken = sum(bool(t["broken"]) for t in report["trials"])
    lines += ["", f"{len(report['trials'])} trials, {broken} broken, {report['seconds']} s."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
