"""How far a server's log-probabilities are from the trainer's: engines, dtypes, pause modes.

    python experiments/bench/logprob_gap.py                          # the JAX server
    SGLANG_PYTHON=.venv-sglang/bin/python python experiments/bench/logprob_gap.py   # and SGLang

The trainer is the float32 forward pass. Gaps are |log-prob of the server - of the trainer| per
token (nats). `bfloat16 weights`: the JAX engine computes in float32 with weights that were rounded,
which is what publishing in bfloat16 adds; SGLang's bfloat16 rounds everything. Mismatch KL is the
estimate of KL(server || trainer) under the server's samples, mean of exp(d) - 1 - d with d =
trainer - server (http://joschu.net/blog/kl-approx.html, k3).
`in_place` and `retract` rows: tokens of a request after an update that happened under it.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import numpy as np

from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.engine.server import EngineServer, ServerConfig
from agentcpm_jax.engine.serving import ServedLocal
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.hf.save import save_hf
from agentcpm_jax.hf.tokenizer import load_chat
from tests.doubles.toy_pool import Servers
from tests.pool.contract_suite import PROMPT, Subject, in_flight
from tests.pool.real_sglang import sglang_servers
from tests.pool.served_models import CONTEXT, FIRST, VOCABULARY, trainer_logprobs, two_weights

OUT = ROOT / "experiments" / "results" / "logprob_gap"


def main() -> None:
    rows, weights = [], two_weights(Path(tempfile.mkdtemp()))
    running = Servers()
    for name, sent in (("float32", weights), ("bfloat16 weights", rounded(weights))):
        cfg = EngineConfig(slots=8, capacity=CONTEXT, row_buckets=(), token_buckets=(32,))
        served = ServedLocal(sent[0], cfg, "float32")
        chat = load_chat(FIRST)
        url = running.start(EngineServer(served, ServerConfig(port=0), chunk=16, chat=chat))
        rows += measure(replace(subject(url, weights), weights=sent), f"JAX engine, {name}")
        served.close()
    running.close()
    if os.environ.get("SGLANG_PYTHON"):
        for dtype in ("float32", "bfloat16"):
            logs = Path(tempfile.mkdtemp())
            with sglang_servers(str(FIRST), CONTEXT, 1, logs, dtype) as urls:
                rows += measure(subject(urls[0], weights), f"SGLang 0.5.23, {dtype} (CPU)")
    write(rows)


def rounded(weights: tuple[str, str]) -> tuple[str, str]:
    """The same weights as a trainer publishes them in bfloat16."""
    found = []
    for path in weights:
        params, cfg = load_hf(path)
        found.append(f"{tempfile.mkdtemp()}/weights")
        save_hf(found[-1], params, cfg, dtype="bfloat16", tokenizer_from=FIRST)
    return found[0], found[1]


def subject(url: str, weights: tuple[str, str]) -> Subject:
    logprobs = trainer_logprobs(weights[0]), trainer_logprobs(weights[1])
    chat = load_chat(FIRST)
    return Subject(url, CONTEXT, VOCABULARY, weights, logprobs, chat, 1e-5, True, "")


def measure(server: Subject, name: str) -> list[dict]:
    server.load(0, "g-0")
    rows = []
    for temperature in (0.0, 1.0):
        gaps = []
        for start in range(16):
            prompt = [start + 1, *PROMPT]
            answer = server.generate(64, temperature, input_ids=prompt)
            gaps.append(differences(server, answer, prompt, {"g-0": 0}))
        rows.append(row(name, f"temperature {temperature:g}", np.concatenate(gaps)))
    for mode in ("retract", "in_place"):
        after = 0
        while not after:  # a quick server may be done before it is paused
            server.load(0, "g-0")
            with in_flight(server, 900) as answers:
                server.post("/pause_generation", {"mode": mode})
                server.load(1, "g-1", flush=mode != "in_place")
                server.post("/continue_generation", {})
            after = answers[-1]["meta_info"]["weight_versions"][-1]["start"]
        d = differences(server, answers[-1], PROMPT, {"g-0": 0, "g-1": 1})
        rows.append(row(name, f"after an update, {mode}", d[after:]))
    return rows


def differences(server: Subject, answer: dict, prompt: list[int], names: dict) -> np.ndarray:
    """Trainer minus server, each token under the version stamped on it."""
    text = np.asarray([*prompt, *answer["output_ids"]], np.int32)
    found = np.asarray([r[0] for r in answer["meta_info"]["output_token_logprobs"]])
    expected = np.zeros(len(found))
    for span in answer["meta_info"]["weight_versions"]:
        part = slice(span["start"], span["end"])
        values = server.logprobs[names[span["version"]]](text)[len(prompt) :]
        expected[part] = values[part]
    return expected - found


def row(name: str, case: str, d: np.ndarray) -> dict:
    kl = float(np.mean(np.exp(d) - 1 - d))
    gaps = np.abs(d)
    return {"server": name, "case": case, "tokens": len(d), "max": float(gaps.max())} | {
        "mean": float(gaps.mean()),
        "mismatch_kl": kl,
    }


def write(rows: list[dict]) -> None:
    about = {
        "command": "python experiments/bench/logprob_gap.py",
        "model": "the shipped agent after SFT (3 layers, width 128), float32 trainer",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "jax": version("jax"),
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.with_suffix(".json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    lines = ["# Log-probabilities: server against trainer", ""]
    lines += [f"{key}: {value}  " for key, value in about.items()]
    lines += ["", "| server | case | tokens | largest gap | mean gap | mismatch KL |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for r in rows:
        numbers = f"{r['tokens']} | {r['max']:.2g} | {r['mean']:.2g} | {r['mismatch_kl']:.2g}"
        lines.append(f"| {r['server']} | {r['case']} | {numbers} |")
    OUT.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
