"""Calls, typed errors and answers as in the golden cases; linear time on hostile text."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import json5
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentcpm_jax.chat import lenient_json
from agentcpm_jax.chat.parse import (
    ERRORS,
    ParsedTurn,
    parse_completion,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "parse"
CASES = json.loads((GOLDEN / "parse_cases.json").read_text())["cases"]
ANSWERS = json.loads((GOLDEN / "answer_extraction.json").read_text())["cases"]
TOOLS = ("search", "fetch_url", "visit", "PythonInterpreter", "execute_code", "query_table")
TOOLS += ("list_tools", "f")
OPEN, CLOSE = "<tool_call>", "</tool_call>"


def parse(text: str, **kwargs: Any) -> ParsedTurn:
    return parse_completion(text, TOOLS, **kwargs)


def call(arguments: str, name: str = "f") -> str:
    return f'{OPEN}{{"name": "{name}", "arguments": {arguments}}}{CLOSE}'


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_golden(case: dict[str, Any]) -> None:
    if "output" in case:
        text = case["output"]
    else:
        text = "".join(part * count for part, count in case["output_recipe"])
    turn = parse(text)
    calls = [
        {"error": c.error} if c.error else {"name": c.name, "arguments": c.arguments}
        for c in turn.calls
    ]
    assert {"calls": calls, "answer": turn.answer} == case["expected"]


@pytest.mark.parametrize("case", ANSWERS, ids=lambda c: c["text"][:20])
def test_answer_extraction(case: dict[str, Any]) -> None:
    assert parse(case["text"]).answer == case["expected"]


def test_answers_in_thoughts_and_calls_do_not_count() -> None:
    assert parse("<answer>a</answer>", in_thought=True).answer is None
    assert parse("<answer>a</answer></think> b", in_thought=True).answer is None
    assert parse(call('{"q": "<answer>a</answer>"}')).answer is None
    assert parse("<answer>a</answer> <answer>open").answer == "a"


def test_an_open_thought_is_an_error_only_where_a_thought_was_opened() -> None:
    assert parse("I think so", in_thought=True).errors == ("unfinished_thought",)
    assert parse("  <think>I think so").errors == ("unfinished_thought",)
    assert parse("what is <think>?").errors == ()
    assert parse(call('{"q": "<think>"}')).calls[0].arguments == {"q": "<think>"}


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        (f"{OPEN}{{bad {call('{}')}", ("unclosed_call", None)),
        (f'{OPEN}{{"name": "f", "arguments": {{}}}} {call("{}")}', ("unclosed_call", None)),
        (f"{call('{}')}{OPEN}x{CLOSE}{call('{}')}", (None, "bad_json", None)),
        (call('{"q": "<tool_call> <tool_call>"}') + call("{}"), (None, None)),
        (call("{}") + CLOSE + call("{}"), (None, "unclosed_call", None)),
        (call('{"x": 1e999}'), ("bad_arguments",)),
        (call('{"x": "\\ud800"}'), ("bad_arguments",)),  # half a pair cannot be sent anywhere
        (call('{"x": "\\ud83d\\ude00"}'), (None,)),
        (f"{OPEN}[{{'name': 'f', 'arguments': {{}}}}]{CLOSE}", ("not_an_object",)),
        (call('{"x": ' + "[" * 70 + "]" * 70 + "}"), ("too_deep",)),
        (call('"' + "[" * 70 + "]" * 70 + '"'), ("too_deep",)),
        (call("{}") * 66, (*[None] * 64, "too_large")),
        (call('{"x": "' + "y" * 64_000 + '"}') + call("{}"), ("too_large", "too_large")),
    ],
)
def test_good_neighbours_survive(text: str, errors: tuple[str | None, ...]) -> None:
    turn = parse(text)
    assert tuple(c.error for c in turn.calls) == errors
    assert all(text[slice(*span)].startswith(("<tool_call>", CLOSE)) for span in turn.spans)


def test_spans_are_the_blocks() -> None:
    good, bad = call('{"a": 1}'), f"{OPEN}{{bad{CLOSE}"
    text = f"<think>{good}</think>\n{good}\n{bad} {good}"
    assert [text[slice(*span)] for span in parse(text).spans] == [good, bad, good]


def test_unknown_tool_names_the_known_ones() -> None:
    found = parse(call("{}", name="g")).calls[0]
    assert (found.name, found.error) == ("g", "unknown_tool")
    assert "fetch_url" in found.message


N = 20_000
HOSTILE = {
    "opening tags": OPEN * N,
    "closing tags": CLOSE * N,
    "empty calls": (OPEN + CLOSE) * N,
    "broken calls": (OPEN + "{a}") * N + CLOSE,
    "open braces": OPEN + "{" * N + CLOSE,
    "nested arrays": call('{"x": ' + "[" * N + "]" * N + "}"),
    "nested objects": call('{"x": ' + '{"a":' * 10_000 + "1" + "}" * 10_000 + "}"),
    "many brackets": call('{"x": [' + "[]," * 20_000 + "[]]}"),
    "json5 list": f"{OPEN}{{name: 'f', arguments: {{x: [{'1,' * N}]}}}}{CLOSE}",
    "quotes": OPEN + '{"' * N + CLOSE,
    "backslashes": OPEN + '{"a": "' + "\\" * (2 * N + 1) + CLOSE,
    "comments": OPEN + '{"a": ' + "/*" * N + CLOSE,
    "digits": call('{"x": ' + "9" * 60_000 + "}"),
    "hex digits": call('{"x": 0x' + "f" * 60_000 + "}"),
    "escapes": call("{'x': '" + "\\u0041" * 10_000 + "'}"),
    "code tags": OPEN
    + '{"name": "PythonInterpreter", "arguments": {}}'
    + "<code>" * 10_000
    + CLOSE,
    "megabytes": call('{"x": "' + "y" * 10_000_000 + '"}'),
    "answers": "<answer>" * N + "</answer>" * N,
    "thoughts": "<think>" * N,
    "64 json5 calls": call('{"x": ' + "[1,]," * 150 + "}") * 64,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_every_output_returns_within_a_second(name: str) -> None:
    began = time.process_time()
    turn = parse(HOSTILE[name])
    assert time.process_time() - began < 1.0
    assert set(turn.errors) <= set(ERRORS)


PIECES = st.sampled_from(
    [
        *(OPEN, CLOSE, "<think>", "</think>", "<answer>", "</answer>", "<code>", "</code>"),
        *("{", "}", "[", "]", '"name"', ":", '"f"', '"arguments"', ",", "'", '"', "\\", "//"),
        *("/*", "*/", "\n", '{"name": "f", "arguments": {', "PythonInterpreter", "NaN", "0x1"),
        *("null", "function"),
    ]
)


@settings(max_examples=200, deadline=None)
@given(text=st.lists(PIECES | st.text(max_size=3), max_size=30).map("".join), thought=st.booleans())
def test_any_text_gives_calls_that_can_be_sent_and_logged(text: str, thought: bool) -> None:
    with mock.patch.multiple("agentcpm_jax.chat.parse", MAX_CALLS=4, MAX_DEPTH=5):
        turn = parse(text, in_thought=thought)
    assert len(turn.calls) == len(turn.spans) <= 5
    assert set(turn.errors) <= set(ERRORS)
    for found, (start, end) in zip(turn.calls, turn.spans, strict=True):
        assert 0 <= start <= end <= len(text)
        assert (found.error is None) == (found.arguments is not None)
        json.dumps(found.arguments, allow_nan=False, ensure_ascii=False).encode()
    assert list(turn.spans) == sorted(turn.spans)
    assert turn.answer is None or turn.answer.strip() == turn.answer != ""


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(arguments=st.dictionaries(st.text(max_size=5), JSON, max_size=3), json5_style=st.booleans())
def test_what_was_written_is_what_is_read(arguments: dict[str, Any], json5_style: bool) -> None:
    body = json.dumps(arguments)
    text = (
        f"{{name: 'f', arguments: {body},}}"
        if json5_style
        else json.dumps({"name": "f", "arguments": arguments})
    )
    (found,) = parse(OPEN + text + CLOSE).calls
    assert found.error is None
    assert found.arguments == arguments


LENIENT = [
    "{a: 1, $b_2: 'x', \"c\": [1,2,],}",
    "{a: 0x1F, b: +2, c: .5, d: 5., e: -0X0a, f: 1.e3, g: -.5e-2}",
    "{a: 'it\\'s', b: \"\\x41\\u0042\", c: 'line\\\ncontinued', d: 'tab\\t'} // end",
    "/* x */ {a: /* * / */ null, // y\n b: true, c: false}",
    "[ , ]",
    "{a: 1,, b: 2}",
    "{,}",
    "{a 1}",
    "{a: b}",
    "{a: 1 2}",
    "{'a': 'b' 'c'}",
    "{a: 01x}",
    "{a: --1}",
    "{a: 'x}",
    "{null: 1, true: 2}",
]


@pytest.mark.parametrize("text", LENIENT)
def test_lenient_json_agrees_with_the_json5_library(text: str) -> None:
    try:
        expected = json5.loads(text)
    except ValueError:
        with pytest.raises(lenient_json.LenientJsonError) as error:
            lenient_json.loads(text)
        assert error.value.kind == "bad_json"
    else:
        assert lenient_json.loads(text) == expected


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"a": 1, "a": 2}', "bad_value"),
        ("{a: 1, 'a': 2}", "bad_value"),
        ("{a: NaN}", "bad_value"),
        ("{a: -Infinity}", "bad_value"),
        ("[1e400]", "bad_value"),
        ("[" * 65 + "]" * 65, "too_deep"),
    ],
)
def test_lenient_json_refuses_what_two_readers_would_read_differently(text: str, kind: str) -> None:
    with pytest.raises(lenient_json.LenientJsonError) as error:
        lenient_json.loads(text)
    assert error.value.kind == kind
