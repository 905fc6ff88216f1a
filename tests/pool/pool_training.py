"""The quickstart's RL stage with its engine set to a pool, and what must hold afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentcpm_jax.log.experience import ExperienceLog
from tests.pool.served_models import trainer_logprobs

ROOT = Path(__file__).parents[2]
STEPS, ETA = 3, 1  # of configs/quickstart.py:smoke


def train_on(urls: Sequence[str], workdir: Path, *flags: str) -> list[dict[str, Any]]:
    """Runs the stage from the shipped agent; its metrics, a row per step."""
    command = [sys.executable, "launch/train.py", "--config=configs/quickstart.py:smoke"]
    command += [f"--workdir={workdir}", "--config.stages=('rl',)"]
    command += ["--config.stage.rl.init_from=shipped:sft"]
    command += [f"--config.stage.rl.pool.urls={tuple(urls)!r}"]
    command += ["--config.stage.rl.pool.keep_versions=9", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = (workdir / "rl" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def check_training(workdir: Path, rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Every trained token against the published weights that its version names; all gaps (nats)."""
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["pool/uncertain_tokens"] == 0
    # What was sampled is what is trained on: at the first step no ratio differs from one.
    assert abs(rows[0]["loss/ratio_max"] - 1) < 1e-4
    assert rows[0]["loss/kl_behavior_k3"] < 1e-8
    (root,) = (workdir / "rl" / "pool_weights").iterdir()
    published = sorted((root / "weights").iterdir())
    assert [p.name for p in published] == [f"v{v:06d}" for v in range(STEPS + 1)]
    card = (published[-1] / "README.md").read_text()
    assert "made from shipped:sft | model.safetensors | `" in card  # with its hash
    gaps, ages, trained = [], [], set()
    with ExperienceLog.open(workdir / "experience.db") as log:
        batches = [log.shipped("rl", step) for step in range(STEPS)]
    for step, batch in enumerate(batches):
        assert batch
        for segment in (s.segment for s in batch):
            sampled = segment.sampled
            ages.append(step - segment.version[sampled].min())
            for version in np.unique(segment.version[sampled]):
                trained.add(int(version))
                mine = sampled & (segment.version == version)
                said = trainer_logprobs(str(published[version]))(segment.ids)
                gaps.append(np.abs(segment.logprob - said)[mine])
    assert max(ages) <= ETA and trained > {0}
    return np.concatenate(gaps)
