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


A, B = call('{"q": "a"}'), call('{"q": "b"}')
PYTHON = '{"name": "PythonInterpreter", "arguments": {}}'


def program(code: str, head: str = PYTHON) -> str:
    return f"{OPEN}\n{head}\n<code>{code}</code>\n{CLOSE}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        # two objects in a block are one error, not one call
        (A.replace(CLOSE, "\n" + B.replace(OPEN, "")) + B, [0, "b"]),
        (OPEN + '{"name": "f", "arguments": {}}, {"x": 1}' + CLOSE, [0]),
        # tags in strings are text
        (call('{"q": "what is </tool_call>?"}') + B, ["what is </tool_call>?", "b"]),
        (call('{"q": "</tool_call> <tool_call>{"}') + B, ["</tool_call> <tool_call>{", "b"]),
        (call("{'q': '</tool_call>'}"), ["</tool_call>"]),
        (call('{"q": "<think> </think>"}'), ["<think> </think>"]),
        (call('{"q": "</think>"}') + B, ["</think>", "b"]),
        (call('{"q": "<code>"}'), ["<code>"]),
        ("<think>t</think>" + call('{"q": "</think>"}'), ["</think>"]),
        # a quote that is never closed swallows no neighbour
        (OPEN + '{"name": "f", "arguments": {"q": "x}}' + CLOSE + B, [0, "b"]),
        # a thought end that ends no thought
        (A + "</think>", [0]),
        (A + "</think>" + B, [0, "b"]),
        ("<answer>x</answer></think>" + B, [0, "b"]),
        ("words </think>" + B + "</think>", ["b"]),
        (A + "<think>x</think>" + B, ["a", "b"]),
        # later thoughts
        ("<think>t</think><think>" + A, [0]),
        (B + "<think>" + A, ["b", 0]),
        ("<think>t</think><think>" + A + "</think>" + B, ["b"]),
        ("a <think> is a tag", []),
    ],
)
def test_no_call_is_dropped_in_silence(text: str, found: list[Any]) -> None:
    """The argument `q` of each call, 0 for a typed error."""
    turn = parse(text)
    assert [0 if c.error else (c.arguments or {})["q"] for c in turn.calls] == found
    assert set(turn.errors) <= set(ERRORS)
    assert all(0 <= start < end <= len(text) for start, end in turn.spans)


def test_a_thought_that_the_prompt_opened_ends_once() -> None:
    assert parse(f"t</think>{A}", in_thought=True).errors == ()
    assert parse(f"t</think><think>{A}", in_thought=True).errors == ("unfinished_thought",)
    assert parse(f"t {A}</think>", in_thought=True).calls == ()
    assert parse("<answer>The <think> tag</answer>").answer == "The <think> tag"
    assert parse("<answer>x</answer></think>").answer is None


@pytest.mark.parametrize(
    ("code", "read"),
    [
        ("\n    x = 1\n    if x:\n        print(x)\n", "x = 1\nif x:\n    print(x)"),
        ("\n\tx = 1\n\n\ty = 2\n", "x = 1\n\ny = 2"),
        ("\n    x = 1\ny = 2\n", "    x = 1\ny = 2"),  # as it is written: Python says so
        (" import os\nprint(os)", "import os\nprint(os)"),
        ("    x = 1\n    y = 2", "x = 1\ny = 2"),
        ("\n\n  \n  x = 1  \n\n", "x = 1"),
        ('\nprint("</tool_call>")\n', 'print("</tool_call>")'),
        ('\nprint("</code>")\n', 'print("</code>")'),
        ('\nprint("</tool_call> <tool_call>")\n', 'print("</tool_call> <tool_call>")'),
        ("\nx = '<think>'\n", "x = '<think>'"),
        ("\nd = {1: '}'}\n", "d = {1: '}'}"),
    ],
)
def test_code_is_what_was_written(code: str, read: str) -> None:
    for head in (PYTHON, '{"name": "PythonInterpreter"}', PYTHON.replace("{}", "null")):
        first, second = parse(program(code, head) + B).calls
        assert (first.error, first.arguments) == (None, {"code": read})
        assert second.arguments == {"q": "b"}
    before = f"{OPEN}<code>{code}</code>\n{PYTHON}{CLOSE}"
    assert parse(before).calls[0].arguments == {"code": read}


def test_code_that_no_tool_takes_or_nothing_closes_is_an_error() -> None:
    assert parse(program("x", '{"name": "f", "arguments": {}}')).errors == ("bad_arguments",)
    unclosed = f"{OPEN}{PYTHON}<code>print(1){CLOSE}"
    turn = parse(unclosed + program("print(2)"))
    assert turn.errors == ("missing_code",) and turn.calls[1].arguments == {"code": "print(2)"}


@settings(max_examples=200, deadline=None)
@given(
    arguments=st.lists(
        st.dictionaries(
            st.text(max_size=2),
            st.lists(
                st.sampled_from(
                    [OPEN, CLOSE, "<think>", "</think>", "<code>", "</code>", "<answer>", '"', "{"]
                ),
                max_size=3,
            ).map("".join),
            max_size=2,
        ),
        max_size=3,
    ),
    between=st.sampled_from(["", "\n", " words ", "<think>a</think>"]),
)
def test_tags_in_strings_are_text(arguments: list[dict[str, str]], between: str) -> None:
    calls = [call(json.dumps(a)) for a in arguments]
    turn = parse(between.join(calls))
    assert [c.arguments for c in turn.calls] == arguments
    assert [c.error for c in turn.calls] == [None] * len(arguments)


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
    "closing tags in strings": (OPEN + '{"a": "' + CLOSE) * 5000,
    "closed tags in strings": (OPEN + '{"a": "' + CLOSE + '"}') * 5000 + CLOSE,
    "tags in code": OPEN + PYTHON + "<code>" + CLOSE * N,
    "calls in code": (OPEN + PYTHON + "<code>" + CLOSE) * 2000,
    "ends of code": OPEN + PYTHON + "<code>" + ("</code>" + " " * 50) * 1000,
    "code before": (OPEN + "<code>" + "</code> " * 10) * 2000,
    "empty thoughts": "<think></think>" * N,
    "ends of thoughts": "</think>" * N,
    "a thought before all": "<think>" + (OPEN + CLOSE) * N,
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
