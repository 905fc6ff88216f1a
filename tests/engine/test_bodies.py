"""A body with a wrong type, range or name is status 400, by its name, and harms nobody else."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from agentcpm_jax.engine.server import MAX_BODY_BYTES
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.tokenizer import load_chat
from tests.doubles.fault_server import FaultServer, ToyEngine
from tests.doubles.toy_pool import Servers

CLIENT = httpx.Client(timeout=60, trust_env=False)
HUGE = 10**400
HALF = "\ud800"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    running = Servers()
    chat = load_chat(SHIPPED["shipped:sft"])
    yield running.start(FaultServer(ToyEngine(544, 1024), chat=chat))
    running.close()


def send(url: str, path: str, body: Any, **headers: str) -> httpx.Response:
    """A body as it stands, or as JSON with NaN and lone surrogates, which `httpx` refuses."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return CLIENT.post(url + path, content=raw, headers=headers)


def sampling(**params: Any) -> dict[str, Any]:
    return {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 2, **params}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HI, "max_tokens": 2, **fields}


def deep(levels: int) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(levels):
        inner = {"a": inner}
    return inner


def tool(**function: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f", **function}}]


def test_what_is_right_is_answered(url):
    for path, body in [
        ("/generate", sampling(stop=["x", "y"], top_k=-1, n=1, logit_bias=None, top_p=1)),
        ("/generate", sampling() | {"extra_key": "v1", "stream": False, "lora_path": None}),
        ("/generate", json.dumps(sampling()).encode("utf-16")),
        ("/v1/chat/completions", chat(tool_choice="auto", tools=tool(parameters={"a": [1]}))),
        ("/v1/chat/completions", chat(response_format={"type": "text"}, user="me", n=1)),
        ("/v1/chat/completions", chat(chat_template_kwargs={"enable_thinking": False})),
        ("/update_weight_version", {"new_version": "base", "abort_all_requests": False}),
        ("/detokenize", {"tokens": [3, 4]}),
    ]:
        answer = send(url, path, body)
        assert answer.status_code == 200, (body, answer.text)


SAMPLING = [
    *[("max_new_tokens", v) for v in ("5", 2.5, True, [], -1, 0, 2**70, HUGE)],
    *[("temperature", v) for v in ("1", True, [1], -1, 1e308, HUGE, float("nan"), float("inf"))],
    *[("top_p", v) for v in ("1", 0, 2, -1, True, float("nan"))],
    *[("top_k", v) for v in (1.5, "4", True, -2, 2**31, 2**40, HUGE, 1e300, float("nan"))],
    *[("min_p", v) for v in (-0.1, 1.1, "0", float("inf"))],
    *[("sampling_seed", v) for v in ("a", 1.5, [1], 2**63, HUGE, True)],
    *[("stop", v) for v in (5, [5], "", [""], [["a"]], {"a": 1}, HALF, "x" * 300, ["x"] * 17)],
    *[("stop_token_ids", v) for v in (5, "5", ["a"], [None], [2**40], [-1], [[1]], [True])],
    *[("ignore_eos", v) for v in (1, "true", [])],
    *[("no_stop_trim", v) for v in (0, "no")],
    *[("stream_interval", v) for v in (0, "1", 1.0)],
    *[("logit_bias", v) for v in ({"1": 5}, 5)],
    *[("n", v) for v in (2, 0, "1", True)],
    *[("frequency_penalty", v) for v in (0.5, [], False)],
    *[("repetition_penalty", v) for v in (1.1, "1", True)],
    *[("skip_special_tokens", v) for v in (True, 0)],
    *[(name, "x") for name in ("regex", "ebnf", "json_schema", "structural_tag", "stop_regex")],
    *[("top_kk", 5), ("beam_width", 2), ("", 1), (HALF, 1), ("a" * 10_000, 1)],
]


@pytest.mark.parametrize(("name", "value"), SAMPLING, ids=lambda v: repr(v)[:30])
def test_sampling_parameters(url, name, value):
    answer = send(url, "/generate", sampling(**{name: value}))
    assert answer.status_code == 400, answer.text
    said = answer.json()["error"]["message"]
    assert repr(f"sampling_params.{name}")[1:-1][:29] in said and len(said) < 1000


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input_ids": "abc"}, "input_ids='abc'"),
        ({"input_ids": 5}, "input_ids=5"),
        ({"input_ids": {"a": 1}}, "input_ids={'a': 1}"),
        ({"input_ids": [True]}, "input_ids holds True"),
        ({"input_ids": [2**70]}, "input_ids holds 1180591620717411303424"),
        ({"input_ids": [HUGE]}, "input_ids holds 1000"),
        ({"input_ids": [[]]}, "input_ids[0]=[]"),
        ({"input_ids": [[1], 2]}, "input_ids[1]=2"),
        ({"input_ids": [1, [2]]}, "input_ids holds [2]"),
        ({"input_ids": [[1], [None]]}, "input_ids[1] holds None"),
        ({"input_ids": [[1]] * 20_000}, "input_ids holds 20000 prompts"),
        ({"input_ids": [1], "text": "x"}, "exactly one of input_ids and text"),
        ({"text": 5}, "text=5"),
        ({"text": [5]}, "text[0]=5"),
        ({"text": {"a": 1}}, "text={'a': 1}"),
        ({"text": ""}, "text=''"),
        ({"text": []}, "text holds 0 prompts"),
        ({"text": HALF}, "text='\\\\ud800'"),
        ({"text": "a" * 300_000}, "text='aaaa"),
        ({"sampling_params": "abc"}, "sampling_params='abc'"),
        ({"sampling_params": [1]}, "sampling_params=[1]"),
        ({"rid": [5, 6]}, "rid=[5, 6]"),
        ({"rid": {"a": 1}}, "rid={'a': 1}"),
        ({"rid": ""}, "rid=''"),
        ({"rid": 1.5}, "rid=1.5"),
        ({"rid": True}, "rid=True"),
        ({"rid": "x" * 10**6}, "rid='xxx"),
        ({"input_ids": [[1], [2]], "rid": 5}, "rid=5"),
        ({"input_ids": [[1], [2]], "rid": ["a", "a"]}, "rid: 1 different ids for 2"),
        ({"input_ids": [[1], [2]], "stream": True}, "stream=true"),
        ({"stream": "yes"}, "stream='yes'"),
        ({"return_logprob": 1}, "return_logprob=1"),
        ({"logprob_start_len": "x"}, "logprob_start_len='x'"),
        ({"lora_path": "adapter"}, "lora_path='adapter'"),
        ({"image_data": ["x"]}, "image_data=['x']"),
        ({"sampling_parms": {}}, "unknown parameter 'sampling_parms', given as {}; did you mean"),
    ],
)
def test_generate(url, fields, named):
    given = sampling() | fields
    if "text" in fields and "input_ids" not in fields:
        del given["input_ids"]
    answer = send(url, "/generate", given)
    assert (answer.status_code, named in json.dumps(answer.json())) == (400, True), answer.text


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": None}, "messages is missing"),
        *[({"messages": v}, "messages=") for v in (5, "hi", [], {"role": "user"})],
        *[({"messages": [v]}, "messages[0]") for v in (5, "x", [], {}, {"role": 5})],
        ({"messages": [{"role": "developer", "content": "x"}]}, "messages[0].role='developer'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content=5"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]=5"),
        ({"messages": [{"role": "user", "content": "x", "audio": {}}]}, "messages[0].audio={}"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
        ({"messages": [*HI, {"role": "assistant", "tool_calls": [5]}]}, "tool_calls[0]=5"),
        ({"messages": [*HI, {"role": "assistant", "tool_calls": [{}]}]}, "tool_calls[0].function"),
        *[({"tools": v}, "tools") for v in (5, [5], [{}], [{"function": 5}], [{"function": {}}])],
        ({"tools": tool(name=[1])}, "tools[0].function.name=[1]"),
        ({"tools": tool(strict=True)}, "tools[0].function.strict=True"),
        ({"tools": tool(parameters=deep(100))}, "nested deeper than 32"),
        ({"tools": tool(parameters={"a": float("nan")})}, "tools[0].function.parameters=nan"),
        ({"tool_choice": "required"}, "tool_choice='required'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice={'type': 'function'}"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls=False"),
        ({"response_format": {"type": "json_object"}}, "response_format.type='json_object'"),
        ({"response_format": "json"}, "response_format='json'"),
        ({"logprobs": True}, "logprobs=True"),
        ({"top_logprobs": 3}, "top_logprobs=3"),
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"max_tokens": "x"}, "max_tokens='x'"),
        ({"seed": "x"}, "seed='x'"),
        ({"model": {"a": 1}}, "model={'a': 1}"),
        ({"top_k": 2**32}, "top_k=4294967296"),
        ({"stream_options": {"bogus": 1}}, "stream_options.bogus"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"functions": []}, "functions"),
    ],
)
def test_chat(url, fields, named):
    answer = send(url, "/v1/chat/completions", chat(**fields))
    assert (answer.status_code, named in answer.json()["error"]["message"]) == (400, True)


