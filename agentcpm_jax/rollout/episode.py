"""One trajectory: prompt, sample, call tools, append, again; token in, token out.

The loop of AgentCPM-Explore's sampler with the following deviations:
1. one segment grows by sampled ids, verbatim, and by template deltas; nothing is rendered twice;
2. the context limit is checked before each generation, and no observation that does not fit is
   appended;
3. a turn with neither call nor answer gets a short nudge; an unclosed call is a typed error;
4. every malformed call gets its own error observation and its own token span, the valid calls of
   the turn run, and flags of a turn add up instead of overwriting one another;
5. a turn cut at its token budget is kept and flagged but never acted on;
6. a failing engine or tool server ends the episode as unknown, never as a wrong answer;
7. a turn that opens a second thought is not acted on: it has not come to its calls or its answer;
8. half of a surrogate pair, which is no text, is replaced in what a tool said, and this is said.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from agentcpm_jax.chat.format import ChatFormat, Message
from agentcpm_jax.chat.parse import ParsedTurn, parse_completion
from agentcpm_jax.dock.protocol import Toolbox
from agentcpm_jax.rollout.config import EpisodeConfig
from agentcpm_jax.rollout.policy import (
    Completion,
    Finish,
    SampleRequest,
    SamplingParams,
    TokenPolicy,
)
from agentcpm_jax.types import (
    Provenance,
    Segment,
    StopReason,
    Task,
    ToolCall,
    ToolResult,
    ToolStatus,
    Trajectory,
    Turn,
    TurnFlag,
    UserError,
)

#: Turns in a row with neither call nor answer that end an episode: it has lost its task.
NO_PROGRESS_STOP = 20
#: Characters of one observation that are shown: a page of a few thousand tokens.
MAX_TOOL_CHARS = 20_000
#: What a turn with neither call nor answer is told.
NUDGE = (
    "Your message held neither a tool call nor an answer. "
    "Call a tool, or give the final answer between <answer> and </answer>."
)
_SECOND_THOUGHT = ToolCall(
    "", None, "unfinished_thought", "a message has one thought; nothing after a second is acted on"
)
_ANSWER = re.compile(r"<answer>.*?</answer>", re.DOTALL)
_HALF = re.compile("[\ud800-\udfff]")
#: ids i32[N] and provenance u8[N]
_Tokens: TypeAlias = tuple[np.ndarray, np.ndarray]
#: why to stop, or the messages that answer the turn
_Next: TypeAlias = tuple[StopReason | None, list[Message]]


async def run_episode(
    task: Task,
    policy: TokenPolicy,
    toolbox: Toolbox,
    chat: ChatFormat,
    cfg: EpisodeConfig,
    *,
    issue_id: int,
    sample: int,
    attempt: int,
    seed: int,
    redraw: bool = True,
) -> Trajectory:
    """Play one task to its end; sets the answer, and leaves verdict and reward to the grader.

    The caller opens and closes `toolbox`. Cancellation propagates. Another attempt draws other
    tokens, or the same ones without `redraw`.
    Raises UserError when the system prompt and the tools alone do not fit into `max_context`.
    """
    began = time.monotonic()
    key, drawn = (issue_id, sample, attempt), attempt if redraw else 0
    episode = _Episode(policy, toolbox, chat, cfg, key, (seed, issue_id, sample, drawn))
    stop = episode.open(task.question)
    while stop is None:
        stop = await episode.step()
    return Trajectory(
        segments=(episode.tokens.segment(),),
        turns=tuple(episode.turns),
        stop=stop,
        issue_id=issue_id,
        sample=sample,
        attempt=attempt,
        answer=episode.answer,
        error=episode.error,
        seconds=time.monotonic() - began,
    )


def check_prompt(chat: ChatFormat, cfg: EpisodeConfig, schemas: Sequence[Message]) -> None:
    """Raises UserError when no task could ever fit: system prompt and tools alone are too long."""
    fixed = len(chat.prompt_ids(_messages(cfg, ""), schemas))
    if fixed + cfg.reserve > cfg.max_context:
        raise UserError(
            f"the system prompt and the tools take {fixed} tokens, episode.max_context is "
            f"{cfg.max_context} with {cfg.reserve} in reserve; raise max_context"
        )


class _Episode:
    """The state of one trajectory: what has been written, the turns, and the stop counters."""

    def __init__(
        self,
        policy: TokenPolicy,
        toolbox: Toolbox,
        chat: ChatFormat,
        cfg: EpisodeConfig,
        key: tuple[int, int, int],
        seed: tuple[int, ...],
    ) -> None:
        self._policy, self._toolbox, self._chat, self._cfg = policy, toolbox, chat, cfg
        self._key, self._seed = key, seed
        self._schemas = toolbox.schemas()
        self._names = frozenset(_name_of(schema) for schema in self._schemas)
        self._texts: Counter[str] = Counter()
        self._idle = 0
        self._pending: _Tokens = (np.zeros(0, np.int32), np.zeros(0, np.uint8))
        self.tokens = TokenBuffer()
        self.turns: list[Turn] = []
        self.answer: str | None = None
        self.error = ""

    def open(self, question: str) -> StopReason | None:
        """Render the prompt; returns a stop reason when it leaves no room to generate."""
        cfg = self._cfg
        prompt = self._chat.prompt_ids(_messages(cfg, question), self._schemas)
        self._pending = (prompt, np.full(len(prompt), Provenance.TEMPLATE, np.uint8))
        if len(prompt) + cfg.reserve <= cfg.max_context:
            return None
        check_prompt(self._chat, cfg, self._schemas)
        self.error = f"the prompt has {len(prompt)} tokens, max_context is {cfg.max_context}"
        return StopReason.MAX_CONTEXT

    async def step(self) -> StopReason | None:
        """One turn: append the pending tokens, sample, act, and prepare the next tokens."""
        cfg, start = self._cfg, len(self.tokens)
        self.tokens.append(*self._pending)
        shown = len(self.tokens)
        request = self._request(shown)
        completion = await self._policy.sample(request)
        self.tokens.append_sampled(completion)
        self.turns.append(Turn(segment=0, start=start, sample_start=shown, end=len(self.tokens)))
        if completion.finish in (Finish.ERROR, Finish.ABORT):
            self.error = completion.error or str(completion.finish)
            return StopReason.ENGINE_ERROR
        if completion.finish is Finish.LENGTH and not _ended(completion, self._chat):
            stop, appended = self._cut(by_context=request.max_new_tokens < cfg.max_new_tokens)
        else:
            stop, appended = await self._act(completion)
        if stop is None and self._idle >= NO_PROGRESS_STOP:
            stop = StopReason.NO_PROGRESS
        if stop is None and len(self.turns) >= cfg.max_turns:
            stop = StopReason.MAX_TURNS
        if stop is not None:
            return stop
        self._pending = self._delta(completion, appended)
        if len(self.tokens) + len(self._pending[0]) + cfg.reserve > cfg.max_context:
            return StopReason.MAX_CONTEXT
        return None

    def _request(self, shown: int) -> SampleRequest:
        cfg, turn = self._cfg, len(self.turns)
        issue_id, sample, attempt = self._key
        return SampleRequest(
            rid=f"{issue_id}-{sample}-{attempt}/{turn}/",
            prompt_ids=self.tokens.ids(),
            max_new_tokens=min(cfg.max_new_tokens, cfg.max_context - shown),
            params=SamplingParams(
                temperature=cfg.temperature,
                stop_ids=self._chat.stop_ids,
                seed=(*self._seed, turn),
            ),
        )

    def _cut(self, *, by_context: bool) -> _Next:
        """A turn that hit its token budget: kept, flagged, never acted on; it ends the episode."""
        self._update(flags=(TurnFlag.TRUNCATED,))
        return StopReason.MAX_CONTEXT if by_context else StopReason.TRUNCATED, []

    async def _act(self, completion: Completion) -> _Next:
        """Act on a whole turn: an answer ends the episode, else repetition does, else calls run."""
        cfg, chat = self._cfg, self._chat
        text = chat.decode(completion.ids[:-1] if _ended(completion, chat) else completion.ids)
        parsed = parse_completion(text, self._names, in_thought=chat.in_thought)
        if _thinks_again(text, parsed):
            parsed = ParsedTurn((_SECOND_THOUGHT,), None, ((0, len(text)),))
        called = any(call.error != "unfinished_thought" for call in parsed.calls)
        progress = called or parsed.answer is not None
        self._idle = 0 if progress else self._idle + 1
        self._texts[text] += 1
        calls = _located(parsed, completion, chat, self.turns[-1].sample_start)
        flags = {
            TurnFlag.FORMAT_ERROR: bool(parsed.errors),
            TurnFlag.REPEATED: self._texts[text] > 1,
            TurnFlag.NO_CALL: not progress,
        }
        self._update(calls=calls, flags=tuple(flag for flag, holds in flags.items() if holds))
        if parsed.answer is not None:
            self.answer = parsed.answer
            return StopReason.ANSWERED, []
        if self._texts[text] >= cfg.repetition_stop:
            return StopReason.REPETITION, []
        if not called:
            return None, [{"role": "user", "content": NUDGE}]
        if len(self.turns) >= cfg.max_turns:  # nobody would read the results
            return StopReason.MAX_TURNS, []
        results = await _run_calls(self._toolbox, calls, MAX_TOOL_CHARS)
        self._update(results=results)
        if results[-1].status is ToolStatus.INFRA_ERROR:
            self.error = results[-1].content[:500]
            return StopReason.INFRA_ERROR, []
        return None, [{"role": "tool", "content": result.content} for result in results]

    def _delta(self, completion: Completion, appended: Sequence[Message]) -> _Tokens:
        """The environment's tokens; they first close a message that the policy left open."""
        ids, provenance = self._chat.delta_tokens(appended)
        if len(completion.ids) and int(completion.ids[-1]) == self._chat.im_end_id:
            return ids, provenance
        return (
            np.concatenate([np.asarray([self._chat.im_end_id], np.int32), ids]),
            np.concatenate([np.asarray([Provenance.TEMPLATE], np.uint8), provenance]),
        )

    def _update(self, **changes: Any) -> None:
        self.turns[-1] = dataclasses.replace(self.turns[-1], **changes)


