"""Which worker a request goes to, and what an answer says."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from agentcpm_jax.pool.config import Keys, PoolConfig
from agentcpm_jax.pool.errors import PoolError, PoolErrorKind
from agentcpm_jax.pool.protocol import Expected, read_generate
from agentcpm_jax.pool.routing import Routes, State, Worker
from agentcpm_jax.pool.worker import Server, open_client
from tests.doubles.fault_server import FaultServer
from tests.doubles.toy_pool import (
    open_pool,
    request,
    sample_all,
    toy_logprobs,
)


def test_a_trajectory_stays_with_its_worker_until_that_is_much_busier():
    cfg = PoolConfig()
    client = open_client()
    workers = [Worker(Server(f"http://w{i}", client, Keys(), cfg), State.READY) for i in range(3)]
    routes = Routes(slack=2)
    home = routes.choose(workers, "a")
    assert home is not None
    for busy in range(5):
        home.in_flight.clear()
        home.in_flight.update(range(busy))  # type: ignore[arg-type]
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
    toys = [FaultServer(chunk=2) for _ in range(2)]
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
    chunk = read_generate(200, body(), EXPECTED)
    assert chunk.versions.tolist() == [0, 1] and chunk.logprobs.tolist() == [-1.0, -2.0]
    assert not chunk.uncertain


@pytest.mark.parametrize(
    ("status", "payload", "kind"),
    [
        (200, b"", PoolErrorKind.BAD_ANSWER),
        (200, b"[]", PoolErrorKind.BAD_ANSWER),
        (200, b'{"error": "x"}', PoolErrorKind.SERVER_ERROR),
        (429, b"slow down", PoolErrorKind.BUSY),
        (401, b"{}", PoolErrorKind.FORBIDDEN),
        (404, b"", PoolErrorKind.BAD_REQUEST),
        (502, b"<html>", PoolErrorKind.SERVER_ERROR),
        (200, body(id="b/1/"), PoolErrorKind.BAD_ANSWER),
        (200, body(finish_reason=None), PoolErrorKind.BAD_ANSWER),
        (200, body(weight_versions=[]), PoolErrorKind.BAD_ANSWER),
        (200, body(weight_versions=[{"version": "r-0"}]), PoolErrorKind.BAD_ANSWER),
        (200, body(weight_versions=[{"version": "?", "start": 0, "end": 2}]), "wrong_version"),
        (200, body(output_token_logprobs=[[-1.0, 3]]), PoolErrorKind.BAD_ANSWER),
        (200, body(output_token_logprobs=[["x", 3], [0, 4]]), PoolErrorKind.BAD_ANSWER),
        (
            200,
            body(finish_reason={"type": "abort", "status_code": 503, "message": "full"}),
            PoolErrorKind.BUSY,
        ),
    ],
)
def test_an_unusable_answer_is_named(status, payload, kind):
    with pytest.raises(PoolError) as error:
        read_generate(status, payload, EXPECTED)
    assert error.value.kind == kind


def test_weights_older_than_at_send_are_lost_weights():
    """A server that came back with its first weights may not pass for the trainer's newest."""
    with pytest.raises(PoolError, match="weights 'r-0', 'r-1' or newer expected") as error:
        read_generate(200, body(), replace(EXPECTED, oldest=1))
    assert error.value.kind == PoolErrorKind.WRONG_VERSION


def test_the_newest_version_alone_is_uncertain_when_it_changed_meanwhile():
    chunk = read_generate(200, body(weight_versions=None), EXPECTED)
    assert chunk.versions.tolist() == [0, 0] and chunk.uncertain


@pytest.mark.parametrize(
    ("last", "uncertain"), [("r-0", False), ("r-1", True)], ids=["one version", "two versions"]
)
def test_a_first_and_a_last_version_are_exact_only_when_equal(last, uncertain):
    ends = {"weight_version_start": "r-0", "weight_version_end": last}
    chunk = read_generate(200, body(weight_versions=None, **ends), EXPECTED)
    assert chunk.versions.tolist() == [0, 0] and chunk.uncertain is uncertain


def test_the_toys_oracle_notices_a_wrong_token():
    ids = np.asarray([1, 2, 3], np.int32)
    assert toy_logprobs(ids, "w0")[1:].tolist().count(-9.0) > 0
