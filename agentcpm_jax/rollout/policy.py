"""The protocols that policies implement, and the scripted policy.

`TokenPolicy` takes ids and returns ids with log-probabilities and versions: only its output can be
trained on. `Engine` is a `TokenPolicy` whose weights the trainer replaces. `ChatPolicy` takes
messages and returns a message: it serves evaluation, judges and summarisers.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np


class Finish(enum.StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # the last id of the completion is a stop id or completes a stop string
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """How to sample; `temperature=0` is greedy.

    Log-probabilities are those of the full distribution at temperature 1, whatever the parameters;
    train on samples without `top_p`, `top_k` and `min_p`.
    """

    temperature: float = 1.0
    stop_ids: tuple[int, ...] = ()
    seed: tuple[int, ...] = (0,)  # folded into the key one by one, then the token index
    top_p: float = 1.0
    top_k: int = 0  # 0 (and SGLang's -1): all
    min_p: float = 0.0  # relative to the most likely id
    stop_strings: tuple[str, ...] = ()  # sampling ends with the id that completes one


@dataclass(frozen=True)
class SampleRequest:
    """A request for one completion. `rid` ends with a delimiter: engines abort by prefix.

    `progress`: an engine that can calls it, in the caller's event loop, with the ids, log-probs and
    versions of each stretch of tokens as soon as it is sampled.
    """

    rid: str
    prompt_ids: np.ndarray  # i32[P]
    max_new_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    deadline: float | None = None  # seconds from submission; None: no limit
    progress: Callable[[Sequence[int], Sequence[float], Sequence[int]], None] | None = None


@dataclass(frozen=True)
class Completion:
    """ids i32[N], logprobs f32[N] under the policy that sampled, versions i32[N]."""

    ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish: Finish
    error: str = ""
    cached_tokens: int = 0  # of the prompt, found in the engine's prefix cache


class TokenPolicy(Protocol):
    """Token in, token out."""

    async def sample(self, request: SampleRequest) -> Completion: ...


@runtime_checkable
class Engine(TokenPolicy, Protocol):
    """A `TokenPolicy` whose weights the trainer replaces.

    Three implementations: the engine in this process (`engine.local.LocalEngine`), the pool of
    servers (`run.engines.PoolEngine`) and the engine behind our own server
    (`engine.serving.ServedLocal`).
    """

    @property
    def version(self) -> int:
        """Version of the weights that the next token is sampled with."""
        ...

    @property
    def tokens_sampled(self) -> int: ...

    @property
    def tokens_prefilled(self) -> int:
        """Prompt tokens computed; 0 where they are not reported."""
        ...

    def set_params(self, params: Any, version: int) -> None:
        """Sample with `params` from now on. They are copied: the trainer may reuse its own."""
        ...

    def close(self) -> None:
        """End running requests; nothing is sampled afterwards."""
        ...


@dataclass(frozen=True)
class AssistantMessage:
    """A chat endpoint's reply; its text cannot be trained on."""

    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    finish: Finish = Finish.STOP
    error: str = ""


class ChatPolicy(Protocol):
    """Messages in, message out."""

    async def reply(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> AssistantMessage: ...


class Scripted:
    """A `TokenPolicy` that plays a script: the loop's test double and the oracle demonstrator.

    `script(request) -> ids` sees the whole prompt. Log-probabilities are 0 (probability 1).
    """

    def __init__(self, script: Callable[[SampleRequest], Sequence[int]], version: int = 0) -> None:
        self._script = script
        self.version = version

    async def sample(self, request: SampleRequest) -> Completion:
        ids = np.asarray(self._script(request), np.int32)
        finish = Finish.STOP
        if len(ids) > request.max_new_tokens:
            ids, finish = ids[: request.max_new_tokens], Finish.LENGTH
        elif not len(ids) or ids[-1] not in request.params.stop_ids:
            finish = Finish.LENGTH if len(ids) == request.max_new_tokens else Finish.STOP
        return Completion(
            ids=ids,
            logprobs=np.zeros(len(ids), np.float32),
            versions=np.full(len(ids), self.version, np.int32),
            finish=finish,
        )
