"""Which worker a request goes to, and what an answer says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def body(top=None, **meta) -> bytes:
    meta = {
        "id": "a/1/",
        "finish_reason": {"type": "length"},
        "completion_tokens": 2,
        "output_token_logprobs": [[-1.0, 3, None], [-2.0, 4, None]],
        "weight_version": "r-1",
        "weight_versions": [
            {"version": "r-0", "start": 0, "end": 1},
            {"version": "r-1", "start": 1, "end": 2},
        ],
    } | meta
    return json.dumps(
        {"text": "ab", "output_ids": [3, 4], "meta_info": meta} | (top or {})
    ).encode()


def rows(*pairs) -> bytes:
    """An answer whose rows of (log-probability, id) stand alone."""
    found = [[*pair, None] for pair in pairs]
    one = [{"version": "r-0", "start": 0, "end": len(found)}]
    count = len(found)
    return body(
        {"output_ids": None},
        output_token_logprobs=found,
        completion_tokens=count,
        weight_versions=one,
    )


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
        (500, body(), PoolErrorKind.SERVER_ERROR),
        (302, body(), PoolErrorKind.SERVER_ERROR),
        (200, body({"error": "x"}), PoolErrorKind.SERVER_ERROR),
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


UNTRUE = {
    "log-probability above 0": rows((0.5, 3), (-2, 4)),
    "a little above 0": rows((1e-3, 3), (-2, 4)),
    "one of probability 0": rows((-9999.0, 3), (-2, 4)),
    "of 400 digits": rows((-(10**400), 3), (-2, 4)),
    "true": rows((True, 3), (-2, 4)),
    "a text": rows(("-1.5", 3), (-2, 4)),
    "missing": rows((-1,), (-2,)),
    "negative id": rows((-1, -1), (-2, 4)),
    "id beyond 64 bits": rows((-1, 2**70), (-2, 4)),
    "id with a fraction": rows((-1, 3.7), (-2, 4)),
    "id 3.0": rows((-1, 3.0), (-2, 4)),
    "id true": rows((-1, True), (-2, 4)),
    "id null": rows((-1, None), (-2, 4)),
    "id text": rows((-1, "3"), (-2, 4)),
    "rows are objects": body(output_token_logprobs=[{"0": -1, "1": 3}]),
    "rows are a number": body(output_token_logprobs=5),
    "rows are true": body(output_token_logprobs=True),
    "ids are a number": body({"output_ids": 5}),
    "ids are a text": body({"output_ids": "ab"}),
    "ids are an object": body({"output_ids": {"3": 1}}),
    "more tokens than asked for": rows(*[(-1, 3)] * 5),
    "fewer rows than tokens": body({"output_ids": None}, completion_tokens=3),
    "fewer rows than ids": body(completion_tokens=None, output_token_logprobs=[[-1, 3]]),
    "a count that is true": body(completion_tokens=True),
    "text without rows": body({"output_ids": None}, output_token_logprobs=None),
    "nothing, and it stopped": body(
        {"output_ids": [], "text": ""},
        output_token_logprobs=[],
        weight_versions=[],
        completion_tokens=0,
        finish_reason={"type": "stop", "matched": 4},
    ),
    "stopped by another id than the last": body(finish_reason={"type": "stop", "matched": 3}),
    "stopped by a text nobody asked for": body(finish_reason={"type": "stop", "matched": "NaN"}),
    "unknown finish": body(finish_reason={"type": "banana"}),
    "finish a text": body(finish_reason="stop"),
    "finish a list": body(finish_reason={"type": ["stop"]}),
    "status a list": body(finish_reason={"type": "abort", "status_code": [1]}),
    "status an object": body(finish_reason={"type": "abort", "status_code": {}}),
    "spans a number": body(weight_versions=5),
    "spans a text": body(weight_versions="x"),
    "spans with fractions": body(weight_versions=[{"version": "r-0", "start": 0, "end": 2.0}]),
    "spans of texts": body(weight_versions=[{"version": "r-0", "start": "0", "end": "2"}]),
    "spans that begin at false": body(
        weight_versions=[{"version": "r-0", "start": False, "end": 2}]
    ),
    "spans that overlap": body(
        weight_versions=[
            {"version": "r-0", "start": 0, "end": 2},
            {"version": "r-1", "start": 1, "end": 2},
        ]
    ),
    "spans that go back in time": body(
        weight_versions=[
            {"version": "r-1", "start": 0, "end": 1},
            {"version": "r-0", "start": 1, "end": 2},
        ]
    ),
    "a version that is a list": body(weight_versions=[{"version": ["r-0"], "start": 0, "end": 2}]),
    "no id": body(id=None),
    "meta a text": b'{"meta_info": "x"}',
    "a list": b"[1]",
    "a number": b"5",
    "deep": b'{"meta_info":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "a number of 5000 digits": b'{"meta_info": ' + b"9" * 5000 + b"}",
    "not UTF-8": b"\xff\xfe",
    "UTF-16": body().decode().encode("utf-16"),
    "two values": body() + b"x",
}


@pytest.mark.parametrize("payload", UNTRUE.values(), ids=UNTRUE.keys())
def test_what_cannot_be_true_is_a_bad_answer(payload) -> None:
    with pytest.raises(PoolError) as error:
        read_generate(200, payload, EXPECTED)
    assert error.value.kind == PoolErrorKind.BAD_ANSWER
    assert str(error.value).isprintable() and len(str(error.value)) < 500


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "Infinity", "1e400", "null"])
def test_a_log_probability_that_is_no_number_is_named(number) -> None:
    payload = body().replace(b"-2.0", number.encode())
    with pytest.raises(PoolError, match="at token 1") as error:
        read_generate(200, payload, EXPECTED)
    assert error.value.kind == PoolErrorKind.NON_FINITE


def test_an_answer_may_end_for_its_length_only_when_it_is_that_long() -> None:
    assert len(read_generate(200, body(), EXPECTED).ids) == 2  # the context's length is not known
    with pytest.raises(PoolError, match="finish length after 2 of 4 tokens"):
        read_generate(200, body(), replace(EXPECTED, least=4))
    cut = body(finish_reason={"type": "abort"})  # it goes on elsewhere
    assert len(read_generate(200, cut, replace(EXPECTED, least=4)).ids) == 2


def test_stop_strings_and_rounding_are_no_lies() -> None:
    stopped = body(finish_reason={"type": "stop", "matched": "</a>"})
    chunk = read_generate(200, stopped, replace(EXPECTED, stop_strings=("</a>",)))
    assert chunk.finish == "stop"
    rounded = read_generate(200, rows((1e-7, 3), (0, 4)), EXPECTED)
    assert rounded.logprobs.tolist() == [0.0, 0.0]


def test_a_message_holds_nothing_that_a_log_or_a_terminal_could_trip_over() -> None:
    for text in ("\ud800", "a\0b", "\x1b[2J", "a\nb", "x" * 10**6):
        abort = body(finish_reason={"type": "abort", "status_code": 400, "message": text})
        with pytest.raises(PoolError) as error:
            read_generate(200, abort, EXPECTED)
        assert str(error.value).isprintable() and len(str(error.value)) < 500


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=5)
    | st.sampled_from(["stop", "length", "abort", "r-0", "r-1", "a/1/", 0, 1, 2, 3, -1.0]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(derandomize=True, deadline=None, max_examples=500)
@given(data=st.data())
def test_whatever_is_changed_in_an_answer_it_is_sound_or_a_pool_error(data) -> None:
    """Values replaced, removed and doubled anywhere in a true answer, and bytes cut or flipped."""
    answer = json.loads(body())
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        places = list(_places(answer))
        holder, key = places[data.draw(st.integers(0, len(places) - 1), label="place")]
        how = data.draw(st.sampled_from(["replace", "remove", "double"]), label="how")
        if how == "replace":
            holder[key] = data.draw(JUNK, label="value")
        elif how == "remove":
            del holder[key]
        elif isinstance(holder, list):
            holder.append(holder[key])
    payload = json.dumps(answer).encode()
    if data.draw(st.booleans(), label="damage"):
        at = data.draw(st.integers(0, len(payload) - 1), label="at")
        flipped = bytes([payload[at] ^ data.draw(st.integers(1, 255), label="by")])
        payload = payload[:at] + data.draw(st.sampled_from([b"", flipped + payload[at + 1 :]]))
    status = data.draw(st.sampled_from([200, 200, 200, 204, 307, 400, 500]), label="status")
    try:
        chunk = read_generate(status, payload, EXPECTED)
    except PoolError as error:
        assert str(error).isprintable()
        return
    assert len(chunk.ids) == len(chunk.logprobs) == len(chunk.versions) <= EXPECTED.budget
    assert all(0 <= i < EXPECTED.vocab_size for i in chunk.ids)
    assert all(-104 <= value <= 0 for value in chunk.logprobs)
    assert set(chunk.versions.tolist()) <= {0, 1} and (np.diff(chunk.versions) >= 0).all()
    assert len(chunk.ids) or chunk.finish == "abort"


def _places(value) -> Iterator[tuple[Any, Any]]:
    """(what holds it, its key) of every value below `value`."""
    keys = value if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


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
