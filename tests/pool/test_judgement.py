"""Workers are judged by how long they are odd, not by how many requests met it at once."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from agentcpm_jax.pool.servers import SGLangPool
from agentcpm_jax.rollout.policy import Finish
from tests.doubles.fault_server import Fault, FaultKind, FaultServer
from tests.doubles.toy_pool import (
    QUICK,
    Servers,
    check_toy,
    open_pool,
    request,
    sample_all,
    toy_trainer,
    toy_weights,
    wait_for,
)

ODD: list[FaultKind] = ["not_json", "error_500", "error_400", "vocabulary", "nan_logprob", "number"]


@pytest.mark.parametrize("kind", ODD)
def test_many_odd_answers_at_once_are_no_outage(servers, tmp_path, monkeypatch, kind) -> None:
    monkeypatch.setattr("agentcpm_jax.pool.members.DOUBT", 30.0)  # on the busiest machine
    toy = FaultServer()
    pool = open_pool([servers.start(toy)], tmp_path)
    toy.arm(*[Fault(kind)] * 12)  # more than any count of failures in a row would allow
    done = sample_all(pool, [request(i) for i in range(12)])
    states, figures = pool.workers(), pool.snapshot()
    pool.close()
    for i, c in enumerate(done):
        assert c.finish is Finish.LENGTH, c.error
        check_toy(request(i), c, {0: "w0"})
    assert set(states.values()) == {"ready"}
    assert sum(n for name, n in figures.items() if "trouble" in name) == 12


@pytest.mark.parametrize("kind", ["error_500", "error_400", "busy_503", "number"])
def test_a_worker_that_answers_nothing_else_is_out_until_it_answers(
    servers, tmp_path, monkeypatch, kind
) -> None:
    """Its health check says 200 all along, and what fails at once would draw the traffic."""
    monkeypatch.setattr("agentcpm_jax.pool.members.DOUBT", 0.2)
    good, dead = FaultServer(), FaultServer()
    urls = [servers.start(good), servers.start(dead)]
    pool = open_pool(urls, tmp_path, control_timeout=3.0 if kind == "busy_503" else 20.0)
    dead.arm(*[Fault(kind)] * 100_000)
    done = sample_all(pool, [request(i) for i in range(16)])
    wait_for(lambda: pool.workers()[urls[1]].startswith("joining"))
    met = len(dead.hits)
    done += sample_all(pool, [request(i) for i in range(16)])
    states = pool.workers()
    for i, c in enumerate(done):
        check_toy(request(i % 16), c, {0: "w0"})
    assert (states[urls[0]] == "ready" and "status" in states[urls[1]]) or kind == "number"
    assert met < 60, "half of the requests, and what its checks asked"
    dead._armed.clear()
    wait_for(lambda: pool.workers()[urls[1]] == "ready")
    pool.close()


def test_a_worker_without_traffic_does_not_stay_in_doubt(servers, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("agentcpm_jax.pool.members.DOUBT", 0.2)
    toys = [FaultServer(), FaultServer()]
    urls = [servers.start(toy) for toy in toys]
    pool = open_pool(urls, tmp_path, health_every=60.0)
    toys[0].arm(Fault("error_500"))
    toys[1].arm(Fault("error_500"))
    sample_all(pool, [request(i) for i in range(4)])
    before = [toy.sessions.total["requests"] for toy in toys]
    wait_for(
        lambda: all(
            toy.sessions.total["requests"] > n or not pool._get().workers[url].doubt
            for toy, url, n in zip(toys, urls, before, strict=True)
        )
    )
    wait_for(lambda: set(pool.workers().values()) == {"ready"})
    pool.close()


def test_a_refused_worker_is_asked_again(servers, tmp_path) -> None:
    toy = FaultServer()
    pool = open_pool([servers.start(toy)], tmp_path, update_timeout=1.0)
    toy.arm(Fault("update_false", "/update_weights_from_disk"))
    path = toy_weights(tmp_path, "w1")
    seen = []

    def look() -> bool:
        seen.append(next(iter(pool.workers().values())).partition(":")[0])
        return seen[-1] == "ready"

    toy.arm(*[Fault("update_false", "/update_weights_from_disk")] * 3)
    pool.update_weights(1, path)
    wait_for(look)
    (done,) = sample_all(pool, [request()])
    pool.close()
    assert "refused" in seen, seen
    check_toy(request(), done, {1: "w1"})


CONTROL = [
    "/pause_generation",
    "/update_weights_from_disk",
    "/continue_generation",
    "/model_info",
    "/generate",
]
SPOILT: list[FaultKind] = ["deep_json", "number", "drip", "error_500", "death", "packed"]


@pytest.mark.parametrize("path", CONTROL)
@pytest.mark.parametrize("kind", SPOILT)
def test_an_odd_answer_during_an_update_ends_nothing(servers, tmp_path, path, kind) -> None:
    """The update returns, nobody stays `updating`, and the next requests have the new weights."""
    toy = FaultServer()
    slow = {"update_timeout": 6.0, "control_timeout": 3.0} if kind == "drip" else {}
    pool = open_pool([servers.start(toy)], tmp_path, **slow)
    toy.arm(*[Fault(kind, path)] * (1 if slow else 3))
    weights = toy_weights(tmp_path, "w1")
    pool.update_weights(1, weights, toy_trainer("w1").logprobs)
    assert not next(iter(pool.workers().values())).startswith("updating")
    (done,) = sample_all(pool, [request()])
    wait_for(lambda: set(pool.workers().values()) == {"ready"})
    pool.close()
    check_toy(request(), done, {1: "w1"})
    assert not toy.sessions.paused


def test_a_worker_that_lies_is_given_the_weights_again_while_there_is_a_trainer(
    servers, tmp_path
) -> None:
    """It is the only one; after the update there would be nothing to compare it with."""
    toy = FaultServer()
    pool = open_pool([servers.start(toy)], tmp_path)
    toy.arm(Fault("lies", "/update_weights_from_disk"))
    path = toy_weights(tmp_path, "w1")
    results = pool.update_weights(1, path, toy_trainer("w1").logprobs)
    (done,) = sample_all(pool, [request()])
    pool.close()
    assert set(results.values()) == {""} and toy.hits == ["lies"]
    check_toy(request(), done, {1: "w1"})


@pytest.mark.parametrize("length", ["abc", [5], -5, True])
def test_a_context_that_is_no_length_is_a_bad_answer(servers, tmp_path, length) -> None:
    class Boasting(FaultServer):
        async def _server_info(self, request):
            from aiohttp import web

            return web.json_response({"context_length": length})

    with pytest.raises(Exception, match=r"context_length is .*, not a count"):
        open_pool([servers.start(Boasting())], tmp_path, start_timeout=0.2)


def test_a_half_written_file_of_urls_does_not_end_the_watch(servers, tmp_path) -> None:
    toys, file = [FaultServer(), FaultServer()], tmp_path / "urls.txt"
    urls = [servers.start(toy) for toy in toys]
    file.write_text(urls[0])
    pool = open_pool([], tmp_path, urls_file=str(file))
    file.write_bytes(b"http:/\xff")
    time.sleep(5 * QUICK.health_every)
    file.write_text("\n".join(urls))
    wait_for(lambda: pool.workers().get(urls[1]) == "ready")
    pool.close()


def test_bytes_that_are_no_http_raise_nothing_but_a_pool_error(tmp_path) -> None:
    """Raw answers of a socket: cut, doubled, with headers of every sort."""
    from agentcpm_jax.pool.config import Keys
    from agentcpm_jax.pool.errors import PoolError
    from agentcpm_jax.pool.worker import Server, open_client

    answers = [
        b"",
        b"\x00\xff" * 100,
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 999 \xff\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=nope\r\n\r\n\xff",
        b"HTTP/1.1 307 x\r\nLocation: http://[::1\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nSet-Cookie: \xff=;;\xfe\r\nContent-Length: 1\r\n\r\n5",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
    ]

    async def scenario() -> None:
        client = open_client()
        for answer in answers:

            async def serve(reader, writer, answer=answer) -> None:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(answer)
                writer.close()

            listening = await asyncio.start_server(serve, "127.0.0.1", 0)
            port = listening.sockets[0].getsockname()[1]
            cfg = replace(QUICK, control_timeout=5.0)
            server = Server(f"http://127.0.0.1:{port}", client, Keys(), cfg)
            for ask in (
                server.model_info,
                lambda s=server: s.update_from_disk("p", "v", flush=True),
            ):
                with pytest.raises(PoolError):
                    await ask()
            listening.close()
            await listening.wait_closed()
        await client.aclose()

    asyncio.run(scenario())


def test_keys_do_not_follow_a_redirect(servers: Servers, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SGLANG_API_KEY", "secret")
    evil, toy = FaultServer(), FaultServer()
    elsewhere = servers.start(evil)
    monkeypatch.setattr(
        "tests.doubles.fault_server._BODIES",
        {"redirect": lambda: _moved(f"{elsewhere}/generate")},
    )
    pool: SGLangPool = open_pool([servers.start(toy)], tmp_path)
    toy.arm(Fault("redirect"))
    (done,) = sample_all(pool, [request()])
    pool.close()
    check_toy(request(), done, {0: "w0"})
    assert evil.sessions.total["requests"] == 0


def _moved(location: str):
    from aiohttp import web

    return web.Response(status=307, headers={"Location": location})
