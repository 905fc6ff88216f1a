"""A stream adds up to the whole answer; a client that leaves ends its request."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import pytest

from agentcpm_jax.engine.streaming import BROKEN, GrowingText, without_beginnings
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.tokenizer import load_chat
from agentcpm_jax.rollout.policy import Finish
from tests.doubles.fault_server import FaultServer, ToyEngine
from tests.doubles.toy_pool import Servers, wait_for

CHAT = load_chat(SHIPPED["shipped:sft"])
HI = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "a </tool_call> b"}}\n</tool_call>'


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    running = Servers()
    yield running
    running.close()


def events(url: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a stream, which `[DONE]` ends."""
    sent = body | {"stream": True}
    with httpx.stream("POST", url + path, json=sent, timeout=60, trust_env=False) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["Content-Type"] == "text/event-stream"
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def whole(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(url + path, json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return answer.json()


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of the deltas."""
    message: dict[str, Any] = {"content": "", "tool_calls": []}
    for part in parts:
        for choice in part["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["tool_calls"] += delta.get("tool_calls") or []
    return message


@pytest.mark.parametrize("seed", range(5))
def test_a_chat_in_parts_is_the_chat(servers, seed):
    url = servers.start(FaultServer(Says(mixed(seed, 40)), chat=CHAT, chunk=5))
    body = {"messages": HI, "max_tokens": 90, "stop": ["aa", "\n\n", "😀é "], "rid": "chat/"}
    body |= {"tools": TOOLS} if seed % 2 else {}
    parts = events(url, "/v1/chat/completions", body)
    answer = whole(url, "/v1/chat/completions", body)
    (choice,) = answer["choices"]
    assert joined(parts)["content"] == (choice["message"]["content"] or "")
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    finishes = [part["choices"][0]["finish_reason"] for part in parts]
    assert finishes == [None] * (len(parts) - 1) + [choice["finish_reason"]]
    assert parts[-1]["usage"] == answer["usage"]
    assert parts[-1]["metadata"] == answer["metadata"]
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    assert {part["id"] for part in parts} == {"chat/"}


def test_usage_comes_in_a_part_of_its_own_when_it_is_asked_for(servers):
    url = servers.start(FaultServer(ToyEngine(544, 1024), chat=CHAT))
    body = {"messages": HI, "max_tokens": 4, "stream_options": {"include_usage": True}}
    *parts, last = events(url, "/v1/chat/completions", body)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4
    assert all("usage" not in part for part in parts)


@pytest.mark.parametrize(
    ("said", "content", "calls"),
    [
        (f"Well.\n\n{CALL}", "Well.", 1),
        (f"{CALL}\n{CALL} and so on", "and so on", 2),
        ("a <tool_call", "a <tool_call", 0),
        ("a <tool_call>\n{bad\n</tool_call> b", "a <tool_call>\n{bad\n</tool_call> b", 0),
        (f"<think>not {CALL}</think> but this", f"<think>not {CALL}</think> but this", 0),
    ],
)
def test_tool_calls_come_whole_and_are_no_content(servers, said, content, calls):
    url = servers.start(FaultServer(Says(said), chat=CHAT, chunk=3))
    body = {"messages": HI, "tools": TOOLS, "max_tokens": 500}
    parts = events(url, "/v1/chat/completions", body)
    message = whole(url, "/v1/chat/completions", body)["choices"][0]["message"]
    found = joined(parts)
    assert found["content"].strip() == content == message["content"]
    assert len(found["tool_calls"]) == calls
    for called in found["tool_calls"]:
        arguments = json.loads(called["function"]["arguments"])
        assert arguments == {"query": "a </tool_call> b"}
    finish = parts[-1]["choices"][0]["finish_reason"]
    assert finish == ("tool_calls" if calls else "stop")


def test_generate_streams_what_there_is_and_the_seed_decides_all(servers):
    url = servers.start(FaultServer(Says(mixed(7, 20)), chat=CHAT, chunk=4))
    params = {"max_new_tokens": 90, "sampling_seed": 3, "stop": ["zz"]}
    body = {"text": "who wrote it", "sampling_params": params, "return_logprob": True}
    parts = events(url, "/generate", body)
    answer = whole(url, "/generate", body)
    last = parts[-1]
    assert (last["text"], last["output_ids"]) == (answer["text"], answer["output_ids"])
    assert len(parts) >= 10
    for earlier, later in pairwise(parts):
        assert later["text"].startswith(earlier["text"]) and BROKEN not in later["text"]
        assert later["output_ids"][: len(earlier["output_ids"])] == earlier["output_ids"]
        assert earlier["meta_info"]["finish_reason"] is None
    params["stream_interval"] = 20
    assert len(events(url, "/generate", body)) <= 3


def test_what_stops_it_is_in_no_part(servers):
    url = servers.start(FaultServer(Says("who wrote it"), chat=CHAT))
    parts = events(url, "/generate", {"text": "q", "sampling_params": {"max_new_tokens": 60}})
    assert all("<|im_end|>" not in part["text"] for part in parts)
    assert parts[-1]["meta_info"]["finish_reason"]["matched"] == CHAT.im_end_id


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
def test_a_client_that_leaves_ends_its_request(servers, path):
    server = FaultServer(ToyEngine(544, 1 << 20), chat=CHAT, chunk=4)
    url = servers.start(server)
    body = {"stream": True, "rid": "left/"}
    if path == "/generate":
        body |= {"input_ids": [1], "sampling_params": {"max_new_tokens": 10**6}}
    else:
        body |= {"messages": HI, "max_tokens": 10**6, "ignore_eos": True}
    with httpx.stream("POST", url + path, json=body, timeout=60, trust_env=False) as answer:
        next(answer.iter_lines())
        assert server.sessions.running == 1
    wait_for(lambda: not server.sessions.running)


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
def test_a_failure_before_the_first_part_is_a_status_and_a_later_one_is_said(servers, path):
    body = {"stream": True}
    if path == "/generate":
        body |= {"input_ids": [1], "sampling_params": {"max_new_tokens": 9}}
    else:
        body |= {"messages": HI, "max_tokens": 9}
    for calls in (0, 1):
        url = servers.start(FaultServer(Fails(calls), chat=CHAT, chunk=4))
        with httpx.stream("POST", url + path, json=body, timeout=60, trust_env=False) as answer:
            assert answer.status_code == (200 if calls else 500)
            assert "it broke" in answer.read().decode()
        assert httpx.get(url + "/health", trust_env=False).status_code == 503


# --- the text of ids that come one after another ------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_growing_text_is_a_beginning_of_the_whole(seed):
    rng, text = random.Random(seed), mixed(seed, 20)
    ids = CHAT.encode_text(text).tolist()
    if seed % 2:  # and bytes that are no characters
        ids += [rng.randrange(300) for _ in range(90)]
    growing, said, end = GrowingText(CHAT.decode), "", 0
    while end < len(ids):
        end += rng.randrange(1, 4)
        before, said = said, growing.extend(ids[:end])
        assert said.startswith(before)
    complete = growing.extend(ids, end=True)
    assert complete.startswith(said)
    assert seed % 2 or complete == text


@pytest.mark.parametrize(
    ("text", "marks", "sure"),
    [
        ("abc", (), 3),
        ("abc", ("cd",), 2),
        ("abab", ("abc", "babx"), 1),
        ("abcd", ("abcd",), 4),  # complete: it is not held back
        ("a<tool", ("<tool_call>",), 1),
    ],
)
def test_the_beginning_of_a_mark_waits(text, marks, sure):
    assert without_beginnings(text, marks) == sure


def mixed(seed: int, count: int) -> str:
    """Letters of one to four bytes, which cuts between ids run through."""
    rng = random.Random(seed)
    return "".join(rng.choice(["é", "😀", "a", " ", "\n", "漢", "search"]) for _ in range(count))


class Says(ToyEngine):
    """Says one text to everybody, control tokens included, and ends its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(544, 1024)
        self._ids = [*CHAT.raw_ids(text).tolist(), CHAT.im_end_id]

    async def sample(self, request):
        done = await super().sample(replace(request, progress=None))
        start = request.params.seed[-1]  # the server's chunks begin at this token
        said = self._ids[start : start + request.max_new_tokens]
        return replace(
            done,
            ids=np.asarray(said, np.int32),
            logprobs=np.zeros(len(said), np.float32),
            versions=done.versions[: len(said)],
            finish=Finish.STOP if said[-1] in request.params.stop_ids else Finish.LENGTH,
        )


class Fails(ToyEngine):
    """Samples so many chunks, then has failed."""

    def __init__(self, calls: int) -> None:
        super().__init__(544, 1024)
        self._left = calls

    async def sample(self, request):
        if self._left:
            self._left -= 1
            return await super().sample(request)
        done = await super().sample(replace(request, progress=None))
        self.failure = "engine failed: it broke"
        return replace(done, finish=Finish.ERROR, error=self.failure)
