"""The contract suite against real SGLang servers on the CPU, alone and behind the official router.

`make test-sglang` runs it: SGLang lives in an environment of its own (SGLANG_PYTHON). Servers that
do not start are a failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from agentcpm_jax.hf.tokenizer import load_chat
from agentcpm_jax.pool.probe import Trainer
from agentcpm_jax.pool.servers import PoolConfig, SGLangPool
from agentcpm_jax.rollout.policy import Finish, SampleRequest, SamplingParams
from agentcpm_jax.types import UserError
from tests.doubles.fault_server import FaultServer
from tests.doubles.toy_pool import check_toy, open_pool, request, sample_all, toy_weights
from tests.pool.contract_suite import *  # noqa: F403
from tests.pool.contract_suite import Subject, check_gaps, pool_run
from tests.pool.pool_training import check_training, train_on
from tests.pool.real_sglang import kill, official_router, sglang_servers
from tests.pool.served_models import (
    CONTEXT,
    FIRST,
    VOCABULARY,
    other_model,
    trainer_logprobs,
    two_weights,
)

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> Iterator[list[str]]:
    with sglang_servers(str(FIRST), CONTEXT, 2, tmp_path_factory.mktemp("logs")) as found:
        yield found


@pytest.fixture(scope="module")
def subject(urls, tmp_path_factory) -> Subject:
    weights = two_weights(tmp_path_factory.mktemp("weights"))
    return Subject(
        url=urls[0],
        context=CONTEXT,
        vocab_size=VOCABULARY,
        weights=weights,
        logprobs=(trainer_logprobs(weights[0]), trainer_logprobs(weights[1])),
        chat=load_chat(FIRST),
        max_gap=1e-5,
        exact_in_place=False,
        other_model=other_model(tmp_path_factory.mktemp("other")),
    )


def test_the_official_router_in_front_of_two_servers(subject, urls, tmp_path) -> None:
    """Generation through the router, control on each worker; every token exact."""
    with official_router(urls, tmp_path) as router:
        gaps, done, figures = pool_run(subject, urls, "abort", router)
    check_gaps(subject, gaps)
    assert figures["pool/ready"] == 2
    assert len({v for c in done for v in c.versions.tolist()}) >= 2


def test_the_official_router_in_front_of_our_servers(servers, tmp_path) -> None:
    """Weights change between two rounds; every token of both is recomputed."""
    toys = [FaultServer(chunk=8) for _ in range(2)]
    workers = [servers.start(toy) for toy in toys]
    (tmp_path / "logs").mkdir()
    with official_router(workers, tmp_path / "logs") as router:
        pool = open_pool(workers, tmp_path, router_url=router)
        first = sample_all(pool, [request(i) for i in range(32)])
        results = pool.update_weights(1, toy_weights(tmp_path, "w1"))
        second = sample_all(pool, [request(i) for i in range(32)])
        pool.close()
    assert set(results.values()) == {""}
    for i in range(32):
        check_toy(request(i), first[i], {0: "w0"})
        check_toy(request(i), second[i], {1: "w1"})
    assert all(toy.sessions.total["requests"] > 8 for toy in toys)


def test_log_probs_after_the_temperature_are_noticed(subject) -> None:
    pool = SGLangPool(PoolConfig(urls=(subject.url,), max_gap=1e-3), "hot")
    trainer = Trainer(VOCABULARY, subject.chat, subject.logprobs[0], temperature=0.7)
    with pytest.raises(Exception, match=r"log-prob convention.*after the temperature"):
        pool.start(trainer, 0, subject.weights[0])
    pool.close()


def test_the_reinforcement_stage_trains_on_real_servers(subject, urls, tmp_path) -> None:
    """The quickstart's RL stage, its engine set to a pool of the two servers, from end to end."""
    rows = train_on(urls, tmp_path / "run")
    check_gaps(subject, check_training(tmp_path / "run", rows))
    assert rows[-1]["pool/ready"] == 2


def test_killing_one_of_two_servers_loses_no_trajectory(subject, urls) -> None:
    """The last test but one: one server stays dead."""
    pool = SGLangPool(PoolConfig(urls=tuple(urls), health_every=2.0, max_gap=1e-4), "mortal")
    pool.start(Trainer(VOCABULARY, subject.chat, subject.logprobs[0]), 0, subject.weights[0])
    rng = np.random.default_rng(0)
    asked = [
        SampleRequest(
            f"{i}-0-0/0/",
            rng.integers(0, VOCABULARY, 5).astype(np.int32),
            200,
            SamplingParams(1.0, (), (i,)),
            deadline=300.0,
        )
        for i in range(24)
    ]

    async def together():
        tasks = [asyncio.create_task(pool.sample(r)) for r in asked]
        while pool.snapshot()["pool/inflight"] < len(asked):
            await asyncio.sleep(0.01)
        await asyncio.to_thread(kill, urls[1])
        return await asyncio.gather(*tasks)

    done = asyncio.run(together())
    states = pool.workers()
    pool.close()
    assert states[urls[1]].startswith("joining")
    gaps = []
    for r, c in zip(asked, done, strict=True):
        assert (c.finish, c.error, len(c.ids)) == (Finish.LENGTH, "", 200)
        text, start = np.concatenate([r.prompt_ids, c.ids]), len(r.prompt_ids)
        gaps.append(np.abs(c.logprobs - subject.logprobs[0](text)[start:]))
    check_gaps(subject, np.concatenate(gaps))


def test_a_server_that_dies_of_foreign_weights_is_named(subject, urls) -> None:
    """The last test: SGLang ends itself when it is given weights of another shape."""
    pool = SGLangPool(PoolConfig(urls=(urls[0],)), "deadly")
    with pytest.raises(UserError, match=f"wrong model on {urls[0]}.*ended while it loaded"):
        pool.start(Trainer(VOCABULARY, subject.chat), 0, subject.other_model)
    pool.close()
