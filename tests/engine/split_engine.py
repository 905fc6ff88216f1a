"""Run by `test_engine_local`: an engine split over devices against one that is not."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from agentcpm_jax.engine import device
from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.engine.local import LocalEngine
from agentcpm_jax.model import params as model_params
from agentcpm_jax.model.config import TINY
from agentcpm_jax.rollout.policy import Completion, SampleRequest, SamplingParams

CFG = replace(TINY, width=32, num_layers=1, ffw=64, head_dim=16, vocab_size=64)
ENGINE = EngineConfig(slots=4, capacity=64, chunk=4, row_buckets=(), token_buckets=(16,))


def main() -> None:
    """Print the splits that agreed: ids, log-probabilities, one compilation per shape."""
    first, second = (model_params.init(jax.random.key(i), CFG) for i in range(2))
    expected, _ = play(ENGINE, first, second)
    agreed = []
    for tensor in (2, 4):
        device.decode.clear_cache()
        found, programs = play(replace(ENGINE, tensor=tensor), first, second)
        assert device.decode._cache_size() == sum(p[0] == "decode" for p in programs)
        for a, b in zip(expected, found, strict=True):
            assert a.ids.tolist() == b.ids.tolist(), (tensor, a, b)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        agreed.append(tensor)
    print(*agreed)


def play(cfg: EngineConfig, first: dict, second: dict) -> tuple[list[Completion], set[tuple]]:
    """A group, its next turns and, after new weights, the same again."""
    engine = LocalEngine(first, CFG, cfg)
    done: list[Completion] = []
    for version, params in enumerate((first, second)):
        engine.set_params(params, version)
        texts = [np.arange(8, 30 + i) for i in range(3)]
        for _ in range(2):
            asked = [
                SampleRequest(f"{i}/", text, 6, SamplingParams(1.0, (), (i,)))
                for i, text in enumerate(texts)
            ]
            new = asyncio.run(together(engine, asked))
            texts = [np.concatenate([t, c.ids, [3, 4]]) for t, c in zip(texts, new, strict=True)]
            done += new
    engine.close()
    assert engine.tokens_reused
    return done, engine.programs


async def together(engine: LocalEngine, asked: list[SampleRequest]) -> list[Completion]:
    return list(await asyncio.gather(*(engine.sample(r) for r in asked)))


if __name__ == "__main__":
    main()