class TokenBuffer:
    """The growing segment, in buffers that double: appending costs time linear in the turn."""

    def __init__(self) -> None:
        self._length = 0
        self._columns = [
            np.empty(1024, dtype) for dtype in (np.int32, np.uint8, np.float32, np.int32)
        ]

    def __len__(self) -> int:
        return self._length

    def append(self, ids: np.ndarray, provenance: np.ndarray | Provenance) -> None:
        self._write(ids, provenance, np.nan, -1)

    def append_sampled(self, completion: Completion) -> None:
        """Raises ValueError when an engine returns arrays of different lengths."""
        columns = (completion.ids, completion.logprobs, completion.versions)
        if len({len(column) for column in columns}) != 1:
            raise ValueError(f"completion: lengths differ: {[len(c) for c in columns]}")
        self._write(completion.ids, Provenance.SAMPLED, completion.logprobs, completion.versions)

    def ids(self) -> np.ndarray:
        """A read-only view of what has been written; later appends do not change it."""
        view = self._columns[0][: self._length]
        view.flags.writeable = False
        return view

    def segment(self) -> Segment:
        ids, provenance, logprob, version = (c[: self._length].copy() for c in self._columns)
        return Segment(ids=ids, provenance=provenance, logprob=logprob, version=version)

    def _write(self, ids: np.ndarray, *values: np.ndarray | float) -> None:
        end = self._length + len(ids)
        if end > len(self._columns[0]):
            size = max(end, 2 * len(self._columns[0]))
            self._columns = [
                np.concatenate([c, np.empty(size - len(c), c.dtype)]) for c in self._columns
            ]
        for column, value in zip(self._columns, (ids, *values), strict=True):
            column[self._length : end] = value
        self._length = end


