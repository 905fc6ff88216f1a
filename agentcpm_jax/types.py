"""The types that all parts share: task, turn, segment, trajectory, group.

Host-side, numpy and plain frozen dataclasses; every array is flat and read-only by convention.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np


class Provenance(enum.IntEnum):
    """Who wrote a token. Loss masks are derived from this and nothing else."""

    TEMPLATE = 0  # the renderer or the user
    SAMPLED = 1  # the policy being trained; carries a log-probability and a version
    DEMO = 2  # another author's assistant tokens: trained by SFT only
    HISTORY = 3  # sampled earlier, shown again, never trained again
    TOOL = 4  # a tool's observation
    INJECTED = 5  # another model's text, e.g. a summary


class StopReason(enum.StrEnum):
    """Why an episode ended. Exactly one per trajectory."""

    ANSWERED = "answered"
    MAX_TURNS = "max_turns"
    MAX_CONTEXT = "max_context"
    REPETITION = "repetition"
    NO_PROGRESS = "no_progress"
    TRUNCATED = "truncated"
    ENGINE_ERROR = "engine_error"
    INFRA_ERROR = "infra_error"
    JUDGE_ERROR = "judge_error"
    CANCELLED = "cancelled"


#: Stops that say nothing about the policy: such samples enter no baseline and are run again.
UNKNOWN_STOPS = frozenset(
    {
        StopReason.ENGINE_ERROR,
        StopReason.INFRA_ERROR,
        StopReason.JUDGE_ERROR,
        StopReason.CANCELLED,
    }
)


class Verdict(enum.StrEnum):
    """A grader's judgement of an answer. `UNKNOWN` is never a reward of 0."""

    RIGHT = "right"
    WRONG = "wrong"
    UNKNOWN = "unknown"


class ToolStatus(enum.StrEnum):
    """`TOOL_ERROR` and `BAD_ARGUMENTS` are observations; only `INFRA_ERROR` ends an episode."""

    OK = "ok"
    TOOL_ERROR = "tool_error"
    BAD_ARGUMENTS = "bad_arguments"
    INFRA_ERROR = "infra_error"


class TurnFlag(enum.StrEnum):
    """What the episode loop noticed about a turn; the denoising filters read it."""

    FORMAT_ERROR = "format_error"  # at least one call of the turn was malformed
    REPEATED = "repeated"  # the assistant text already occurs in the context
    TRUNCATED = "truncated"  # generation hit its token budget
    NO_CALL = "no_call"  # neither a call nor an answer


