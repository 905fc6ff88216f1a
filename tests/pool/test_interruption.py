"""Seams of a completion are invisible: tokens, figures, stop strings, budget."""

from __future__ import annotations

import asyncio

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agentcpm_jax.pool.errors import PoolError, PoolErrorKind
from agentcpm_jax.pool.interruption import PoolCounters, RetryLimits, complete
from agentcpm_jax.pool.protocol import Chunk, generate_body
from agentcpm_jax.rollout.policy import Completion, Finish, SampleRequest, SamplingParams

LETTERS = "abcd"
LIMITS = RetryLimits(timeout=60.0, failures=4, backoff=0.0, backoff_max=0.0)


def decode(ids) -> str:
    return "".join(LETTERS[i] for i in ids)


def play(text: list[int], cuts: list[int], strings: tuple[str, ...], budget: int) -> Completion:
    """A server that would say `text`, stops at strings within what it said itself, and is aborted
    after each number of tokens in `cuts`."""
    remaining = list(cuts)

    async def send(prefix: np.ndarray, rest: int, number: int) -> Chunk:
        start = len(prefix) - 1
        assert start + rest == budget
        count = remaining.pop(0) if remaining else len(text)
        ids, finish = [], Finish.LENGTH
        for token in text[start : start + rest]:
            if len(ids) == count:
                finish = Finish.ABORT
                break
            ids.append(token)
            if any(s in decode(ids) for s in strings):
                finish = Finish.STOP
                break
        whole = np.asarray(ids, np.int32)
        return Chunk(whole, -(start + np.arange(len(ids), dtype=np.float32)), whole * 0, finish)

    params = SamplingParams(1.0, stop_strings=strings)
    request = SampleRequest("r/", np.asarray([0], np.int32), budget, params)
    return asyncio.run(complete(request, send, LIMITS, PoolCounters(), decode))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    text=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    cuts=st.lists(st.integers(1, 4), max_size=6),
    string=st.text(LETTERS, min_size=1, max_size=3),
    budget=st.integers(1, 12),
)
def test_however_it_is_interrupted_the_completion_is_the_same(text, cuts, string, budget) -> None:
    whole = play(text, [], (string,), budget)
    found = play(text, cuts, (string,), budget)
    assert found.ids.tolist() == whole.ids.tolist()
    assert found.logprobs.tolist() == whole.logprobs.tolist()
    assert (found.finish, found.error) == (whole.finish, "")


def test_a_stop_string_across_a_seam_ends_it() -> None:
    found = play([0, 1, 2, 3, 0], [2], ("bc",), 5)
    assert (found.ids.tolist(), found.finish) == ([0, 1, 2], Finish.STOP)
    assert len(found.ids) == len(found.logprobs) == len(found.versions)


def test_what_was_kept_comes_with_a_failure() -> None:
    async def send(prefix: np.ndarray, rest: int, number: int) -> Chunk:
        if number > 1:
            raise PoolError(PoolErrorKind.BUSY, "http://a", "full")
        ids = np.asarray([1, 2], np.int32)
        return Chunk(ids, ids.astype(np.float32), ids, Finish.ABORT)

    request = SampleRequest("r/", np.asarray([0], np.int32), 9)
    counters = PoolCounters()
    found = asyncio.run(complete(request, send, LIMITS, counters))
    assert (found.ids.tolist(), found.finish) == ([1, 2], Finish.ERROR)
    assert found.error == "busy: http://a: full" and counters.errors == {"busy": 4}


def test_attempts_that_bring_nothing_are_ever_further_apart(monkeypatch) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    async def send(prefix: np.ndarray, rest: int, number: int) -> Chunk:
        if number == 5:  # progress: the next failure is a first one again
            ids = np.asarray([1], np.int32)
            return Chunk(ids, ids.astype(np.float32), ids, Finish.ABORT)
        raise PoolError(PoolErrorKind.BUSY, "http://a", "full")

    monkeypatch.setattr("agentcpm_jax.pool.interruption.asyncio.sleep", sleep)
    request = SampleRequest("r/", np.asarray([0], np.int32), 9)
    limits = RetryLimits(timeout=60.0, failures=6, backoff=0.2, backoff_max=1.0)
    asyncio.run(complete(request, send, limits, PoolCounters()))
    assert pauses == [0.2, 0.4, 0.8, 1.0, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_nothing_is_left_to_a_servers_own_defaults() -> None:
    plain = generate_body("r/", [1], 5, SamplingParams())["sampling_params"]
    whole = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "stop": []}
    penalties = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
    assert plain.items() >= (whole | penalties).items() and "sampling_seed" not in plain
    params = SamplingParams(top_p=0.9, top_k=5, min_p=0.1, stop_strings=("</a>",))
    full = generate_body("r/", [1], 5, params, seed=3)["sampling_params"]
    chosen = {"top_p": 0.9, "top_k": 5, "min_p": 0.1, "stop": ["</a>"], "sampling_seed": 3}
    assert full == plain | chosen