def _messages(cfg: EpisodeConfig, question: str) -> list[Message]:
    user = {"role": "user", "content": question}
    if not cfg.system_prompt:
        return [user]
    return [{"role": "system", "content": cfg.system_prompt}, user]


def _ended(completion: Completion, chat: ChatFormat) -> bool:
    """Whether the last sampled id is a stop id."""
    return len(completion.ids) > 0 and int(completion.ids[-1]) in chat.stop_ids


def _thinks_again(text: str, parsed: ParsedTurn) -> bool:
    """Whether the turn opens another thought after its first, in none of its calls and answers."""
    start = text.find("</think>")
    if start < 0:
        return False
    for first, last in reversed(parsed.spans):  # what a call holds is data
        text = text[: max(first, start)] + text[max(last, start) :]
    return "<think>" in _ANSWER.sub("", text[start:])


def _located(
    parsed: ParsedTurn, completion: Completion, chat: ChatFormat, offset: int
) -> tuple[ToolCall, ...]:
    """The calls with their token spans in the segment; `offset` = where the completion starts."""
    spans = chat.token_spans(completion.ids, parsed.spans)
    return tuple(
        dataclasses.replace(call, span=(offset + start, offset + end))
        for call, (start, end) in zip(parsed.calls, spans, strict=True)
    )


async def _run_calls(
    toolbox: Toolbox, calls: Sequence[ToolCall], max_chars: int
) -> tuple[ToolResult, ...]:
    """Run the calls one after another and return their results, up to the first infra error."""
    results: list[ToolResult] = []
    for call in calls:
        if call.error is not None or call.arguments is None:
            content = json.dumps({"error": call.error, "detail": call.message}, ensure_ascii=False)
            result = ToolResult(ToolStatus.BAD_ARGUMENTS, content)
        else:
            result = await toolbox.call(call.name, call.arguments)
        results.append(_shortened(_as_text(result), max_chars))
        if result.status is ToolStatus.INFRA_ERROR:
            break
    return tuple(results)


def _as_text(result: ToolResult) -> ToolResult:
    """The result as text that every tokenizer, file and page takes."""
    content, count = _HALF.subn("\ufffd", result.content)
    if not count:
        return result
    said = f"[replaced {count} times: half of a surrogate pair, which is no text]"
    return dataclasses.replace(result, content=f"{content}\n{said}")


def _shortened(result: ToolResult, max_chars: int) -> ToolResult:
    left_out = len(result.content) - max_chars
    if left_out <= 0:
        return result
    content = f"{result.content[:max_chars]}\n[{left_out} more characters left out]"
    return dataclasses.replace(result, content=content)


def _name_of(schema: Message) -> str:
    """A tool's name; OpenAI's form {type, function: {name}} or the bare function."""
    return str(schema.get("function", schema).get("name", ""))
