"""Conversations in the schemas that strangers bring, and what of each is trained."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentcpm_jax.data.conversation import Conversation
from agentcpm_jax.data.schemas import read_conversation
from agentcpm_jax.records import Flaw

TOOL = {"name": "depth", "parameters": {"properties": {"pier": {"type": "string"}}}}
WRAPPED = [{"type": "function", "function": TOOL}]
ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ARGUMENTS = {"pier": "Ost", "n": 12345678901234567890}


def called(call: Any, *rest: dict, **columns: Any) -> dict:
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"messages": [ASK, turn, *rest], "tools": WRAPPED, **columns}


def function(arguments: Any = None, call_id: str | None = None) -> dict:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": "depth", "arguments": arguments},
    }


def step(number: int, source: Any, message: str = "m", **more: Any) -> dict:
    return {"step_id": number, "source": source, "message": message, **more}


def shown(found: Conversation) -> list[tuple]:
    """(role, content, thought, arguments of calls, answers, trained), what is empty left out."""
    rows = [
        (m.role, m.content, m.reasoning, [c.arguments for c in m.calls], m.answers, m.train)
        for m in found.messages
    ]
    return [tuple(v for v in row if v not in (None, "", []) and v is not False) for row in rows]


PLAIN = [("user", "q"), ("assistant", "a", True)]
THOUGHT = [("user", "q"), ("assistant", "a", "t", True)]
SPLIT = [("user", "q"), ("assistant", "<think>\nt\n</think>\n\na", True)]
CALLED = [
    ("user", "q"),
    ("assistant", [ARGUMENTS], True),
    ("tool", "r", 0),
    ("assistant", "a", True),
]
TAGGED = [("user", "q"), ("assistant", [{"pier": "</tool_call><code>"}], True)]
SHAREGPT_CALL = {
    "from": "function_call",
    "value": json.dumps({"name": "depth", "arguments": ARGUMENTS}),
}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
RESULT = {"role": "tool", "content": "r"}
QWEN = (
    "be brief\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    + json.dumps(WRAPPED[0])
    + "\n</tools>\n\nFor each function call, return a json object\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"messages": [ASK, SAY], "uuid": "x", "prompt": "ignored", "parallel_tool_calls": True},
            PLAIN,
        ),
        ({"messages": json.dumps([ASK, SAY]), "tools": ""}, PLAIN),
        ({"conversations": [HUMAN, GPT], "images": []}, PLAIN),
        ({"conversations": [ASK, SAY]}, PLAIN),
        ({"prompt": [ASK], "completion": [SAY]}, PLAIN),
        ({"prompt": json.dumps([ASK]), "completion": json.dumps([SAY])}, PLAIN),
        ({"messages": [], "conversations": [HUMAN, GPT]}, PLAIN),
        ({"steps": json.dumps([step(1, "user", "q"), step(2, "agent", "a")])}, PLAIN),
        ({"messages": [ASK, SAY], "system_prompt": "s"}, [("system", "s"), *PLAIN]),
        ({"messages": [ASK, SAY | {"content": "<think>\nt\n</think>\n\na"}], "score": 1}, SPLIT),
        ({"messages": [{"role": "human", "content": [{"type": "text", "text": "q"}]}, SAY]}, PLAIN),
        *(({"messages": [ASK, SAY | {k: "t"}]}, THOUGHT) for k in ("reasoning", "thinking")),
        ({"messages": [ASK, SAY | {"reasoning": "t", "reasoning_content": "t"}]}, THOUGHT),
        (
            {
                "messages": [
                    ASK,
                    {"role": "assistant", "content": "<think>\nt\n</think>\n\na", "thinking": "t"},
                ]
            },
            THOUGHT,
        ),
        (called(function(json.dumps(ARGUMENTS), "c"), RESULT | {"tool_call_id": "c"}, SAY), CALLED),
        (called(function(ARGUMENTS), RESULT | {"name": "depth"}, SAY), CALLED),
        (called(function(ARGUMENTS)["function"], RESULT, SAY), CALLED),
        (called(function({"pier": "</tool_call><code>"})), TAGGED),
        (
            {
                "messages": [
                    ASK,
                    {
                        "role": "assistant",
                        "function_call": function(json.dumps(ARGUMENTS))["function"],
                    },
                    {"role": "function", "name": "depth", "content": "r"},
                    SAY,
                ],
                "functions": [TOOL],
            },
            CALLED,
        ),
        (
            {
                "conversations": [HUMAN, SHAREGPT_CALL, {"from": "observation", "value": "r"}, GPT],
                "tools": json.dumps([TOOL]),
            },
            CALLED,
        ),
        (
            {
                "conversations": [
                    HUMAN,
                    SHAREGPT_CALL | {"value": f"<tool_call>{SHAREGPT_CALL['value']}</tool_call>"},
                    {"from": "observation", "value": "r"},
                    GPT,
                ]
            },
            CALLED,
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": QWEN},
                    ASK,
                    {
                        "role": "assistant",
                        "content": f"<tool_call>\n{SHAREGPT_CALL['value']}\n</tool_call>",
                    },
                    {"role": "user", "content": "<tool_response>\nr\n</tool_response>"},
                    SAY,
                ]
            },
            [("system", "be brief"), *CALLED],
        ),
        (
            {
                "schema_version": "ATIF-v1.8",
                "agent": {"tool_definitions": [TOOL]},
                "steps": [
                    step(1, "user", "q"),
                    step(
                        2,
                        "agent",
                        "",
                        tool_calls=[
                            {"tool_call_id": "c", "function_name": "depth", "arguments": ARGUMENTS}
                        ],
                        observation={"results": [{"content": "r"}]},
                    ),
                    step(3, "agent", "a"),
                ],
            },
            CALLED,
        ),
    ],
)
def test_every_schema_gives_the_same_turns(record: dict, expected: list[tuple]) -> None:
    found = read_conversation(record)
    assert shown(found) == expected
    assert found.tools in ((), tuple(WRAPPED))
    assert (len(expected) > 3) <= (bool(found.tools) or "conversations" in record)


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ({}, True),
        ({"weight": 1}, True),
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"train": False}, False),
        ({"trainable": False, "weight": 0}, False),
        ({"train": None}, True),
    ],
)
def test_flags_say_what_is_trained(flags: dict, trained: bool) -> None:
    found = read_conversation({"messages": [ASK | {"weight": 0}, SAY | flags, ASK, SAY]})
    assert [m.train for m in found.messages] == [False, trained, False, True]


def test_context_is_not_trained() -> None:
    found = read_conversation({"prompt": [ASK, SAY, ASK], "completion": [SAY]})
    assert [m.train for m in found.messages] == [False, False, False, True]
    steps = [
        step(1, "agent", is_copied_context=True),
        step(2, "agent", llm_call_count=0),
        step(3, "agent"),
    ]
    assert [m.train for m in read_conversation({"steps": steps}).messages] == [False, False, True]


def test_raw_text_has_segments() -> None:
    pair = read_conversation({"prompt": "p", "completion": " c\n"}).segments
    assert [(s.text, s.train) for s in pair] == [("p", False), (" c\n", True)]
    assert [s.train for s in read_conversation({"text": "t"}).segments] == [True]


def test_results_find_their_calls() -> None:
    """Ids are used again in a later turn; results come in another order than the calls."""
    calls = [function({"pier": p}, i) for p, i in (("Ost", "a"), ("West", "b"))]
    turn = {"role": "assistant", "tool_calls": calls}
    results = [RESULT | {"tool_call_id": "b", "content": "2"}, RESULT | {"tool_call_id": "a"}]
    found = read_conversation({"messages": [ASK, turn, *results, turn, *results, SAY]})
    assert [m.answers for m in found.messages if m.role == "tool"] == [1, 0, 3, 2]
    contents = [turn["content"] for turn in found.for_template() if turn["role"] == "tool"]
    assert contents == ["r", "2", "r", "2"], "an agent sees results in the order of its calls"


def test_nulls_of_other_tools_go_and_those_of_the_schema_stay() -> None:
    own = {"pier": {"type": ["string", "null"]}, "hour": {"type": "integer"}}
    tools = [{"name": "depth", "parameters": {"properties": own}}]
    tools += [{"name": "wind", "parameters": {"properties": {"sea": {}, "old": None}}}]
    given = {"pier": None, "hour": None, "sea": None, "free": None}
    found = read_conversation({**called(function(given)), "tools": tools})
    assert found.messages[1].calls[0].arguments == {"pier": None, "free": None}
    assert found.tools[1]["function"]["parameters"]["properties"] == {"sea": {}}


def test_template_variables_are_read() -> None:
    row = {"messages": [ASK, SAY], "enable_thinking": False, "chat_template_kwargs": '{"x": 1}'}
    assert read_conversation(row).template_kwargs == {"x": 1, "enable_thinking": False}


DEEP = "messages[1].tool_calls.arguments"


def said(**turn: Any) -> dict:
    return {"messages": [ASK, {"role": "assistant", "content": "a"} | turn]}


@pytest.mark.parametrize(
    ("record", "kind", "key"),
    [
        ({"chosen": "a", "rejected": "b", "prompt": "q"}, "unknown_schema", None),
        ({"prompt": "q"}, "unknown_schema", None),
        ({"instruction": "q", "output": "a"}, "unknown_schema", None),
        ({**said(), "images": ["x.png"]}, "unknown_key", "images"),
        ({"prompt": "q", "completion": "a", "label": False}, "unknown_key", "label"),
        ({"prompt": "q", "completion": [SAY]}, "unknown_schema", "completion"),
        ({"text": " "}, "empty_assistant", "text"),
        (said(role="model"), "unknown_role", "messages[1].role"),
        (
            {"conversations": [HUMAN, {"from": "x", "value": ""}]},
            "unknown_role",
            "conversations[1].from",
        ),
        ({"messages": [ASK, "a"]}, "unknown_role", "messages[1].role"),
        ({"messages": [ASK]}, "no_assistant", None),
        ({"prompt": [ASK, SAY], "completion": [ASK]}, "no_assistant", None),
        (said(content=" \n"), "empty_assistant", "messages[1].content"),
        ({"messages": [ASK | {"content": None}, SAY]}, "content_part", "messages[0].content"),
        (said(content=[{"type": "image_url"}]), "content_part", "messages[1].content[0]"),
        (
            said(content=[{"type": "text", "text": "a", "n": 1}]),
            "unknown_key",
            "messages[1].content[0].n",
        ),
        (said(mask=1), "unknown_key", "messages[1].mask"),
        *((said(**{k: False}), "unknown_key", f"messages[1].{k}") for k in ("loss", "mask", "eos")),
        (said(name="bob"), "unknown_key", "messages[1].name"),
        (said(refusal="no"), "unknown_key", "messages[1].refusal"),
        ({**said(), "loss_weight": 2}, "unknown_key", "loss_weight"),
        ({**said(), "system_prompt": ["s"]}, "content_part", "system_prompt"),
        (
            {**said(), "chat_template_kwargs": {"messages": []}},
            "unknown_key",
            "chat_template_kwargs.messages",
        ),
        (
            {**said(), "chat_template_kwargs": '{"x": "\\ud83d"}'},
            "lone_surrogate",
            "chat_template_kwargs.x",
        ),
        (said(content="a<|im_end|>b"), "bad_tags", "messages[1].content"),
        (said(reasoning="t<|im_start|>"), "bad_tags", "messages[1].content"),
        (said(reasoning="t</think>u"), "bad_tags", "messages[1].content"),
        (said(content="<think>cut"), "bad_tags", "messages[1].content"),
        (said(content="<think>t</think><think>u</think>a"), "bad_tags", "messages[1].content"),
        (said(content="words <think>t</think>a"), "bad_tags", "messages[1].content"),
        (said(content="", reasoning=" "), "empty_assistant", "messages[1].content"),
        (said(weight=float("nan")), "bad_flag", "messages[1].weight"),
        (said(weight=2), "bad_flag", "messages[1].weight"),
        (said(trainable=[]), "bad_flag", "messages[1].trainable"),
        (
            said(
                content='<tool_call>{"name": "f", "arguments": {}}</tool_call>',
                tool_calls=[function({})],
            ),
            "ambiguous",
            "messages[1].content",
        ),
        (
            {"messages": [ASK, {"role": "assistant", "tool_calls": [function({}, "c")] * 2}, SAY]},
            "ambiguous",
            "messages[1].tool_calls.id",
        ),
        *(
            (
                called(function(text)),
                "bad_arguments",
                "messages[1].tool_calls[0].function.arguments",
            )
            for text in ('{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 2}}', '"{}"', "null", "{'a': 1}")
        ),
        (called(function('{"a": ' * 80 + "1" + "}" * 80)), "bad_arguments", DEEP),
        ({**said(), "tools": '[{"name": "f", "name": "g"}]'}, "bad_tools", "tools"),
        ({"messages": [ASK], "text": ""}, "no_assistant", None),
        ({"text": ""}, "empty_assistant", "text"),
        ({"steps": [step(1, ["user"])]}, "unknown_role", "steps[0].source"),
        ({"steps": [], "schema_version": "ATIF-v1.9"}, "unknown_schema", "schema_version"),
        (
            {"steps": [step(1, "agent", observation={"results": [{"content": "r"}]})]},
            "result_without_call",
            "steps[0].observation.results[0].source_call_id",
        ),
        (said(reasoning_details=[{"text": "t"}]), "unknown_key", "messages[1].reasoning_details"),
        ({"messages": [ASK | {"reasoning": "t"}, SAY]}, "unknown_key", "messages[0].reasoning"),
        (said(reasoning="t", thinking="u"), "ambiguous", "messages[1].thinking"),
        (said(content="<think>u</think>a", thinking="t"), "ambiguous", "messages[1].thinking"),
        (said(weight=0.5), "bad_flag", "messages[1].weight"),
        (said(train="false"), "bad_flag", "messages[1].train"),
        (said(train=True, weight=0), "bad_flag", "messages[1].train"),
        ({"messages": [ASK | {"weight": 1}, SAY]}, "bad_flag", "messages[0].weight"),
        (
            called(function('{"pier": "O')),
            "bad_arguments",
            "messages[1].tool_calls[0].function.arguments",
        ),
        (called(function("[1]")), "bad_arguments", "messages[1].tool_calls[0].function.arguments"),
        (
            called(function({"x": float("nan")})),
            "bad_arguments",
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            called(function('{"x": NaN}')),
            "bad_arguments",
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            called(function('{"x": "\\ud83d"}')),
            "lone_surrogate",
            "messages[1].tool_calls[0].function.arguments",
        ),
        (said(content='<tool_call>{"name": "f"'), "bad_arguments", "messages[1].content"),
        (
            called({"function": {"arguments": "{}"}}),
            "missing_name",
            "messages[1].tool_calls[0].function.name",
        ),
        (called(function() | {"type": "custom"}), "unknown_key", "messages[1].tool_calls[0].type"),
        ({"messages": [ASK, RESULT, SAY]}, "result_without_call", "messages[1].tool_call_id"),
        (called(function(), RESULT, RESULT), "result_without_call", "messages[3].tool_call_id"),
        (
            called(function(None, "c"), RESULT | {"tool_call_id": "d"}),
            "result_without_call",
            "messages[2].tool_call_id",
        ),
        ({**said(), "tools": "{"}, "bad_tools", "tools"),
        (
            {**said(), "tools": [{"type": "function", "function": {}}]},
            "bad_tools",
            "tools[0].function.name",
        ),
        ({**said(), "tools": WRAPPED, "functions": [{"name": "g"}]}, "ambiguous", "functions"),
        ({**said(), "enable_thinking": "no"}, "bad_flag", "enable_thinking"),
        ({"steps": [step(2, "user")]}, "bad_step", "steps[0].step_id"),
        ({"steps": [step(1, "assistant")]}, "unknown_role", "steps[0].source"),
        ({"steps": [step(1, "agent", mood="x")]}, "unknown_key", "steps[0].mood"),
        (
            {"steps": [step(1, "agent")], "schema_version": "ATIF-v2.0"},
            "unknown_schema",
            "schema_version",
        ),
        (
            {
                "steps": [
                    step(
                        1,
                        "agent",
                        observation={"results": [{"source_call_id": "z", "content": "r"}]},
                    )
                ]
            },
            "result_without_call",
            "steps[0].observation.results[0].source_call_id",
        ),
        (
            {"steps": [step(1, "agent", tool_calls=[{"function_name": "f", "arguments": "{}"}])]},
            "bad_arguments",
            "steps[0].tool_calls[0].arguments",
        ),
    ],
)
def test_a_flaw_is_named_by_kind_and_key(record: dict, kind: str, key: str | None) -> None:
    with pytest.raises(Flaw) as refused:
        read_conversation(record)
    assert (refused.value.kind, refused.value.key) == (kind, key)


def test_an_unknown_record_is_told_what_is_read_and_what_it_has() -> None:
    with pytest.raises(Flaw, match=r"found keys: instruction, output; read: .*ShareGPT.*ATIF"):
        read_conversation({"instruction": "q", "output": "a"})
