"""A task from a record, whatever its columns are called: ours, FocalRL's, GAIA's or verl's.

Text stays text: an answer is never parsed. Columns that nothing here reads are kept in `meta`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from agentcpm_jax.records import Flaw, is_set, parse_json
from agentcpm_jax.types import Task

QUESTIONS = ("question", "problem", "task_question", "Question", "prompt")
ANSWERS = ("answers", "answer", "ground_truth", "Final answer", "reward_model")
#: Read where none of those is there; beside them they are kept as meta.
OTHER_QUESTIONS = ("query", "Prompt", "Problem")
OTHER_ANSWERS = (
    *("golden_answers", "gold_answer", "correct_answer", "expected_answer", "final_answer"),
    *("Answer", "label", "gt", "target"),
)
OURS = {"question", "answers", "kind", "split", "meta"}


class TaskFields(NamedTuple):
    """The fields of a task; kind and split are None where the record names none."""

    question: str
    answers: tuple[str, ...]
    kind: str | None
    split: str | None
    meta: dict[str, Any]

    def task(self) -> Task:
        """The task, with the defaults of `Task`."""
        named = {"kind": self.kind, "split": self.split}
        given = {name: value for name, value in named.items() if value is not None}
        return Task(self.question, self.answers, meta=self.meta, **given)


def task_fields(record: Mapping[str, Any]) -> TaskFields:
    """The task of a record; raises `Flaw`."""
    question, read = _question(record)
    answers, sources = _answers(record, question)
    extra = record.get("extra_info")
    of_extra = extra.get("split") if isinstance(extra, dict) else None
    kind = _word(record, "kind") or _word(record, "ability")
    split = _word(record, "split") or (of_extra if isinstance(of_extra, str) else None) or None
    return TaskFields(question, answers, kind, split, _meta(record, read | sources))


def _question(record: Mapping[str, Any]) -> tuple[str, set[str]]:
    """(the question, the columns that are told by it)."""
    found = _questions(record, QUESTIONS) or _questions(record, OTHER_QUESTIONS)
    if len(set(found.values())) > 1:
        names = " and ".join(found)
        raise Flaw("ambiguous", list(found)[-1], f"{names} ask different things")
    if not found:
        empty = next((name for name in QUESTIONS if name in record), None)
        names = ", ".join(QUESTIONS + OTHER_QUESTIONS)
        said = "is empty" if empty else "must be a string, not missing"
        keys = ", ".join(map(str, list(record)[:12])) or "none"
        said = f"question {said}; read are {names}; found keys: {keys}"
        raise Flaw("no_question", empty, said)
    messages = _messages(record.get("prompt"))
    several = isinstance(messages, list) and len(messages) > 1
    return next(iter(found.values())), set(found) - ({"prompt"} if several else set())


def _questions(record: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, str]:
    """What the columns ask; a prompt that says the question in more words is no other question."""
    found: dict[str, str] = {}
    for name in names:
        value = record.get(name)
        if name == "prompt":
            value = _last_user_turn(_messages(value))
            if isinstance(value, str) and any(q.strip() in value for q in found.values()):
                continue
        if isinstance(value, str) and value.strip():
            found[name] = value
        elif is_set(value) and not isinstance(value, str):
            said = f"{name} must be a string, not {type(value).__name__}"
            raise Flaw("no_question", name, said)
    return found


def _messages(prompt: Any) -> Any:
    """The messages of a `prompt` column, which may be their JSON text."""
    if isinstance(prompt, str) and prompt.lstrip().startswith('[{"'):
        try:
            parsed = json.loads(prompt)
        except ValueError:
            return prompt
        return parsed if all(isinstance(m, dict) and "role" in m for m in parsed) else prompt
    return prompt


def _last_user_turn(prompt: Any) -> Any:
    if not isinstance(prompt, list):
        return prompt
    for message in reversed(prompt):
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, list) and all(
                isinstance(p, dict) and p.get("type") == "text" for p in content
            ):
                return "".join(str(p.get("text") or "") for p in content)
            if content is not None and not isinstance(content, str):
                raise Flaw("no_question", "prompt", "the content of the last user turn is no text")
            return content
    return None


def _answers(record: Mapping[str, Any], question: str) -> tuple[tuple[str, ...], set[str]]:
    """(accepted answers, the columns that hold them and nothing else)."""
    names = ANSWERS if any(name in record for name in ANSWERS) else OTHER_ANSWERS
    found = _accepted(record, names)
    if not found:
        there = next((name for name in ANSWERS if name in record), None)
        said = f"{question!r:.80} has no answers; read are {', '.join(ANSWERS[:-1])},"
        said += f" {', '.join(OTHER_ANSWERS)} and"
        raise Flaw("no_answer", there, f"the question {said} reward_model.ground_truth")
    longest = max(found.values(), key=len)
    if any(not set(answers) <= set(longest) for answers in found.values()):
        names = " and ".join(found)
        raise Flaw("ambiguous", list(found)[-1], f"{names} give different answers")
    return longest, {key.split(".")[0] for key in found}


def _accepted(record: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The answers of each column that has some."""
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        value, key = record.get(name), name
        if name == "reward_model":
            value = parse_json(value) if isinstance(value, str) and value[:1] == "{" else value
            if not isinstance(value, dict):
                continue
            value, key = value.get("ground_truth"), "reward_model.ground_truth"
        if isinstance(value, dict) and set(value) == {"target"}:
            value, key = value["target"], f"{key}.target"
        if is_set(value) and not (isinstance(value, str) and not value.strip()):
            found[key] = _texts(value, key)
    return found


def _texts(value: Any, key: str) -> tuple[str, ...]:
    if isinstance(value, list):
        return tuple(_text(v, f"{key}[{i}]") for i, v in enumerate(value))
    return (_text(value, key),)


def _text(value: Any, key: str) -> str:
    """An answer as text; numbers as short as they can be."""
    if isinstance(value, str) and value.strip():
        return value
    if value is None or isinstance(value, str):
        raise Flaw("no_answer", key, "an answer is empty")
    if isinstance(value, bool) or not isinstance(value, int | float):
        said = f"an answer is text or a number, not {type(value).__name__}; write it as text"
        raise Flaw("bad_answer", key, said)
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise Flaw("bad_answer", key, f"an answer is {value}; write a finite number, or text")
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)


def _word(record: Mapping[str, Any], name: str) -> str | None:
    value = record.get(name)
    if not is_set(value):
        return None
    if not isinstance(value, str):
        said = f"{name} must be a string, not {type(value).__name__}"
        raise Flaw("bad_type", name, said)
    return value if value.strip() else None


def _meta(record: Mapping[str, Any], read: set[str]) -> dict[str, Any]:
    """Our own `meta`, and each column that is not told otherwise."""
    given = record.get("meta")
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise Flaw("bad_type", "meta", f"meta must be an object, not {type(given).__name__}")
    told = OURS | (read - {"reward_model"})
    others = {name: value for name, value in record.items() if name not in told}
    both = sorted(given.keys() & others)
    if any(given[name] != others[name] for name in both):
        raise Flaw("ambiguous", both[0], "this column and the one in meta differ")
    return _finite({**given, **others})


def _finite(value: Any) -> Any:
    """NaN and infinities, which JSON and databases do not have, as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value
