"""What our server adds to the contract: who may control it, what it refuses, seeds, batches."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from agentcpm_jax.engine.requests import RequestLimits, parse_generate
from agentcpm_jax.engine.server import CONTROL, ServerConfig, ServerKeys, is_loopback
from agentcpm_jax.engine.sessions import version_spans
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.tokenizer import load_chat
from agentcpm_jax.rollout.policy import Finish, SamplingParams
from agentcpm_jax.types import UserError
from tests.doubles.fault_server import FaultServer, ToyEngine, toy_next, toy_state
from tests.doubles.toy_pool import Servers, wait_for
from tests.pool.contract_suite import body, in_flight

ROOT = Path(__file__).parents[2]
LIMITS = RequestLimits(capacity=64, vocab_size=100)


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    running = Servers()
    yield running
    running.close()


def post(url: str, path: str, json=None, key: str = "", **headers: str) -> httpx.Response:
    sent = headers | ({"Authorization": f"Bearer {key}"} if key else {})
    return httpx.post(url + path, json=json or {}, headers=sent, timeout=60, trust_env=False)


def generate(url: str, **changes) -> dict:
    answer = post(url, "/generate", body(6, 1.0, **changes))
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- who may ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONTROL))
def test_control_needs_the_admin_key_unless_on_loopback(servers, path):
    local = servers.start(FaultServer())
    assert post(local, path, {"model_path": "x", "new_version": "v"}).status_code in (200, 400)
    assert post(local, path, Origin="https://example.org").status_code == 403
    public = servers.start(FaultServer(cfg=ServerConfig("0.0.0.0", 0)))
    answer = post(public.replace("0.0.0.0", "127.0.0.1"), path)
    assert answer.status_code == 403
    said = answer.json()["error"]["message"]
    assert said == f"{path} needs an admin key, and this server has none"


def test_two_keys_open_two_sets_of_routes(servers):
    url = servers.start(FaultServer(keys=ServerKeys("ordinary", "admin")))
    for path, request in (("/generate", body(2)), ("/abort_request", {"rid": "x"})):
        right, wrong = ("ordinary", "admin") if path == "/generate" else ("admin", "ordinary")
        assert post(url, path, request, right).status_code == 200
        for key in (wrong, "", "ordinar"):
            assert post(url, path, request, key).status_code == 401
    for path in ("/health", "/metrics"):
        assert httpx.get(url + path, trust_env=False).status_code == 200
    info = httpx.get(url + "/model_info", trust_env=False)
    assert info.status_code == 401 and "ordinary" not in info.text


@pytest.mark.parametrize(
    ("host", "local"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "")),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host, local):
    assert is_loopback(host) is local


# --- what it does ---------------------------------------------------------------------------


def test_a_batch_has_one_answer_per_prompt(servers):
    url = servers.start(FaultServer())
    answers = generate(url, input_ids=[[1, 2], [3]], rid=["a/", "b/"])
    assert [a["meta_info"]["id"] for a in answers] == ["a/", "b/"]
    for prompt, answer in zip(([1, 2], [3]), answers, strict=True):
        assert answer["output_ids"][0] == toy_next(toy_state(prompt), "base", 97)[0]


def test_a_running_rid_is_not_given_twice_and_a_prefix_aborts_all_its_requests(servers):
    server = FaultServer(chunk=1)
    url = servers.start(server)
    with in_flight(Url(url), 2000, rid="same/1/") as answers:
        refused = post(url, "/generate", body(2, rid="same/1/"))
        post(url, "/abort_request", {"rid": "same/"})
    assert refused.status_code == 400 and "duplicate request id" in refused.text
    assert answers[-1]["meta_info"]["finish_reason"]["type"] == "abort"


def test_a_client_that_goes_away_ends_its_request(servers):
    server = FaultServer(ToyEngine(capacity=1 << 20), chunk=1)
    url = servers.start(server)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + "/generate", json=body(10**6), timeout=0.3, trust_env=False)
    wait_for(lambda: not server.sessions.running)
    assert server.sessions.total["requests"] == 1


def test_sampling_parameters_reach_the_engine(servers):
    toy = Remembers()
    url = servers.start(FaultServer(toy))
    generate(url, sampling_params={"top_p": 0.9, "top_k": -1, "min_p": None})
    generate(url, sampling_params={"top_k": 20, "min_p": 0.1})
    first, second = toy.seen
    assert (first.top_p, first.top_k, first.min_p) == (0.9, 0, 0.0)
    assert (second.top_p, second.top_k, second.min_p) == (1.0, 20, 0.1)


def test_what_stopped_it_leaves_the_text_unless_it_is_to_stay(servers):
    chat = load_chat(SHIPPED["shipped:sft"])
    ids = [*chat.encode_text("who wrote it").tolist(), chat.im_end_id]
    url = servers.start(FaultServer(Speaks(ids), chat=chat))
    params = {"max_new_tokens": 32, "stop_token_ids": [chat.im_end_id], "ignore_eos": False}
    for kept in (False, True):
        answer = generate(url, sampling_params=params | {"no_stop_trim": kept})
        assert answer["output_ids"] == ids
        assert answer["text"] == chat.decode(ids if kept else ids[:-1])


def test_the_cache_is_not_flushed_under_a_request(servers):
    url = servers.start(FaultServer(chunk=1))
    with in_flight(Url(url), 2000, rid="runs/1/"):
        refused = post(url, "/flush_cache")
        post(url, "/abort_request", {"rid": "runs/1/"})
    assert refused.status_code == 400 and "requests are running" in refused.text
    assert post(url, "/flush_cache").status_code == 200


def test_metrics_count_what_happened(servers):
    url = servers.start(FaultServer())
    generate(url)
    text = httpx.get(url + "/metrics", trust_env=False).text
    assert "# TYPE sglang:generation_tokens_total counter" in text
    assert "sglang:generation_tokens_total 6" in text
    assert "sglang:prompt_tokens_total 5" in text


def test_a_tool_call_becomes_one_in_the_answer(servers):
    chat = load_chat(SHIPPED["shipped:sft"])
    call = chat.encode_text('<tool_call>\n{"name": "search", "arguments": {"query": "a"}}\n')
    ids = [*call.tolist(), chat.tool_call_end_id, chat.im_end_id]
    ids[: len(chat.encode_text("<tool_call>"))] = [chat.tool_call_start_id]
    url = servers.start(FaultServer(Speaks(ids), chat=chat))
    tools = [{"type": "function", "function": {"name": "search", "parameters": {}}}]
    request = {"messages": [{"role": "user", "content": "who"}], "tools": tools, "max_tokens": 90}
    found = post(url, "/v1/chat/completions", request).json()["choices"][0]
    assert found["finish_reason"] == "tool_calls"
    assert found["message"]["content"] is None
    (called,) = found["message"]["tool_calls"]
    assert called["function"] == {"name": "search", "arguments": '{"query": "a"}'}


# --- what it refuses ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": []}, "at least one id"),
        ({"input_ids": [100]}, "input_ids holds 100; the vocabulary has 100 ids"),
        ({"input_ids": [1.5]}, "input_ids holds 1.5"),
        ({"input_ids": [1] * 64}, "longer than the model's context length"),
        ({"input_ids": [1] * 60}, "exceeds the model's maximum context length of 64"),
        ({"input_ids": None}, "exactly one of"),
        ({"text": "no tokenizer"}, "exactly one of"),
        ({"logprob_start_len": 0}, "logprob_start_len"),
        ({"top_logprobs_num": 3}, "top_logprobs_num"),
        ({"sampling_params": {"max_new_tokens": 0}}, "max_new_tokens=0"),
        ({"sampling_params": {"temperature": -1}}, "temperature=-1"),
        ({"sampling_params": {"repetition_penalty": 1.1}}, "repetition_penalty=1.1 is not"),
        ({"sampling_params": {"json_schema": "{}"}}, "json_schema"),
        ({"sampling_params": {"n": 2}}, "n=2 is not supported"),
        ({"sampling_params": {"top_p": 0}}, "top_p=0 must be a number above 0"),
        ({"sampling_params": {"top_k": 1.5}}, "top_k=1.5 must be -1 for all"),
        ({"sampling_params": {"min_p": "x"}}, "min_p='x' must be a number from 0 to 1"),
        (
            {"sampling_params": {"stop_token_ids": [*range(9)], "ignore_eos": False}},
            "9 stop ids, the model's included; at most 8",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        parse_generate(body(8, **changes), LIMITS, None)


def test_stop_ids_of_the_model_hold_unless_they_are_switched_off():
    limits = RequestLimits(64, 100, stop_ids=(7,))
    params = {"max_new_tokens": 4, "stop_token_ids": [9]}
    (job,) = parse_generate({"input_ids": [1], "sampling_params": params}, limits, None)
    assert job.stop_ids == (9, 7)
    params["ignore_eos"] = True
    (job,) = parse_generate({"input_ids": [1], "sampling_params": params}, limits, None)
    assert job.stop_ids == ()


def test_spans_are_half_open_and_contiguous():
    assert version_spans([], "v") == [{"version": "v", "start": 0, "end": 0}]
    assert version_spans(["a", "a", "b"], "b") == [
        {"version": "a", "start": 0, "end": 2},
        {"version": "b", "start": 2, "end": 3},
    ]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "model nowhere is not a directory"),
        (str(ROOT / "configs"), "config.json is missing"),
    ],
)
def test_the_launcher_names_a_mistake_in_one_line(model, message):
    command = [sys.executable, "launch/serve.py", model, "--port=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


class Url:
    """As much of a `Subject` as `in_flight` asks for."""

    def __init__(self, url: str) -> None:
        self.url = url


class Remembers(ToyEngine):
    """Keeps the sampling parameters of what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[SamplingParams] = []

    async def sample(self, request):
        self.seen.append(request.params)
        return await super().sample(request)


class Speaks(ToyEngine):
    """Says the same ids to everybody."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__(544, 1024)
        self._ids = ids

    async def sample(self, request):
        done = await super().sample(request)
        start = request.params.seed[-1]  # the server's chunks begin at this token
        said = self._ids[start : start + request.max_new_tokens]
        n = len(said)
        stop = bool(said) and said[-1] in request.params.stop_ids
        return replace(
            done,
            ids=np.asarray(said, np.int32),
            logprobs=np.zeros(n, np.float32),
            versions=done.versions[:n],
            finish=Finish.STOP if stop else Finish.LENGTH,
        )
