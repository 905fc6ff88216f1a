"""The pool over misbehaving toy servers: every token is recomputed, every fault has its name."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from toy_pool import (
    QUICK,
    Servers,
    check_toy,
    open_pool,
    request,
    toy_logprobs,
    toy_trainer,
    toy_weights,
    wait_for,
)

from agentcpm_jax.engine.fault_server import Fault, FaultServer, ToyEngine
from agentcpm_jax.engine.server import ServerConfig, ServerKeys
from agentcpm_jax.rollout.policy import Completion, Finish, SampleRequest
from agentcpm_jax.rollout.pool_config import Keys, PoolConfig
from agentcpm_jax.rollout.routing import Routes, State, Worker
from agentcpm_jax.rollout.sglang_pool import SGLangPool
from agentcpm_jax.rollout.sglang_protocol import Expected, PoolError, Trouble, read_generate
from agentcpm_jax.rollout.sglang_worker import Server, open_client
from agentcpm_jax.types import UserError


@pytest.fixture
def servers() -> Iterator[Servers]:
    running = Servers()
    yield running
    running.close()


def sample_all(pool: SGLangPool, requests) -> list[Completion]:
    async def together() -> list[Completion]:
        return list(await asyncio.gather(*(pool.sample(r) for r in requests)))

    return asyncio.run(together())


# --- interruption ---------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "trials"), [("abort", 600), ("retract", 300), ("in_place", 100)])
def test_tokens_survive_random_interruptions(servers, tmp_path, mode, trials):
    """1,000 completions under random updates and aborts: no token lost, doubled or mislabelled.

    Interruptions come after random tokens, not at random times: every one finds requests running.
    """
    toys = [FaultServer(cfg=ServerConfig(port=0, chunk=3)) for _ in range(2)]
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


def test_a_new_leg_has_a_new_rid_the_whole_prefix_and_the_rest_of_the_budget(servers, tmp_path):
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
    cfg = replace(QUICK, attempt_timeout=0.5 if kind == "hang" else 20.0)
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


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("hang", "timeout: not complete within 1 s"),
        ("error_500", "server_error"),
        ("error_400", "bad_request"),
        ("truncated_json", "bad_answer"),
        ("nan_logprob", "non_finite_logprob"),
        ("vocabulary", "vocabulary: .*sampled id 1000000; the trainer has ids 0..96"),
        ("abort_before_prefill", "Abort before prefill, 4 times in a row"),
    ],
)
def test_a_fault_that_stays_is_a_named_error_within_the_deadline(servers, tmp_path, kind, named):
    toy = FaultServer()
    pool = open_pool([servers.start(toy)], tmp_path, max_failures=4, control_timeout=5.0)
    toy.arm(*[Fault(kind)] * 60)
    late = 1.0 if kind == "hang" else 30.0
    (done,) = sample_all(pool, [replace(request(), deadline=late)])
    pool.close()
    assert done.finish in (Finish.ERROR, Finish.ABORT)
    assert len(done.ids) == 0
    assert re.search(named, done.error), done.error
    assert "\n" not in done.error


def test_killing_one_of_two_workers_loses_no_trajectory(servers, tmp_path):
    """64 trajectories of three turns; one server dies while all of them run."""
    toys = [FaultServer(cfg=ServerConfig(port=0, chunk=2)) for _ in range(2)]
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
    first, late = FaultServer(), FaultServer()
    pool = open_pool([servers.start(first)], tmp_path)
    pool.update_weights(1, toy_weights(tmp_path, "w1"))
    url = servers.start(late)
    pool.add_worker(url)
    wait_for(lambda: pool.workers().get(url) == "ready")
    done = sample_all(pool, [request(i) for i in range(16)])
    pool.close()
    assert late.toy.weights == "w1" and late.sessions.version == "run-000001"
    assert late.sessions.total["requests"] > 4  # the probes and its share
    for i, c in enumerate(done):
        check_toy(request(i), c, {1: "w1"})


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
        (Fault("hang", "/update_weights_from_disk"), "timeout.*within 0.5 s"),
        (Fault("slow", "/update_weights_from_disk", 30.0), "timeout.*within 0.5 s"),
        (Fault("lies", "/update_weights_from_disk"), "version mismatch.*other weights"),
    ],
)
def test_a_worker_that_fails_an_update_is_out_and_the_others_go_on(
    servers, tmp_path, fault, reason
):
    good, bad = FaultServer(), FaultServer()
    urls = [servers.start(good), servers.start(bad)]
    pool = open_pool(urls, tmp_path, update_timeout=0.5, health_every=60.0)
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


@pytest.mark.parametrize(
    ("kind", "uncertain"), [("no_spans", 0), ("tier_b", 0), ("no_version", 10)]
)
def test_older_servers_say_less_about_versions(servers, tmp_path, kind, uncertain):
    toy = FaultServer()
    allowed = kind == "no_version"
    pool = open_pool([servers.start(toy)], tmp_path, allow_unversioned=allowed)
    toy.arm(Fault(kind))
    (done,) = sample_all(pool, [request(new=10)])
    figures = pool.snapshot()
    pool.close()
    check_toy(request(new=10), done, {0: "w0"})
    assert figures["pool/uncertain_tokens"] == uncertain


# --- start-up -------------------------------------------------------------------------------


def test_an_unreachable_pool_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no worker of the pool.*127.0.0.1:9.*unreachable") as e:
        open_pool(["http://127.0.0.1:9"], tmp_path, start_timeout=0.2)
    assert "\n" not in str(e.value)


def test_one_reachable_worker_is_enough_to_start(servers, tmp_path):
    pool = open_pool(["http://127.0.0.1:9", servers.start(FaultServer())], tmp_path)
    (done,) = sample_all(pool, [request()])
    pool.close()
    check_toy(request(), done, {0: "w0"})


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (toy_trainer("other"), "version mismatch: .* nats from the trainer's"),
        (replace(toy_trainer("w0"), vocab_size=98), "input_ids holds 97; the vocabulary has 97"),
        (replace(toy_trainer("w0"), vocab_size=40), "vocabulary: .*sampled id"),
    ],
)
def test_a_server_that_is_not_the_trainers_is_refused(servers, tmp_path, trainer, message):
    cfg = replace(QUICK, urls=(servers.start(FaultServer()),), start_timeout=0.3)
    pool = SGLangPool(cfg, "run")
    with pytest.raises(UserError, match=message):
        pool.start(trainer, 0, toy_weights(tmp_path, "w0"))
    pool.close()


def test_a_model_that_does_not_take_the_weights_is_the_wrong_model(servers, tmp_path):
    cfg = replace(QUICK, urls=(servers.start(FaultServer()),))
    pool = SGLangPool(cfg, "run")
    with pytest.raises(UserError, match=r"wrong model on http.*toy.txt is missing"):
        pool.start(toy_trainer("w0"), 0, str(tmp_path / "nothing"))
    pool.close()


class Tempered(ToyEngine):
    """Reports log-probabilities of softmax(logits / T), as SGLang does by default."""

    async def sample(self, request: SampleRequest) -> Completion:
        done = await super().sample(request)
        return replace(done, logprobs=done.logprobs / (request.params.temperature or 1.0))


def test_the_temperature_convention_is_found_and_a_mismatch_refused(servers, tmp_path):
    url = servers.start(FaultServer(Tempered()))
    cfg, path = replace(QUICK, urls=(url,)), toy_weights(tmp_path, "w0")
    pool = SGLangPool(cfg, "run")
    hot = replace(toy_trainer("w0"), temperature=0.7)
    with pytest.raises(UserError, match=r"log-prob convention.*after the temperature.*=1"):
        pool.start(hot, 0, path)
    pool.close()
    open_pool([url], tmp_path).close()  # at temperature 1 the two conventions are one
    raw = servers.start(FaultServer())
    pool = SGLangPool(replace(cfg, urls=(raw,)), "run")
    pool.start(hot, 0, path)
    pool.close()


def test_a_prompt_beyond_the_context_is_refused_and_not_repeated(servers, tmp_path):
    toy = FaultServer(ToyEngine(capacity=64))
    pool = open_pool([servers.start(toy)], tmp_path)
    before = toy.sessions.total["requests"]
    long, fits = request(prompt=range(70)), request(prompt=range(50))
    refused, cut = sample_all(pool, [long, fits])
    pool.close()
    assert refused.finish is Finish.ERROR
    assert "71 tokens leaves no room in a context of 64" in refused.error
    assert (cut.finish, len(cut.ids)) == (Finish.LENGTH, 13)
    assert toy.sessions.total["requests"] == before + 1


# --- keys, TLS, proxies ---------------------------------------------------------------------


def test_keys_come_from_the_environment_and_are_never_shown(servers, tmp_path, monkeypatch):
    toy = FaultServer(keys=ServerKeys("ordinary-secret", "admin-secret"))
    url = servers.start(toy)
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)
    monkeypatch.delenv("SGLANG_ADMIN_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"forbidden.*set SGLANG_API_KEY and SGLANG_ADMIN_API_KEY"):
        open_pool([url], tmp_path)
    monkeypatch.setenv("SGLANG_API_KEY", "ordinary-secret")
    with pytest.raises(UserError, match="forbidden") as error:
        open_pool([url], tmp_path)  # the ordinary key does not control
    monkeypatch.setenv("SGLANG_ADMIN_API_KEY", "admin-secret")
    pool = open_pool([url], tmp_path)
    (done,) = sample_all(pool, [request()])
    shown = repr(vars(pool)) + repr(pool.workers()) + str(error.value) + repr(pool.cfg)
    pool.close()
    check_toy(request(), done, {0: "w0"})
    assert "secret" not in shown
    assert "secret" not in repr(Keys("a-secret", "b-secret")) + repr(ServerKeys("a-secret"))


@pytest.mark.parametrize("url", ["localhost:30000", "ftp://a", "http://", "http://u:pw@host:1"])
def test_a_url_that_is_none_or_holds_a_password_is_refused(url):
    with pytest.raises(UserError) as error:
        SGLangPool(PoolConfig(urls=(url,)), "run")
    assert "pw" not in str(error.value)


def test_a_private_authority_is_trusted_only_when_named(tmp_path, servers):
    import ssl
    import subprocess

    from aiohttp import web

    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    name = "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    command = [*make.split(), *name.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def listen() -> tuple[web.AppRunner, str]:
        runner = web.AppRunner(FaultServer().application(), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        return runner, f"https://127.0.0.1:{runner.addresses[0][1]}"

    runner, url = servers.call(listen())
    with pytest.raises(UserError, match="CERTIFICATE_VERIFY_FAILED"):
        open_pool([url], tmp_path, start_timeout=0.2)
    pool = open_pool([url], tmp_path, ca_file=str(certificate))
    (done,) = sample_all(pool, [request()])
    pool.close()
    servers.call(runner.cleanup())
    check_toy(request(), done, {0: "w0"})


def test_a_proxy_named_by_the_environment_is_used(servers, tmp_path, monkeypatch):
    import httpx
    from aiohttp import web

    url, asked = servers.start(FaultServer()), []

    async def forward(incoming: web.Request) -> web.Response:
        asked.append(incoming.path)
        async with httpx.AsyncClient(trust_env=False) as client:
            target = f"{url}{incoming.path_qs}"
            answer = await client.request(
                incoming.method,
                target,
                content=await incoming.read(),
                headers={"Content-Type": "application/json"},
            )
        return web.Response(status=answer.status_code, body=answer.content)

    async def listen() -> tuple[web.AppRunner, int]:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", forward)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, runner.addresses[0][1]

    runner, port = servers.call(listen())
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
    pool = open_pool(["http://workers.invalid:30000"], tmp_path)
    (done,) = sample_all(pool, [request()])
    pool.close()
    servers.call(runner.cleanup())
    check_toy(request(), done, {0: "w0"})
    assert "/generate" in asked and "/update_weights_from_disk" in asked


# --- routing and reading --------------------------------------------------------------------


def test_a_trajectory_stays_with_its_worker_until_that_is_much_busier():
    cfg = PoolConfig()
    client = open_client(cfg)
    workers = [Worker(Server(f"http://w{i}", client, Keys(), cfg), State.READY) for i in range(3)]
    routes = Routes(slack=2)
    home = routes.choose(workers, "a")
    assert home is not None
    for busy in range(5):
        home.legs.clear()
        home.legs.update(range(busy))  # type: ignore[arg-type]
        chosen = Routes.choose(routes, workers, "a")
        assert (chosen is home) == (busy <= 2)
        routes._homes["a"] = home.url
    home.state = State.JOINING
    assert routes.choose(workers, "a") is not home
    for worker in workers:
        worker.state = State.REFUSED
    assert routes.choose(workers, "a") is None
    asyncio.run(client.aclose())


def test_new_trajectories_spread_evenly(servers, tmp_path):
    toys = [FaultServer(cfg=ServerConfig(port=0, chunk=2)) for _ in range(2)]
    pool = open_pool([servers.start(t) for t in toys], tmp_path)
    before = [t.sessions.total["requests"] for t in toys]
    sample_all(pool, [request(i, new=16) for i in range(32)])
    pool.close()
    shares = [t.sessions.total["requests"] - b for t, b in zip(toys, before, strict=True)]
    assert sum(shares) == 32 and min(shares) >= 12


EXPECTED = Expected("a/1/", "http://w", 10, 4, {"r-0": 0, "r-1": 1}, oldest=0)


def body(**meta) -> bytes:
    import json

    meta = {
        "id": "a/1/",
        "finish_reason": {"type": "length"},
        "output_token_logprobs": [[-1.0, 3, None], [-2.0, 4, None]],
        "weight_version": "r-1",
        "weight_versions": [
            {"version": "r-0", "start": 0, "end": 1},
            {"version": "r-1", "start": 1, "end": 2},
        ],
    } | meta
    return json.dumps({"output_ids": [3, 4], "meta_info": meta}).encode()


def test_spans_give_each_token_its_version():
    leg = read_generate(200, body(), EXPECTED)
    assert leg.versions.tolist() == [0, 1] and leg.logprobs.tolist() == [-1.0, -2.0]
    assert not leg.uncertain


@pytest.mark.parametrize(
    ("status", "payload", "kind"),
    [
        (200, b"", Trouble.BAD_ANSWER),
        (200, b"[]", Trouble.BAD_ANSWER),
        (200, b'{"error": "x"}', Trouble.SERVER_ERROR),
        (429, b"slow down", Trouble.BUSY),
        (401, b"{}", Trouble.FORBIDDEN),
        (404, b"", Trouble.BAD_REQUEST),
        (502, b"<html>", Trouble.SERVER_ERROR),
        (200, body(id="b/1/"), Trouble.BAD_ANSWER),
        (200, body(finish_reason=None), Trouble.BAD_ANSWER),
        (200, body(weight_versions=[]), Trouble.BAD_ANSWER),
        (200, body(weight_versions=[{"version": "r-0"}]), Trouble.BAD_ANSWER),
        (200, body(weight_versions=[{"version": "?", "start": 0, "end": 2}]), "wrong_version"),
        (200, body(output_token_logprobs=[[-1.0, 3]]), Trouble.BAD_ANSWER),
        (200, body(output_token_logprobs=[["x", 3], [0, 4]]), Trouble.BAD_ANSWER),
        (
            200,
            body(finish_reason={"type": "abort", "status_code": 503, "message": "full"}),
            Trouble.BUSY,
        ),
    ],
)
def test_an_unusable_answer_is_named(status, payload, kind):
    with pytest.raises(PoolError) as error:
        read_generate(status, payload, EXPECTED)
    assert error.value.kind == kind


def test_the_newest_version_alone_is_uncertain_when_it_changed_meanwhile():
    leg = read_generate(200, body(weight_versions=None), EXPECTED)
    assert leg.versions.tolist() == [0, 0] and leg.uncertain


def test_the_toys_oracle_notices_a_wrong_token():
    ids = np.asarray([1, 2, 3], np.int32)
    assert toy_logprobs(ids, "w0")[1:].tolist().count(-9.0) > 0
