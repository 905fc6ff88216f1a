"""ATIF, the Agent Trajectory Interchange Format of Harbor, v1.0 to v1.8, as turns.

Steps that were copied from an earlier trajectory, and those that no model wrote, are context.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentcpm_jax.data.calls import Tools, check_ids, check_keys, read_arguments, read_tools
from agentcpm_jax.data.conversation import Call, Message
from agentcpm_jax.data.turns import listed, read_content
from agentcpm_jax.records import Flaw, is_set

VERSIONS = tuple(f"ATIF-v1.{minor}" for minor in range(9))
SOURCES = {"system": "system", "user": "user", "agent": "assistant"}
_TRAJECTORY = {
    *("schema_version", "session_id", "trajectory_id", "agent", "steps", "notes", "final_metrics"),
    *("continued_trajectory_ref", "extra"),
}
_ALL_STEPS = {
    *("step_id", "timestamp", "source", "message", "observation", "extra", "is_copied_context"),
}
_AGENT_STEPS = {
    *("model_name", "reasoning_effort", "reasoning_content", "tool_calls", "metrics"),
    "llm_call_count",
}


def read_steps(record: Mapping[str, Any]) -> tuple[list[Message], Tools]:
    """(turns, tools) of a trajectory; raises `Flaw`."""
    version = record.get("schema_version")
    if version is not None and version not in VERSIONS:
        said = f"is {version!r}; read are {VERSIONS[0]} to {VERSIONS[-1]}"
        raise Flaw("unknown_schema", "schema_version", said)
    if version is not None:
        check_keys(record, _TRAJECTORY, "the trajectory")
    steps, agent = listed(record["steps"], "steps"), record.get("agent") or {}
    if not isinstance(agent, dict):
        raise Flaw("unknown_schema", "agent", "the agent of a trajectory is an object")
    tools = read_tools(agent.get("tool_definitions"), "agent.tool_definitions")
    messages: list[Message] = []
    calls = 0
    for i, step in enumerate(steps):
        found = _step(step, f"steps[{i}]", i + 1, calls, tools)
        calls += len(found[0].calls)
        messages += found
    return messages, tools


def _step(step: Any, at: str, number: int, first: int, tools: Tools) -> list[Message]:
    """A turn and the results of its calls, which are counted from `first`."""
    if not isinstance(step, dict):
        raise Flaw("not_json", at, "a step is an object")
    if step.get("step_id") != number or isinstance(step.get("step_id"), bool):
        said = f"is {step.get('step_id')!r}, not {number}: steps count from 1 without holes"
        raise Flaw("bad_step", f"{at}.step_id", said)
    source = step.get("source")
    if not isinstance(source, str) or source not in SOURCES:
        raise Flaw("unknown_role", f"{at}.source", f"is {source!r}; use {', '.join(SOURCES)}")
    is_agent = source == "agent"
    check_keys(step, _ALL_STEPS | (_AGENT_STEPS if is_agent else set()), at)
    content = read_content(step.get("message"), f"{at}.message", allow_none=is_agent)
    calls = _calls(step.get("tool_calls"), f"{at}.tool_calls", tools)
    thought = step.get("reasoning_content")
    if is_set(thought) and not isinstance(thought, str):
        raise Flaw("content_part", f"{at}.reasoning_content", "a thought that is not text")
    if is_agent and not (content.strip() or thought or calls):
        said = "the agent neither says, thinks nor calls anything"
        raise Flaw("empty_assistant", f"{at}.message", said)
    train = is_agent and not _is_context(step, at)
    turn = Message(SOURCES[source], content, thought or None, tuple(calls), train, at=at)
    return [turn, *_results(step.get("observation"), f"{at}.observation", calls, first)]


def _is_context(step: Mapping[str, Any], at: str) -> bool:
    copied, count = step.get("is_copied_context"), step.get("llm_call_count")
    if copied is not None and not isinstance(copied, bool):
        raise Flaw("bad_flag", f"{at}.is_copied_context", f"is {copied!r}; use false or true")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise Flaw("bad_flag", f"{at}.llm_call_count", f"is {count!r}; it counts calls from 0")
    return bool(copied) or count == 0


def _calls(value: Any, key: str, tools: Tools) -> list[Call]:
    if is_set(value) and not isinstance(value, list):
        raise Flaw("bad_arguments", key, "tool_calls is not a list of calls")
    calls = []
    for i, call in enumerate(value or []):
        at = f"{key}[{i}]"
        if not isinstance(call, dict):
            raise Flaw("bad_arguments", at, "a call is an object")
        check_keys(call, {"tool_call_id", "function_name", "arguments", "extra"}, at)
        name, identity = call.get("function_name"), call.get("tool_call_id")
        if not isinstance(name, str) or not name.strip():
            raise Flaw("missing_name", f"{at}.function_name", "the call does not name its function")
        if isinstance(call.get("arguments"), str):
            said = "arguments are text; ATIF has an object"
            raise Flaw("bad_arguments", f"{at}.arguments", said)
        arguments = read_arguments(call.get("arguments"), f"{at}.arguments", name, tools)
        calls.append(Call(name, arguments, str(identity) if is_set(identity) else None))
    check_ids(calls, key)
    return calls


def _results(value: Any, key: str, calls: list[Call], first: int) -> list[Message]:
    """The results of a step's calls; each says which call, unless there is only one."""
    if not is_set(value):
        return []
    results = value.get("results") or [] if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(results, list):
        raise Flaw("content_part", key, "an observation is an object with a list of results")
    check_keys(value, {"results", "extra"}, key)
    out, answered = [], set()
    for i, result in enumerate(results):
        at = f"{key}.results[{i}]"
        if not isinstance(result, dict):
            raise Flaw("content_part", at, "a result is an object")
        check_keys(result, {"source_call_id", "content", "extra"}, at)
        named = result.get("source_call_id")
        fits = [
            k
            for k, call in enumerate(calls)
            if k not in answered and (call.id == named if is_set(named) else len(calls) == 1)
        ]
        if not fits:
            said = f"{named!r} is no open call of this step"
            raise Flaw("result_without_call", f"{at}.source_call_id", said)
        answered.add(fits[-1])
        content = read_content(result.get("content"), f"{at}.content", allow_none=True)
        out.append(Message("tool", content, answers=first + fits[-1], at=at))
    return out
