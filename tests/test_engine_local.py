"""The in-process engine against the trainer's own forward pass."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentcpm_jax.engine.local import EngineConfig, LocalEngine
from agentcpm_jax.model import params as model_params
from agentcpm_jax.model.config import TINY
from agentcpm_jax.model.logprobs import token_logprobs
from agentcpm_jax.model.qwen3 import forward
from agentcpm_jax.rollout.policy import Completion, Finish, SampleRequest, SamplingParams

CFG = replace(TINY, width=32, num_layers=2, ffw=64, head_dim=16, vocab_size=64)
ENGINE = EngineConfig(
    slots=4, capacity=64, chunk=4, row_buckets=(2,), token_buckets=(8,), length_buckets=(24,)
)
STOP = 7


@pytest.fixture(scope="module")
def params():
    # A larger scale than the initial one, so that distributions are far from uniform.
    tree = model_params.init(jax.random.key(0), CFG)
    return jax.tree.map(lambda x: x * (3.0 if x.ndim > 1 else 1.0), tree)


def request(prompt, *, seed=0, new=12, temperature=1.0, rid="0-0-0/0/", stop=(STOP,)):
    return SampleRequest(
        rid, np.asarray(prompt, np.int32), new, SamplingParams(temperature, stop, (seed,))
    )


def trainer_logprobs(params, ids) -> np.ndarray:
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(ids)] = ids
    positions = np.arange(64, dtype=np.int32)[None]
    segments = (positions < len(ids)).astype(np.int32)
    arrays = map(jnp.asarray, (padded, positions, segments))
    return np.asarray(_trainer(params, CFG, *arrays))[0, : len(ids)]


_trainer = jax.jit(token_logprobs, static_argnums=1)


def run(engine: LocalEngine, requests) -> list[Completion]:
    async def together():
        return await asyncio.gather(*(engine.sample(r) for r in requests))

    return asyncio.run(together())


def prompts(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(8, 64, rng.integers(1, 30)) for _ in range(count)]


def test_logprobs_equal_the_trainers_for_many_requests_of_all_lengths(params):
    engine = LocalEngine(params, CFG, ENGINE, version=3)
    asked = [request(p, seed=i) for i, p in enumerate(prompts(11))]
    done = run(engine, asked)
    engine.close()
    for r, c in zip(asked, done, strict=True):
        assert c.finish in (Finish.STOP, Finish.LENGTH)
        expected = trainer_logprobs(params, [*r.prompt_ids, *c.ids])[len(r.prompt_ids) :]
        np.testing.assert_allclose(c.logprobs, expected, atol=1e-4)
        assert (c.versions == 3).all()
        assert (c.finish == Finish.STOP) == (c.ids[-1] == STOP)
        assert STOP not in c.ids[:-1]


def test_greedy_is_the_argmax_chain(params):
    engine = LocalEngine(params, CFG, ENGINE)
    (done,) = run(engine, [request([9, 10, 11], temperature=0.0, new=6, stop=())])
    engine.close()
    ids = [9, 10, 11]
    step = jax.jit(forward, static_argnums=1)
    for _ in range(6):
        tokens = jnp.zeros((1, 16), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids))
        where = jnp.arange(16, dtype=jnp.int32)[None], jnp.ones((1, 16), jnp.int32)
        ids.append(int(step(params, CFG, tokens, *where)[0, len(ids) - 1].argmax()))
    assert done.ids.tolist() == ids[3:]


def test_a_seed_reproduces_whatever_else_runs(params):
    alone = LocalEngine(params, CFG, ENGINE)
    (first,) = run(alone, [request([9, 10], seed=5)])
    alone.close()
    busy = LocalEngine(params, CFG, ENGINE)
    others = [request(p, seed=100 + i) for i, p in enumerate(prompts(6))]
    *_, again = run(busy, [*others, request([9, 10], seed=5)])
    busy.close()
    assert first.ids.tolist() == again.ids.tolist()


def test_deterministic_rows_are_equal_bit_for_bit_in_any_slot_and_company(params):
    cfg = replace(ENGINE, deterministic=True)
    seen = set()
    for company in range(4):
        engine = LocalEngine(params, CFG, cfg)
        others = [request(p, seed=100 + i) for i, p in enumerate(prompts(company))]
        *_, done = run(engine, [*others, request([9, 10, 11], seed=5)])
        engine.close()
        seen.add((done.ids.tobytes(), done.logprobs.tobytes()))
    assert len(seen) == 1


def test_the_next_turn_feeds_only_what_is_new_and_stays_exact(params):
    engine = LocalEngine(params, CFG, ENGINE)
    prompt = np.arange(8, 28)
    (first,) = run(engine, [request(prompt, new=4)])
    fed = engine.tokens_prefilled
    longer = np.concatenate([prompt, first.ids, [40, 41, 42]])
    (second,) = run(engine, [request(longer, seed=1, new=4)])
    engine.close()
    assert engine.tokens_prefilled - fed <= 4
    expected = trainer_logprobs(params, [*longer, *second.ids])[len(longer) :]
    np.testing.assert_allclose(second.logprobs, expected, atol=1e-4)


def test_new_weights_apply_between_chunks_and_every_token_names_its_version(params):
    other = jax.tree.map(lambda x: x * 1.1, params)
    engine = LocalEngine(params, CFG, ENGINE)

    async def swap_midway():
        task = asyncio.create_task(engine.sample(request([9, 10], new=60, stop=())))
        while engine.tokens_sampled < 8:
            await asyncio.sleep(0.001)
        engine.set_params(other, 1)
        return await task

    done = asyncio.run(swap_midway())
    engine.close()
    assert set(done.versions.tolist()) == {0, 1}
    assert (np.diff(done.versions) >= 0).all()
    for version, tree in ((0, params), (1, other)):
        exact = trainer_logprobs(tree, [9, 10, *done.ids])[2:]
        here = done.versions == version
        np.testing.assert_allclose(done.logprobs[here], exact[here], atol=1e-4)


def test_failures_are_completions(params):
    engine = LocalEngine(params, CFG, ENGINE)
    (too_long,) = run(engine, [request(np.arange(64) % 60)])
    assert too_long.finish == Finish.ERROR and "64 tokens" in too_long.error

    async def late():
        return await engine.sample(replace(request([9], new=60, stop=()), deadline=1e-6))

    assert asyncio.run(late()).finish == Finish.ABORT
    engine.close()
    (closed,) = run(engine, [request([9])])
    assert closed.finish == Finish.ERROR