def test_what_is_no_text_is_refused_and_texts_are_joined(url):
    parts = [{"type": "text", "text": "who "}, {"type": "text", "text": "wrote it"}]
    for content in (parts, "who wrote it"):
        body = {"messages": [{"role": "user", "content": content}]}
        tokens = send(url, "/tokenize", body).json()["tokens"]
        if content is parts:
            joined = tokens
    assert joined == tokens
    image = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    answer = send(
        url, "/v1/chat/completions", chat(messages=[{"role": "user", "content": [image]}])
    )
    assert answer.status_code == 400
    assert "messages[0].content[0].type='image_url'" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/tokenize", {"prompt": 5}, "prompt=5"),
        ("/tokenize", {"prompt": HALF}, "prompt="),
        ("/tokenize", {"messages": 5}, "messages=5"),
        ("/tokenize", {}, "either a prompt or messages"),
        *[("/detokenize", {"tokens": v}, "tokens") for v in (5, "abc", ["a"], [-1], [544], [[1]])],
        ("/detokenize", {}, "tokens is missing"),
        ("/pause_generation", {"mode": 5}, "mode=5"),
        ("/pause_generation", {"mode": ["x"]}, "mode=['x']"),
        ("/continue_generation", {"now": 1}, "'now'"),
        ("/abort_request", {}, "rid is missing"),
        ("/abort_request", {"rid": {"a": 1}}, "rid={'a': 1}"),
        ("/abort_request", {"rid": [1.5]}, "rid[0]=1.5"),
        ("/abort_request", {"abort_all": "yes"}, "abort_all='yes'"),
        ("/flush_cache", {"hard": True}, "'hard'"),
        ("/update_weight_version", {}, "new_version is missing"),
        ("/update_weight_version", {"new_version": {"a": 1}}, "new_version={'a': 1}"),
        ("/update_weights_from_disk", {}, "model_path is missing"),
        *[
            ("/update_weights_from_disk", {"model_path": v}, "model_path=")
            for v in (5, "", "a\0b", "x" * 5000, HALF)
        ],
        ("/update_weights_from_disk", {"model_path": "x", "weight_version": 5}, "version=5"),
        ("/update_weights_from_disk", {"model_path": "x", "load_format": "pt"}, "load_format"),
    ],
)
def test_the_other_routes(url, path, body, named):
    answer = send(url, path, body)
    assert (answer.status_code, named in answer.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b'{"input_ids":', "not JSON"),
        (b"\0" * 100, "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        (b"[1]", "must be a JSON object, not [1]"),
        (b'"x"', "must be a JSON object, not 'x'"),
        (b"null", "must be a JSON object, not None"),
        (b'{"input_ids":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
        (b'{"input_ids":' + b"[" * 900 + b"]" * 900 + b"}", "input_ids[0] holds [[[...]]]"),
        (b'{"rid": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"input_ids":[1],"input_ids":[2]}', "'input_ids' stands twice"),
        (b'{"input_ids":[1],"sampling_params":{"n":1,"n":2}}', "'n' stands twice"),
    ],
)
def test_bodies_that_are_no_json_object(url, raw, named):
    answer = send(url, "/generate", raw)
    assert (answer.status_code, named in answer.json()["error"]["message"]) == (400, True)


def test_sizes_and_encodings_are_bounded(url):
    large = json.dumps({"text": "a" * MAX_BODY_BYTES}).encode()
    assert send(url, "/generate", large).status_code == 413
    packed = gzip.compress(large)
    assert send(url, "/generate", packed, **{"Content-Encoding": "gzip"}).status_code == 413
    for encoding in ("gzip", "br"):
        answer = send(url, "/generate", b"no such thing", **{"Content-Encoding": encoding})
        assert answer.status_code == 400
    kind = "application/json; charset=nope"
    assert send(url, "/generate", sampling(), **{"Content-Type": kind}).status_code == 200