@dataclass(frozen=True)
class Task:
    """One question with the answers that count as right."""

    question: str
    answers: tuple[str, ...]
    kind: str = "qa"  # e.g. "hop1", "hop2": the key of per-kind breakdowns
    split: str = "train"
    meta: Mapping[str, Any] = field(default_factory=dict)  # JSON-able; e.g. the oracle script

    @property
    def uid(self) -> str:
        """Hash of the content (not of `meta`): the same question is the same task everywhere."""
        body = json.dumps([self.question, list(self.answers), self.kind], ensure_ascii=False)
        return hashlib.sha256(body.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; inverse of `from_json`."""
        return {
            "question": self.question,
            "answers": list(self.answers),
            "kind": self.kind,
            "split": self.split,
            "meta": dict(self.meta),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Task:
        """Inverse of `to_json`."""
        return cls(
            question=row["question"],
            answers=tuple(row["answers"]),
            kind=row.get("kind", "qa"),
            split=row.get("split", "train"),
            meta=row.get("meta", {}),
        )


@dataclass(frozen=True)
class ToolCall:
    """One parsed `<tool_call>` block; `error` names the typed parse error of a malformed one."""

    name: str
    arguments: Mapping[str, Any] | None
    error: str | None = None
    message: str = ""
    span: tuple[int, int] = (-1, -1)  # [start, end) in the segment; (-1, -1): not located


@dataclass(frozen=True)
class ToolResult:
    """A tool's answer. A failed call has a status and readable content as well."""

    status: ToolStatus
    content: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Turn:
    """A span [start, sample_start, end) of one segment: what was shown, then what was sampled."""

    segment: int
    start: int
    sample_start: int
    end: int
    calls: tuple[ToolCall, ...] = ()
    results: tuple[ToolResult, ...] = ()
    flags: tuple[TurnFlag, ...] = ()

    @property
    def bad_calls(self) -> tuple[tuple[ToolCall, str], ...]:
        """(call, why): malformed calls, and those refused for their arguments."""
        refused = [r.status == ToolStatus.BAD_ARGUMENTS for r in self.results]
        refused += [False] * (len(self.calls) - len(refused))
        return tuple(
            (call, call.error or str(ToolStatus.BAD_ARGUMENTS))
            for call, was_refused in zip(self.calls, refused, strict=False)
            if call.error is not None or was_refused
        )


@dataclass(frozen=True)
class Segment:
    """A token sequence that is one bit-exact prefix chain.

    ids i32[T], provenance u8[T], logprob f32[T] (NaN unless sampled), version i32[T] (-1 unless
    sampled). A context edit closes a segment and forks the next one from `parent_segment`,
    sharing its first `shared_prefix_len` tokens.
    """

    ids: np.ndarray
    provenance: np.ndarray
    logprob: np.ndarray
    version: np.ndarray
    parent_segment: int = -1
    shared_prefix_len: int = 0
    edit_reason: str = ""

    def __post_init__(self) -> None:
        n = len(self.ids)
        for name in ("provenance", "logprob", "version"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"segment: {name} has {len(getattr(self, name))} entries, ids {n}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sampled(self) -> np.ndarray:
        """bool[T]: tokens that the policy under training sampled here."""
        return self.provenance == Provenance.SAMPLED


@dataclass(frozen=True)
class Trajectory:
    """One attempt at one task: segments, turns, one stop reason, one verdict, one reward."""

    segments: tuple[Segment, ...]
    turns: tuple[Turn, ...]
    stop: StopReason
    issue_id: int = -1
    sample: int = 0
    attempt: int = 0
    answer: str | None = None
    verdict: Verdict = Verdict.UNKNOWN
    reward: float | None = None
    trainable: bool = True
    error: str = ""
    seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens stored, shared prefixes counted once."""
        return sum(len(s) - s.shared_prefix_len for s in self.segments)

    @property
    def num_calls(self) -> int:
        return sum(len(t.calls) for t in self.turns)

    @property
    def versions(self) -> tuple[int, int]:
        """(oldest, newest) version among sampled tokens; (-1, -1) when there is none."""
        found = [s.version[s.sampled] for s in self.segments if s.sampled.any()]
        if not found:
            return (-1, -1)
        flat = np.concatenate(found)
        return int(flat.min()), int(flat.max())


@dataclass(frozen=True)
class TrajectoryGroup:
    """The samples of one issued task: the unit of baselines, admission and shipping."""

    issue_id: int
    task: Task
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True)
class Credit:
    """The advantage of each token of a segment, and whether it is trained.

    advantage f32[T] (0 where not kept); keep bool[T]: the token is trained.
    """

    advantage: np.ndarray
    keep: np.ndarray


@dataclass(frozen=True)
class ShippedSegment:
    """A segment that is trained in some step, its origin and the credit of its tokens.

    `segment_index` is its index in the trajectory of (issue_id, sample).
    """

    issue_id: int
    sample: int
    segment_index: int
    segment: Segment
    credit: Credit


@dataclass(frozen=True)
class Decision:
    """A filter's decision about a group, a sample or a turn, and its reason. JSON-able.

    It is about the whole group when `sample` is -1, about a whole sample when `turn` is -1. The log
    stores only sample, filter and reason.
    """

    sample: int
    filter: str
    reason: str
    action: Literal["drop", "mute", "note", ""] = ""
    turn: int = -1

    @property
    def scope(self) -> Literal["group", "sample", "turn"]:
        if self.sample < 0:
            return "group"
        return "sample" if self.turn < 0 else "turn"


class UserError(Exception):
    """A mistake the user can fix: names the offending value and the fix; exit code 2."""
