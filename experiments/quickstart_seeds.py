"""The quickstart in several seeds, and what may be claimed from it.

    python experiments/quickstart_seeds.py                 # three seeds, about 45 minutes
    python experiments/quickstart_seeds.py --seeds 0       # one

Finished seeds are not run again. Writes experiments/results/quickstart_seeds.{json,md}; exits 1
when a claim does not hold in every seed.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
DECODINGS = ("sampled", "greedy")


def main() -> int:
    """Run what is missing, write the table, say which claims hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "seeds")
    args = parser.parse_args()
    runs = {seed: run(seed, args.runs / str(seed)) for seed in args.seeds}
    claims = {seed: check(result["summary"]["eval"]) for seed, result in runs.items()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {"command": "python experiments/quickstart_seeds.py", "runs": runs, "claims": claims}
    (RESULTS / "quickstart_seeds.json").write_text(json.dumps(content, indent=1) + "\n")
    text = table(runs, claims)
    (RESULTS / "quickstart_seeds.md").write_text(text)
    print(text)
    return 0 if all(ok for row in claims.values() for ok in row.values()) else 1


def run(seed: int, workdir: Path) -> dict[str, Any]:
    """One quickstart as its user runs it; its figures, wall time and peak memory."""
    record = workdir / "run.json"
    if not record.exists():
        started = time.monotonic()
        command = [
            sys.executable,
            str(ROOT / "launch" / "train.py"),
            "--config=configs/quickstart.py",
            f"--config.seed={seed}",
            f"--workdir={workdir}",
        ]
        subprocess.run(command, check=True)
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        summary = json.loads((workdir / "summary.json").read_text())
        figures = {
            "summary": summary,
            "wall_seconds": round(time.monotonic() - started, 1),
            "cpu_seconds_of_all_seeds_so_far": round(usage.ru_utime + usage.ru_stime, 1),
            "peak_rss_gib": round(usage.ru_maxrss / 2**20, 2),
        }
        record.write_text(json.dumps(figures, indent=1) + "\n")
    return json.loads(record.read_text())


def check(models: dict[str, Any]) -> dict[str, bool]:
    """Each claim of the README, by name."""
    claims = {}
    for decode in DECODINGS:
        gain = models[f"rl - merge ({decode})"]
        claims[f"RL beats SFT-merge by 10 points, lower bound above 0 ({decode})"] = (
            gain["low"] > 0 and gain["value"] >= 0.10
        )
    general = {name: models[name]["general"]["value"] for name in ("base", "sft", "rl")}
    claims["SFT alone loses 15 points of general skill"] = general["base"] - general["sft"] >= 0.15
    claims["after merge and RL 85 % of the base's general skill"] = (
        general["rl"] >= 0.85 * general["base"]
    )
    claims["after merge and RL 90 % of SFT's greedy agent score"] = (
        models["rl"]["greedy"]["value"] >= 0.9 * models["sft"]["greedy"]["value"]
    )
    return claims


def table(runs: dict[int, Any], claims: dict[int, dict[str, bool]]) -> str:
    """Markdown: scores by seed and model, differences, claims."""
    lines = [
        "| seed | model | sampled, T=1 | greedy | hop 1 / hop 2 sampled | hop 1 / hop 2 greedy | "
        "general skill |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed, result in runs.items():
        models = result["summary"]["eval"]
        for name in ("base", "sft", "merge", "rl"):
            row = models[name]
            lines.append(
                f"| {seed} | {name} | {interval(row['sampled'])} | {interval(row['greedy'])} | "
                f"{kinds(row, 'sampled')} | {kinds(row, 'greedy')} | {interval(row['general'])} |"
            )
    lines += ["", "| seed | RL - SFT-merge, sampled | RL - SFT-merge, greedy | wall | peak RSS |"]
    lines.append("|---|---|---|---|---|")
    for seed, result in runs.items():
        models = result["summary"]["eval"]
        gains = [interval(models[f"rl - merge ({d})"], sign="+") for d in DECODINGS]
        seconds = result.get("wall_seconds")  # of a run that was not stopped in between
        wall = "-" if seconds is None else f"{seconds / 60:.1f} min"
        lines.append(
            f"| {seed} | {gains[0]} | {gains[1]} | {wall} | {result['peak_rss_gib']:.1f} GiB |"
        )
    lines += ["", "| claim | " + " | ".join(f"seed {s}" for s in claims) + " |"]
    lines.append("|---" * (1 + len(claims)) + "|")
    for name in next(iter(claims.values())):
        marks = " | ".join("holds" if row[name] else "**fails**" for row in claims.values())
        lines.append(f"| {name} | {marks} |")
    return "\n".join(lines) + "\n"


def interval(estimate: dict[str, float], sign: str = "") -> str:
    """`62.1 [58.0, 66.0]` in percent or points."""
    value, low, high = (100 * estimate[k] for k in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def kinds(row: dict[str, Any], decode: str) -> str:
    """Scores by number of hops."""
    found = row[f"{decode}_by_kind"]
    return " / ".join(f"{100 * found[kind]['value']:.1f}" for kind in sorted(found))


if __name__ == "__main__":
    sys.exit(main())
