"""3-hop questions, which no stage was trained on, for every model of a finished quickstart.

    python experiments/three_hops.py --workdir runs/quickstart

Writes experiments/results/three_hops.json: mean@1 with 95 % intervals over 100 tasks,
4 samples at temperature 1 and greedy. About two minutes on two cores.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]

from train import progress

from agentcpm_jax.config import EvalStage, Stage
from agentcpm_jax.evaluate.passk import estimate, mean_at_k
from agentcpm_jax.run.commandline import parse
from agentcpm_jax.run.context import open_context
from agentcpm_jax.run.evaluation import evaluate_model
from agentcpm_jax.run.observe.summary import scores_of
from agentcpm_jax.run.sampling import evaluation_tasks
from agentcpm_jax.run.start.signals import StopSignal

MODELS = ("base", "sft", "merge", "rl")


def main() -> None:
    """Evaluate, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--seed", type=int, default=0, help="the seed of that run")
    args = parser.parse_args()
    flags = ["--config=configs/quickstart.py", f"--config.seed={args.seed}"]
    config = parse(flags).config
    engine = next(s.eval.engine for s in config.stages if s.eval is not None)
    spec = EvalStage(models=MODELS, tasks=100, samples=4, skill_tasks=1, engine=engine)
    stage = Stage("three_hops", spec)
    table = {}
    ctx = open_context(config, args.workdir, progress, StopSignal())
    with ctx.log:
        tasks = evaluation_tasks(spec, replace(config.test_tasks, hops=(3,), per_world=4))
        for name in MODELS:
            result = evaluate_model(ctx, stage, name, ctx.load_params(f"stage:{name}"), tasks)
            table[name] = {
                decode: asdict(estimate(scores_of(result, decode), 1, mean_at_k))
                for decode in ("sampled", "greedy")
            }
            print(name, {k: round(v["value"], 3) for k, v in table[name].items()})
    content = {"command": "python experiments/three_hops.py", "models": table}
    out = ROOT / "experiments" / "results" / "three_hops.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
