"""The in-process engine against the trainer's own forward pass."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agentcpm_jax.engine import device, local, weights
from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.engine.local import LocalEngine
from agentcpm_jax.model import params as model_params
from agentcpm_jax.model.config import TINY
from agentcpm_jax.model.logprobs import token_logprobs
from agentcpm_jax.model.qwen3 import forward
from agentcpm_jax.rollout.policy import Completion, Finish, SampleRequest, SamplingParams
from agentcpm_jax.types import UserError

CFG = replace(TINY, width=32, num_layers=2, ffw=64, head_dim=16, vocab_size=64)
ENGINE = EngineConfig(slots=4, capacity=64, chunk=4, row_buckets=(), token_buckets=(8,))
STOP = 7


@pytest.fixture(autouse=True)
def prompts_are_fed_in_parts(monkeypatch):
    monkeypatch.setattr(local, "PREFILL_TOKENS", 32)


@pytest.fixture(scope="module")
def params():
    # A larger scale than the initial one, so that distributions are far from uniform.
    tree = model_params.init(jax.random.key(0), CFG)
    return jax.tree.map(lambda x: x * (3.0 if x.ndim > 1 else 1.0), tree)


def request(prompt, *, seed=0, new=12, temperature=1.0, stop=(STOP,), **options):
    params = SamplingParams(temperature, stop, (seed,), **options)
    return SampleRequest("0-0-0/0/", np.asarray(prompt, np.int32), new, params)


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
        with engine._wake:  # whatever the load, its thread begins when all of them have come
            tasks = [asyncio.create_task(engine.sample(r)) for r in requests]
            await asyncio.sleep(0)
        return await asyncio.gather(*tasks)

    return asyncio.run(together())


def check(params, asked: SampleRequest, done: Completion) -> None:
    """The log-probabilities are the trainer's."""
    assert not done.error
    expected = trainer_logprobs(params, [*asked.prompt_ids, *done.ids])[len(asked.prompt_ids) :]
    np.testing.assert_allclose(done.logprobs, expected, atol=1e-5)


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
        check(params, r, c)
        assert (c.versions == 3).all()
        assert (c.finish == Finish.STOP) == (c.ids[-1] == STOP)
        assert STOP not in c.ids[:-1]


def test_every_shape_comes_from_a_bucket_and_is_compiled_once(params):
    cfg = replace(ENGINE, row_buckets=(2,), length_buckets=(16,))
    programs: tuple[Any, ...] = (device.read, device.feed, device.decode, device.copy_prefix)
    before = sum(program._cache_size() for program in programs)
    engine = LocalEngine(params, CFG, cfg)
    asked = [request(p, seed=i) for i, p in enumerate(prompts(11))]
    done = [c for part in (asked[:1], asked[1:3], asked[3:], asked) for c in run(engine, part)]
    engine.close()
    assert 5 < len(engine.programs) <= 14
    compiled = sum(program._cache_size() for program in programs) - before
    assert compiled <= len(engine.programs)
    for r, c in zip([*asked, *asked], done, strict=True):
        check(params, r, c)


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
    seen = set()
    for company in range(4):
        engine = LocalEngine(params, CFG, ENGINE, deterministic=True)
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
    assert second.cached_tokens >= len(prompt) + 3
    check(params, request(longer), second)


def test_a_group_feeds_its_common_prompt_once_and_stays_exact(params):
    engine = LocalEngine(params, CFG, ENGINE)
    asked = [request([*np.arange(8, 36), 40 + i], seed=i) for i in range(4)]
    done = run(engine, asked)
    engine.close()
    assert engine.tokens_prefilled == 28 and engine.tokens_reused == 3 * 28
    assert [c.cached_tokens for c in done] == [0, 28, 28, 28]
    for r, c in zip(asked, done, strict=True):
        check(params, r, c)


