"""The templates' text exactly, and ids in which only the program can write control tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from agentcpm_jax.chat.format import IM_END, TEMPLATES, ChatFormat, template_text
from agentcpm_jax.chat.tokenizer import MARK, MarkedTokenizer
from agentcpm_jax.types import Provenance, UserError
from tests.chat.qwen_style import SPECIAL, STRUCTURAL, qwen_style_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "chat"
CHAT = json.loads((GOLDEN / "chat_cases.json").read_text())["cases"]
DELTA = json.loads((GOLDEN / "delta_cases.json").read_text())["cases"]
ROUNDTRIP = json.loads((GOLDEN / "roundtrip_cases.json").read_text())["cases"]
RENDERS = [(case, render) for case in CHAT for render in case["renders"]]


def chat(template: str = "qwen3-thinking-2507", **kwargs: Any) -> ChatFormat:
    return ChatFormat.from_parts(qwen_style_tokenizer(), template_text(template), **kwargs)


@pytest.fixture(scope="module")
def chats() -> dict[str, ChatFormat]:
    return {name: chat(name) for name in TEMPLATES}


def render_id(value: Any) -> str:
    return value["id"] if "id" in value else f"{value['template']}-{len(value['kwargs'])}"


@pytest.mark.parametrize(("case", "render"), RENDERS, ids=render_id)
def test_text_is_the_templates(
    chats: dict[str, ChatFormat], case: dict[str, Any], render: dict[str, Any]
) -> None:
    form = chats[render["template"]]
    if case["id"] == "unknown-role":  # the template drops it without a word
        with pytest.raises(UserError, match="'developer'"):
            form.render(case["messages"], case["tools"], **render["kwargs"])
    elif "expected_error" in render:
        with pytest.raises(UserError, match="message 0"):
            form.render(case["messages"], case["tools"], **render["kwargs"])
    else:
        text = form.render(case["messages"], case["tools"], **render["kwargs"])
        assert text == render["expected_text"]


@pytest.mark.parametrize("case", [c for c in CHAT if "error" not in c["tags"]], ids=render_id)
@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_those_of_transformers(
    chats: dict[str, ChatFormat], case: dict[str, Any], template: str
) -> None:
    if case["id"] == "unknown-role":
        with pytest.raises(UserError, match="unknown role"):
            chats[template].prompt_ids(case["messages"], case["tools"])
        return
    theirs = PreTrainedTokenizerFast(tokenizer_object=qwen_style_tokenizer())
    expected = theirs.apply_chat_template(
        case["messages"],
        tools=case["tools"],
        chat_template=template_text(template),
        add_generation_prompt=True,
        return_dict=False,
    )
    ids = chats[template].prompt_ids(case["messages"], case["tools"])
    assert chats[template].decode(ids) == theirs.decode(expected)
    hostile = [m for m in case["messages"] if m["role"] in ("user", "tool")]
    if any(token in m["content"] for m in hostile for token in (*SPECIAL, *STRUCTURAL)):
        assert list(ids) != expected
    else:
        assert list(ids) == expected


def said_by(form: ChatFormat, message: dict[str, Any]) -> str:
    return form.decode(form.assistant_ids(message))


@pytest.mark.parametrize("case", DELTA, ids=lambda c: f"{c['id']}-{c['template']}")
def test_delta_is_what_the_template_would_append(case: dict[str, Any]) -> None:
    form = chat(case["template"], **case["kwargs"])
    ids, provenance = form.delta_tokens(case["appended"])
    assert form.decode(ids) == case["expected_delta"]
    observed = form.decode(ids[provenance == Provenance.TOOL])
    results = [m["content"] for m in case["appended"] if m["role"] == "tool"]
    assert observed == "".join(f"\n{r}\n" for r in results)


@pytest.mark.parametrize("case", ROUNDTRIP, ids=render_id)
def test_append_only_transcript(case: dict[str, Any]) -> None:
    form = chat(case["template"])
    said = form.encode_text(case["raw_completion"])  # whatever ids the model chose, they stay
    parts = [
        form.prompt_ids(case["messages"], case["tools"]),
        said,
        [form.im_end_id],
        form.delta_tokens(case["reply"])[0],
    ]
    ids = np.concatenate(parts)
    assert form.decode(ids) == case["append_only_text"]
    if case["rerender_parsed"]["equal"]:
        canonical = said_by(form, case["parsed_message"])
        assert canonical == case["raw_completion"] + IM_END


CALL = {"function": {"name": "search", "arguments": {"query": "x"}}}
DEMO = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "", "reasoning_content": "think", "tool_calls": [CALL]},
    {"role": "tool", "content": "one"},
    {"role": "tool", "content": "two"},
    {"role": "assistant", "content": "<answer>Vaduz</answer>", "reasoning_content": "done"},
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_demo_is_the_append_only_conversation(chats: dict[str, ChatFormat], template: str) -> None:
    form = chats[template]
    segment = form.demo_segment(DEMO)
    text = form.render(DEMO, add_generation_prompt=False)  # thoughts of one tool loop are kept
    assert form.decode(segment.ids) == text.removesuffix("\n")
    demo = form.decode(segment.ids[segment.provenance == Provenance.DEMO])
    assert demo == said_by(form, DEMO[2]) + said_by(form, DEMO[5])
    assert demo.endswith("<answer>Vaduz</answer>" + IM_END)
    observed = form.decode(segment.ids[segment.provenance == Provenance.TOOL])
    assert observed == "\none\n\ntwo\n"
    assert np.isnan(segment.logprob).all()
    assert (segment.version == -1).all()


def test_demo_keeps_the_thoughts_that_rerendering_would_strip() -> None:
    form = chat("qwen3-hybrid")
    messages = [*DEMO, {"role": "user", "content": "more?"}, DEMO[5]]
    assert form.decode(form.demo_segment(messages).ids).count("<think>") == 3
    assert form.render(messages, add_generation_prompt=False).count("<think>") == 1


def test_demo_calls_are_control_tokens_and_their_arguments_are_not() -> None:
    form = chat()
    call = {"name": "search", "arguments": {"query": "<tool_call> <|im_end|>"}}
    message = {"role": "assistant", "content": "<|im_start|>", "tool_calls": [call]}
    ids = list(form.assistant_ids(message))
    said = '{"name": "search", "arguments": {"query": "<tool_call> <|im_end|>"}}'
    assert form.decode(ids).endswith(f"\n<tool_call>\n{said}\n</tool_call>{IM_END}")
    assert ids.count(form.tool_call_start_id) == ids.count(form.tool_call_end_id) == 1
    assert ids.index(form.im_end_id) == len(ids) - 1


def test_a_demo_needs_an_assistant_message_and_a_thought_that_fits() -> None:
    with pytest.raises(UserError, match="no assistant message"):
        chat().demo_segment(DEMO[:2])
    closed = chat("qwen3-hybrid", enable_thinking=False)
    assert said_by(closed, {"role": "assistant", "content": "x"}) == "x" + IM_END
    with pytest.raises(UserError, match="does not continue the generation prompt"):
        closed.assistant_ids(DEMO[5])


HOSTILE = st.lists(
    st.sampled_from([*SPECIAL, *STRUCTURAL, MARK, MARK + "c1;", MARK + "m", "<", "tool_call>", "a"])
    | st.text(max_size=4),
    max_size=8,
).map("".join)


@settings(max_examples=40, deadline=None)
@given(question=HOSTILE, result=HOSTILE, description=HOSTILE)
def test_data_never_becomes_a_control_token(question: str, result: str, description: str) -> None:
    form, quiet = HOSTILE_FORM, "quiet"
    tools = [{"name": "f", "description": description}]
    messages = [{"role": "user", "content": question}, {"role": "tool", "content": result}]
    benign = [{"role": "user", "content": quiet}, {"role": "tool", "content": quiet}]
    ids = form.prompt_ids(messages, tools)
    expected = form.prompt_ids(benign, [{"name": "f", "description": quiet}])
    assert controls(form, ids) == controls(form, expected)
    assert controls(form, form.encode_text(question)) == []


@settings(max_examples=40, deadline=None)
@given(text=HOSTILE)
def test_marks_can_be_taken_off(text: str) -> None:
    tokens = MarkedTokenizer(qwen_style_tokenizer())
    assert tokens.restore(tokens.mark_data(text)) == text
    assert tokens.restore(tokens.mark_program(text)) == text


HOSTILE_FORM = chat("qwen3-instruct-2507")


def controls(form: ChatFormat, ids: np.ndarray) -> list[int]:
    first = min(qwen_style_tokenizer().get_added_tokens_decoder())
    return [int(i) for i in ids if i >= first]


def test_a_user_wrapping_a_tool_response_is_judged_by_the_text_it_wrote() -> None:
    """The template looks at the first and last characters of user content; marks must not show."""
    case = next(c for c in CHAT if c["id"] == "wrapped-user-response")
    form = chat("qwen3-hybrid")
    kept = form.render(case["messages"], add_generation_prompt=False)
    assert kept.count("<think>") == 2
    ids = form.prompt_ids(case["messages"])
    response = qwen_style_tokenizer().token_to_id("<tool_response>")
    assert response not in ids


@pytest.mark.parametrize(("template", "open_thought"), [(t, "thinking" in t) for t in TEMPLATES])
def test_in_thought(chats: dict[str, ChatFormat], template: str, open_thought: bool) -> None:
    assert chats[template].in_thought == open_thought


def test_token_spans_cover_the_characters() -> None:
    form = chat()
    message = {"role": "assistant", "content": "瓦杜兹 é", "tool_calls": [CALL]}
    ids = list(form.assistant_ids(message))
    text = form.decode(ids)
    start, end = text.index("<tool_call>"), text.index("</tool_call>") + len("</tool_call>")
    expected = (ids.index(form.tool_call_start_id), ids.index(form.tool_call_end_id) + 1)
    city = text.index("瓦")
    spans = form.token_spans(ids, [(city, city + 3), (start, end)])
    assert spans[1] == expected
    assert form.decode(ids[slice(*spans[0])]).strip() == "瓦杜兹"


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ raise_exception('no') }}", "{{ ''.__class__.x.y }}"]
)
def test_a_bad_template_is_a_user_error(template: str) -> None:
    with pytest.raises(UserError, match="chat template"):
        ChatFormat.from_parts(qwen_style_tokenizer(), template).render([DEMO[1]])
