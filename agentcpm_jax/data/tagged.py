"""Conversations that were rendered in Qwen's words before they were stored, as DR-Venus is.

The tools stand in the system text, calls between `<tool_call>` tags and results between
`<tool_response>` tags in users' turns. They are lifted out, so that the template writes them again
and their calls are checked as all others are.
"""

from __future__ import annotations

import re
from dataclasses import replace

from agentcpm_jax.data.calls import Tools, read_tools
from agentcpm_jax.data.conversation import Message
from agentcpm_jax.data.turns import read_tagged, split_thought
from agentcpm_jax.records import Flaw

#: The block that Qwen's template writes; other words round `<tools>` are left as they are.
_BLOCK = re.compile(
    r"# Tools\n\nYou may call one or more functions to assist with the user query\..*?"
    r"<tools>\n(?P<tools>.*?)</tools>.*?<tool_call>\n.*?</tool_call>",
    re.DOTALL,
)
_RESULT = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)


def lift_tags(messages: list[Message], tools: Tools) -> tuple[list[Message], Tools]:
    """(turns, tools) with calls and results taken out of the text, where both stand there."""
    has_block = bool(messages) and messages[0].role == "system" and "<tools>" in messages[0].content
    answered = any(m.role == "tool" for m in messages)
    in_text = any("<tool_call>" in m.content for m in messages if m.role == "assistant")
    if any(m.calls for m in messages) or not (has_block or (in_text and answered)):
        return messages, tools
    if has_block and not tools:
        messages, tools = _lift_tools(messages)
    lifted: list[Message] = []
    for message in messages:
        if message.role == "assistant" and "<tool_call>" in message.content:
            lifted.append(_lift_calls(message, tools))
        elif message.role in ("user", "tool") and "<tool_response>" in message.content:
            lifted += _lift_results(message)
        else:
            lifted.append(message)
    return lifted, tools


def _lift_tools(messages: list[Message]) -> tuple[list[Message], Tools]:
    system = messages[0]
    found = _BLOCK.search(system.content)
    if not found:
        return messages, ()
    key = f"{system.at}.content"
    listed = [line for line in found["tools"].split("\n") if line.strip()]
    try:
        tools = read_tools(listed, key)
    except Flaw as flaw:
        raise Flaw(flaw.kind, key, f"tools between <tools> tags: {flaw}") from None
    around = system.content[: found.start()], system.content[found.end() :]
    content = "\n\n".join(part.strip("\n") for part in around if part.strip())
    return ([replace(system, content=content)] if content else []) + messages[1:], tools


def _lift_calls(message: Message, tools: Tools) -> Message:
    thought, rest = split_thought(message.content)
    if message.reasoning:
        thought = message.reasoning
    lifted = read_tagged(rest, f"{message.at}.content", message.at, tools)
    return replace(message, content=lifted.content, calls=lifted.calls, reasoning=thought)


def _lift_results(message: Message) -> list[Message]:
    out, position = [], 0
    while found := _RESULT.match(message.content, position):
        out.append(Message("tool", found[1], at=message.at, result_of=message.result_of))
        position = found.end()
    rest = message.content[position:]
    if not out or (rest.strip() and message.role == "tool"):
        return [message]
    return out + ([replace(message, content=rest.lstrip("\n"))] if rest.strip() else [])