def test_samples_whose_leader_goes_away_feed_the_prompt_themselves(params):
    """Leaders are cancelled while their prompt is fed; the others finish."""

    async def cancelled() -> list[Completion]:
        tasks = [asyncio.create_task(engine.sample(r)) for r in asked]
        for leader in tasks[:3]:
            fed = engine.tokens_prefilled
            while engine.tokens_prefilled == fed and not leader.done():
                await asyncio.sleep(0.001)
            leader.cancel()
        return await asyncio.gather(*tasks[3:])

    engine = LocalEngine(params, CFG, ENGINE)
    asked = [request([*np.arange(8, 58), 60], seed=i, new=3) for i in range(7)]
    done = asyncio.run(cancelled())
    engine.close()
    for r, c in zip(asked[3:], done, strict=True):
        check(params, r, c)


def test_a_long_prompt_is_fed_between_the_chunks_of_others(params, monkeypatch):
    monkeypatch.setattr(local, "PREFILL_TOKENS", 1)

    class Watched(LocalEngine):
        calls = ""

        def _feed(self, *args):
            self.calls += "F"
            return super()._feed(*args)

        def _decode_chunk(self):
            self.calls += "D"
            super()._decode_chunk()

    async def late() -> None:
        first = asyncio.create_task(engine.sample(request([9], new=60, stop=())))
        while engine.tokens_sampled < 4:
            await asyncio.sleep(0.001)
        await asyncio.gather(first, engine.sample(request(np.arange(50) + 8, new=2)))

    engine = Watched(params, CFG, ENGINE)
    asyncio.run(late())
    engine.close()
    assert engine.calls.count("F") == 7, "49 tokens by 8"
    assert "FF" not in engine.calls


def test_each_of_several_stop_ids_ends_a_text(params):
    engine = LocalEngine(params, CFG, ENGINE)
    (free,) = run(engine, [request([9, 10], new=20, stop=())])
    first, later = list(dict.fromkeys(free.ids.tolist()))[2:4]
    for stops, last in (((later, first), first), ((later, 2**20), later)):
        (done,) = run(engine, [request([9, 10], new=20, stop=stops)])
        assert done.finish == Finish.STOP and done.ids[-1] == last
        assert done.ids.tolist() == free.ids[: free.ids.tolist().index(last) + 1].tolist()
    engine.close()


def test_a_stop_string_ends_at_the_token_that_completes_it(params):
    def text(ids) -> str:
        return "".join(chr(48 + i) for i in ids)

    engine = LocalEngine(params, CFG, ENGINE, text=text)
    (free,) = run(engine, [request([9, 10], new=20, stop=())])
    wanted = text(free.ids)[9:12]
    (done,) = run(engine, [request([9, 10], new=20, stop=(), stop_strings=("~~", wanted))])
    engine.close()
    end = text(free.ids).index(wanted) + 3
    assert done.ids.tolist() == free.ids[:end].tolist() and done.finish == Finish.STOP
    assert len(done.logprobs) == len(done.versions) == end
    (refused,) = run(LocalEngine(params, CFG, ENGINE), [request([9], stop_strings=("x",))])
    assert refused.finish == Finish.ERROR and "tokenizer" in refused.error


def test_restricted_sampling_reports_the_full_distribution(params):
    engine = LocalEngine(params, CFG, ENGINE)
    asked = [request([9, 10], seed=s, temperature=1.3, top_k=2, top_p=0.9) for s in range(4)]
    for r, c in zip(asked, run(engine, asked), strict=True):
        check(params, r, c)
    engine.close()


def test_scanned_layers_say_the_same(params, monkeypatch):
    """The layout of accelerators."""
    asked = [request([*np.arange(8, 36), 40 + i], seed=i) for i in range(4)]
    monkeypatch.setattr(weights, "_layers_apart", lambda: False)
    engine = LocalEngine(params, CFG, ENGINE)
    for r, c in zip(asked, run(engine, asked), strict=True):
        check(params, r, c)
    assert engine.tokens_reused
    engine.close()


def test_a_split_engine_says_the_same():
    """Tensor parallel on 2 and 4 of 8 CPU devices; 4 do not divide the 2 key/value heads."""
    flag = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, str(Path(__file__).with_name("split_engine.py"))]
    env = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 4\n"


