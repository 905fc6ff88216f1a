"""The pool over misbehaving toy servers: every token is recomputed, every fault has its name."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from agentcpm_jax.pool.interruption import RetryLimits
from agentcpm_jax.rollout.policy import Completion, Finish, SampleRequest
from tests.doubles.fault_server import Fault, FaultServer
from tests.doubles.toy_pool import (
    QUICK,
    check_toy,
    open_pool,
    request,
    sample_all,
    toy_trainer,
    toy_weights,
    wait_for,
)

# --- interruption ---------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "trials"), [("abort", 600), ("retract", 300), ("in_place", 100)])
def test_tokens_survive_random_interruptions(servers, tmp_path, mode, trials):
    """1,000 completions under random updates and aborts: no token lost, doubled or mislabelled.

    Interruptions come after random tokens, not at random times: every one finds requests running.
    """
    toys = [FaultServer(chunk=3) for _ in range(2)]
    pool = open_pool([servers.start(toy) for toy in toys], tmp_path, pause=mode)
    rng = random.Random(trials)
    asked = [request(i, new=rng.randint(1, 40)) for i in range(trials)]
    weights = {0: "w0"}

    async def agents() -> list[Completion]:
        gate, due, loop = asyncio.Semaphore(24), asyncio.Event(), asyncio.get_running_loop()

        def interrupt(toy: FaultServer) -> None:
            chance = rng.random()
            if chance < 0.01:
                toy.sessions.abort("", everything=True)
            elif chance < 0.014:
                loop.call_soon_threadsafe(due.set)

        for toy in toys:
            toy.toy.on_token = lambda toy=toy: interrupt(toy)

        async def one(r: SampleRequest) -> Completion:
            async with gate:
                return await pool.sample(r)

        async def publish() -> None:
            while True:
                await due.wait()
                due.clear()
                version = len(weights)
                weights[version] = f"w{version}"
                path = toy_weights(tmp_path, f"w{version}")
                await asyncio.to_thread(pool.update_weights, version, path)

        publisher = asyncio.create_task(publish())
        done = await asyncio.gather(*(one(r) for r in asked))
        publisher.cancel()
        return done

    done = asyncio.run(agents())
    figures = pool.snapshot()
    pool.close()
    for r, c in zip(asked, done, strict=True):
        assert (c.finish, c.error, len(c.ids)) == (Finish.LENGTH, "", r.max_new_tokens)
        assert (np.diff(c.versions) >= 0).all()
        check_toy(r, c, weights)
    assert figures["pool/tokens"] == sum(len(c.ids) for c in done)
    assert figures["pool/aborted_legs"] > trials / 10
    assert len(weights) > 2 and any(len(set(c.versions.tolist())) > 1 for c in done)


def test_a_new_chunk_has_a_new_rid_the_whole_prefix_and_the_rest_of_the_budget(servers, tmp_path):
    toy = FaultServer()
    pool = open_pool([servers.start(toy)], tmp_path)
    toy.arm(Fault("abort_500"), Fault("abort_before_prefill"))
    (done,) = sample_all(pool, [request(new=20)])
    figures = pool.snapshot()
    pool.close()
    assert (done.finish, len(done.ids)) == (Finish.LENGTH, 20)
    check_toy(request(new=20), done, {0: "w0"})
    assert (figures["pool/legs"], figures["pool/aborted_legs"]) == (3, 2)
    assert figures["pool/tokens"] == 20


def test_a_stop_id_ends_a_resumed_completion(servers, tmp_path):
    toy = FaultServer()
    pool = open_pool([servers.start(toy)], tmp_path)
    whole = sample_all(pool, [request(new=12)])[0].ids
    toy.arm(Fault("abort_500"))
    stopping = replace(request(new=12), params=replace(request().params, stop_ids=(int(whole[9]),)))
    (done,) = sample_all(pool, [stopping])
    pool.close()
    first = int(np.flatnonzero(whole == whole[9])[0])
    assert done.finish is Finish.STOP
    assert done.ids.tolist() == whole[: first + 1].tolist()


# --- faults ---------------------------------------------------------------------------------

RECOVERED = {
    "hang": "timeout",
    "error_500": "server_error",
    "busy_503": "busy",
    "truncated_json": "bad_answer",
    "not_json": "bad_answer",
    "number": "bad_answer",
    "deep_json": "bad_answer",
    "endless": "bad_answer",
    "packed": "bad_answer",
    "redirect": "server_error",
    "error_400": "bad_request",
    "forbidden_401": "forbidden",
    "vocabulary": "vocabulary",
    "drip": "timeout",
    "abort_before_prefill": None,
    "abort_500": None,
    "death": "unreachable",
    "reset_after_finish": "unreachable",
    "duplicated_answer": "bad_answer",
    "wrong_version": "wrong_version",
    "no_version": "wrong_version",
    "nan_logprob": "non_finite_logprob",
    "null_logprob": "non_finite_logprob",
    "short_logprobs": "bad_answer",
    "slow": None,
}


@pytest.mark.parametrize(("kind", "trouble"), RECOVERED.items())
def test_after_a_fault_the_completion_is_whole(servers, tmp_path, kind, trouble):
    toy = FaultServer()
    cfg = replace(QUICK, attempt_timeout=0.5 if kind in ("hang", "drip") else 20.0)
    pool = open_pool([servers.start(toy)], tmp_path, cfg)
    sample_all(pool, [request(9, new=4)])  # what a duplicated answer repeats
    toy.arm(Fault(kind, seconds=0.05))
    (done,) = sample_all(pool, [request(new=10)])
    figures = pool.snapshot()
    pool.close()
    assert toy.hits == [kind]
    assert (done.finish, len(done.ids)) == (Finish.LENGTH, 10)
    check_toy(request(new=10), done, {0: "w0"})
    if trouble:
        assert figures[f"pool/trouble_{trouble}"] >= 1


#: What a fault that never goes away is called in the end; `hang` needs its deadline.
STAYING = {
    "hang": "timeout: not complete within 1 s",
    "slow": "timeout: not complete within 1 s",
    "error_500": "server_error",
    "error_400": "bad_request",
    "busy_503": "busy: .*the queue is full",
    "truncated_json": "bad_answer: .*no JSON",
    "not_json": "bad_answer: .*no JSON",
    "death": "unreachable",
    "reset_after_finish": "unreachable",
    "duplicated_answer": "bad_answer: .*the answer of request",
    "wrong_version": "wrong_version: .*'default'",
    "no_version": "wrong_version: .*names no weight version",
    "drip": "timeout: not complete within 1 s",
    "deep_json": "bad_answer: .*no JSON",
    "endless": "bad_answer: .*more than the 1073152 bytes",
    "packed": "bad_answer: .*packed as gzip",
    "forbidden_401": "forbidden",
    "nan_logprob": "non_finite_logprob: .*nan at token 0",
    "null_logprob": "non_finite_logprob: .*nan at token 0",
    "short_logprobs": "bad_answer: .*24 output_ids, 23 log-probabilities",
    "vocabulary": "vocabulary: .*sampled id 1000000; the trainer has ids 0..96",
    "abort_before_prefill": "Abort before prefill, 2 times in a row",
}


@pytest.mark.parametrize(("kind", "named"), STAYING.items())
def test_a_fault_that_stays_is_a_named_error_within_the_deadline(
    servers, tmp_path, monkeypatch, kind, named
):
    limits = partial(RetryLimits, failures=2, backoff=0.01, backoff_max=0.05)
    monkeypatch.setattr("agentcpm_jax.pool.servers.RetryLimits", limits)
    toy = FaultServer()
    pool = open_pool([servers.start(toy)], tmp_path, control_timeout=2.0)
    sample_all(pool, [request(9, new=4)])  # what a duplicated answer repeats
    toy.arm(*[Fault(kind, seconds=30.0)] * 5000)  # also for those who look whether it went away
    late = 1.0 if "within 1 s" in named else 30.0
    (done,) = sample_all(pool, [replace(request(), deadline=late)])
    pool.close()
    assert done.finish in (Finish.ERROR, Finish.ABORT)
    assert len(done.ids) == 0
    assert re.search(named, done.error), done.error
    assert "\n" not in done.error


def test_a_server_that_falls_silent_is_noticed_by_its_health(servers, tmp_path, monkeypatch):
    """It holds its connections and answers nothing; only the health checks end the wait."""
    monkeypatch.setattr("agentcpm_jax.pool.worker.HEALTH_TIMEOUT", 0.5)
    toys = [FaultServer(chunk=2) for _ in range(2)]
    urls = [servers.start(toy) for toy in toys]
    pool = open_pool(urls, tmp_path, attempt_timeout=600.0)
    toys[0].arm(*[Fault("hang", path) for path in ("/generate", "/health") for _ in range(500)])
    done = sample_all(pool, [request(i) for i in range(16)])
    states, figures = pool.workers(), pool.snapshot()
    pool.close()
    for i, c in enumerate(done):
        check_toy(request(i), c, {0: "w0"})
    assert states[urls[0]].startswith("joining") and states[urls[1]] == "ready"
    assert figures["pool/trouble_unreachable"] >= 8


def test_killing_one_of_two_workers_loses_no_trajectory(servers, tmp_path):
    """64 trajectories of three turns; one server dies while all of them run."""
    toys = [FaultServer(chunk=2) for _ in range(2)]
    urls = [servers.start(toy) for toy in toys]
    pool = open_pool(urls, tmp_path)

    async def trajectory(number: int) -> list[tuple[SampleRequest, Completion]]:
        text, turns = (1, 2, 3), []
        for turn in range(3):
            asked = request(number, new=30, turn=turn, prompt=text)
            done = await pool.sample(asked)
            turns.append((asked, done))
            text = (*asked.prompt_ids.tolist(), *done.ids.tolist())
        return turns

    async def all_of_them() -> list[list[tuple[SampleRequest, Completion]]]:
        loop, due, tokens = asyncio.get_running_loop(), asyncio.Event(), itertools.count()

        def count() -> None:
            if next(tokens) == 500:  # of 5,760, when both have many requests
                loop.call_soon_threadsafe(due.set)

        toys[0].toy.on_token = count
        tasks = [asyncio.create_task(trajectory(i)) for i in range(64)]
        await due.wait()
        await asyncio.to_thread(servers.kill, urls[0])
        return await asyncio.gather(*tasks)

    found = asyncio.run(all_of_them())
    states = pool.workers()
    pool.close()
    for turns in found:
        for asked, done in turns:
            assert (done.finish, len(done.ids)) == (Finish.LENGTH, 30)
            check_toy(asked, done, {0: "w0"})
    assert states[urls[0]].startswith("joining") and states[urls[1]] == "ready"


# --- weights and workers --------------------------------------------------------------------


def test_a_late_worker_takes_the_published_weights_before_its_first_request(servers, tmp_path):
    first, late, file = FaultServer(), FaultServer(), tmp_path / "urls.txt"
    file.write_text(servers.start(first))
    pool = open_pool([], tmp_path, urls_file=str(file))
    pool.update_weights(1, toy_weights(tmp_path, "w1"))
    url = servers.start(late)
    file.write_text(f"{file.read_text()}\n{url}")
    wait_for(lambda: pool.workers().get(url) == "ready")
    done = sample_all(pool, [request(i) for i in range(16)])
    pool.close()
    assert late.toy.weights == "w1" and late.sessions.version == "run-000001"
    assert late.sessions.total["requests"] > 4  # the probes and its share
    for i, c in enumerate(done):
        check_toy(request(i), c, {1: "w1"})


def test_workers_that_a_file_names_later_join(servers, tmp_path):
    first, late = FaultServer(), FaultServer()
    urls, file = [servers.start(first), servers.start(late)], tmp_path / "urls.txt"
    file.write_text(f"{urls[0]}\n")
    pool = open_pool([], tmp_path, urls_file=str(file))
    assert set(pool.workers()) == {urls[0]}
    file.write_text("\n".join(urls))
    wait_for(lambda: pool.workers().get(urls[1]) == "ready")
    done = sample_all(pool, [request(i) for i in range(16)])
    pool.close()
    assert late.sessions.total["requests"] > 4  # the probes and its share
    for i, c in enumerate(done):
        check_toy(request(i), c, {0: "w0"})


def test_a_worker_that_restarts_with_other_weights_catches_up(servers, tmp_path):
    toy = FaultServer()
    pool = open_pool([servers.start(toy)], tmp_path)
    toy.toy.weights = "base"
    servers.loop.call_soon_threadsafe(toy.sessions.rename, "default")
    (done,) = sample_all(pool, [request()])
    figures = pool.snapshot()
    pool.close()
    assert (toy.toy.weights, toy.sessions.version) == ("w0", "run-000000")
    check_toy(request(), done, {0: "w0"})
    assert figures["pool/trouble_wrong_version"] == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault("update_false", "/update_weights_from_disk"), "update_refused.*shapes differ"),
        (Fault("error_500", "/update_weights_from_disk"), "server_error"),
        (Fault("hang", "/update_weights_from_disk"), "timeout.*within 3 s"),
        (Fault("slow", "/update_weights_from_disk", 30.0), "timeout.*within 3 s"),
        (Fault("lies", "/update_weights_from_disk"), "version mismatch.*other weights"),
    ],
)
def test_a_worker_that_fails_an_update_is_out_and_the_others_go_on(
    servers, tmp_path, fault, reason
):
    good, bad = FaultServer(), FaultServer()
    urls = [servers.start(good), servers.start(bad)]
    pool = open_pool(urls, tmp_path, update_timeout=3.0, health_every=60.0)
    bad.arm(*[fault] * 5)
    path = toy_weights(tmp_path, "w1")
    trainer = toy_trainer("w1").logprobs
    results = pool.update_weights(1, path, trainer)
    done = sample_all(pool, [request(i) for i in range(8)])
    pool.close()
    assert results[urls[0]] == ""
    assert re.search(reason, results[urls[1]]), results
    assert not bad.sessions.paused  # `continue` whatever happened
    for i, c in enumerate(done):
        check_toy(request(i), c, {1: "w1"})


def test_requests_wait_while_every_worker_loads(servers, tmp_path):
    toy = FaultServer()
    pool = open_pool([servers.start(toy)], tmp_path)
    toy.arm(Fault("slow", "/update_weights_from_disk", 0.3))

    async def during() -> Completion:
        update = asyncio.create_task(
            asyncio.to_thread(pool.update_weights, 1, toy_weights(tmp_path, "w1"))
        )
        while "updating" not in next(iter(pool.workers().values())):
            await asyncio.sleep(0.001)
        done = await pool.sample(request())
        await update
        return done

    done = asyncio.run(during())
    pool.close()
    check_toy(request(), done, {1: "w1"})


@pytest.mark.parametrize("kind", ["no_spans", "tier_b"])
def test_older_servers_say_less_about_versions(servers, tmp_path, kind):
    toy = FaultServer()
    pool = open_pool([servers.start(toy)], tmp_path)
    toy.arm(Fault(kind))
    (done,) = sample_all(pool, [request(new=10)])
    figures = pool.snapshot()
    pool.close()
    check_toy(request(new=10), done, {0: "w0"})
    assert figures["pool/uncertain_tokens"] == 0
