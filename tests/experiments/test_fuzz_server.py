"""Hostile bodies end neither a server nor an answer of it: some here, all of them in a tier."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "experiments"))

import fuzz_server

from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.tokenizer import load_chat
from tests.doubles.fault_server import FaultServer, ToyEngine
from tests.doubles.toy_pool import Servers


def test_a_body_is_decided_by_its_number_and_the_seed():
    some = [fuzz_server.body(i, 0) for i in range(50)]
    assert some == [fuzz_server.body(i, 0) for i in range(50)]
    assert some != [fuzz_server.body(i, 1) for i in range(50)]


def test_a_few_hundred_bodies_over_the_toy(monkeypatch):
    monkeypatch.setitem(fuzz_server.RIGHT, "/update_weights_from_disk", {"model_path": "nowhere"})

    async def all_of_them(url: str) -> list[str]:
        broken = []
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
            for number in range(300):
                path, raw = fuzz_server.body(number, 1)
                status, problem = await fuzz_server.send(client, path, raw, leaves=number % 4 == 0)
                broken += [f"{path} {status} {problem}: {raw[:200]!r}"] if problem else []
                await client.post("/continue_generation")
        return broken

    running = Servers()
    try:
        server = FaultServer(ToyEngine(544, 384), chat=load_chat(SHIPPED["shipped:sft"]))
        assert asyncio.run(all_of_them(running.start(server))) == []
    finally:
        running.close()


@pytest.mark.faults
def test_five_thousand_bodies_over_the_engine(tmp_path):
    command = [sys.executable, "experiments/fuzz_server.py", "--n=5000", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=fuzz_server.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