def test_more_devices_than_there_are_is_one_clear_line(params):
    with pytest.raises(UserError, match=r"engine.tensor is 2; this process has 1 device"):
        LocalEngine(params, CFG, replace(ENGINE, tensor=2))


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
        np.testing.assert_allclose(done.logprobs[here], exact[here], atol=1e-5)


def test_failures_are_completions(params):
    engine = LocalEngine(params, CFG, ENGINE)
    (too_long,) = run(engine, [request(np.arange(64) % 60)])
    assert too_long.finish == Finish.ERROR and "64 tokens" in too_long.error

    async def late():
        return await engine.sample(replace(request([9], new=60, stop=()), deadline=1e-6))

    assert asyncio.run(late()).finish == Finish.ABORT
    (empty,) = run(engine, [request([])])
    assert empty.finish == Finish.ERROR and "empty" in empty.error
    engine.close()
    (closed,) = run(engine, [request([9])])
    assert closed.finish == Finish.ERROR


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        *[({"top_k": k}, "top_k=") for k in (2**40, 10**400, -2, float("nan"))],
        *[({"temperature": t}, "temperature=") for t in (float("nan"), -1.0, 1e308)],
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": float("inf")}, "min_p=inf"),
        *[({"stop_ids": (i,)}, "stop_ids=") for i in (2**40, -1)],
        *[({"prompt_ids": np.asarray(p)}, "prompt holds") for p in ([2**40], [-1], [64], [0.5])],
        ({"prompt_ids": [2**70]}, "prompt holds"),
    ],
)
def test_what_does_not_fit_arrays_fails_alone(params, wrong, named):
    engine = LocalEngine(params, CFG, ENGINE)
    good = request([9, 10])
    if "prompt_ids" in wrong:
        bad = replace(good, **wrong)
    else:
        bad = replace(good, params=replace(good.params, **wrong))
    first, second, third = run(engine, [good, bad, good])
    engine.close()
    assert second.finish == Finish.ERROR and named in second.error
    assert first.finish == third.finish != Finish.ERROR and not engine.failure


@pytest.mark.parametrize("where", ["decode", "prefill", "copy_prefix"])
def test_a_failure_in_the_thread_is_everybodys_and_stays(params, monkeypatch, where):
    engine = LocalEngine(params, CFG, ENGINE)

    def breaks(*_):
        raise SystemExit("out of memory")

    monkeypatch.setattr(local, where, breaks)
    asked = [request(np.arange(30), seed=i) for i in range(9)]  # more than there are slots
    for done in (*run(engine, asked), *run(engine, asked[:1])):
        assert done.finish == Finish.ERROR and "out of memory" in done.error
    assert engine.failure == "engine failed: SystemExit: out of memory"
    engine.close()


def test_a_request_that_breaks_the_thread_while_it_is_admitted_is_answered(params, monkeypatch):
    engine = LocalEngine(params, CFG, ENGINE)
    monkeypatch.setattr(engine._slots, "take", lambda *_: 1 / 0)
    (done,) = run(engine, [request([9])])
    assert done.finish == Finish.ERROR and "ZeroDivisionError" in done.error
    engine.close()


def test_progress_is_what_the_completion_says(params):
    engine = LocalEngine(params, CFG, ENGINE, version=5)
    told: list[tuple] = []

    def progress(*new):
        told.append(new)

    asked = replace(request([9, 10], new=30, stop=()), progress=progress)
    done, silent = run(engine, [asked, replace(asked, progress=None)])
    engine.close()
    assert len(told) >= 30 / ENGINE.chunk
    ids, logprobs, versions = ([x for new in told for x in new[i]] for i in range(3))
    assert (ids, versions) == (done.ids.tolist(), [5] * 30)
    assert logprobs == done.logprobs.tolist() == silent.logprobs.tolist()


def test_a_temperature_near_zero_is_greedy(params):
    engine = LocalEngine(params, CFG, ENGINE)
    greedy, tiny = run(engine, [request([9], temperature=t) for t in (0.0, 1e-45)])
    engine.close()
    np.testing.assert_array_equal(greedy.ids, tiny.ids)
