"""Every way an episode ends, and what is kept of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from agentcpm_jax.chat.format import IM_END
from agentcpm_jax.rollout import episode
from agentcpm_jax.rollout.episode import run_episode
from agentcpm_jax.rollout.policy import Completion, Finish, SampleRequest
from agentcpm_jax.types import (
    Provenance,
    StopReason,
    ToolResult,
    ToolStatus,
    Trajectory,
    TurnFlag,
    UserError,
)
from tests.rollout.scripted_episode import (
    ANSWER,
    CFG,
    CHAT,
    ENGLISH,
    TASK,
    Library,
    Says,
    check_consistent,
    play,
    search,
)


def engine(finish: Finish, ids: Sequence[int] = (), error: str = "") -> Any:
    class Policy:
        async def sample(self, request: SampleRequest) -> Completion:
            n = np.asarray(ids, np.int32)
            return Completion(
                n, np.zeros(len(n), np.float32), np.full(len(n), 3, np.int32), finish, error
            )

    return Policy()


SMALL = replace(CFG, max_context=1000)
GONE = Library({"a": ToolResult(ToolStatus.INFRA_ERROR, "server gone")})
STOPS: dict[StopReason, Callable[[], Trajectory]] = {
    StopReason.ANSWERED: lambda: play(ANSWER),
    StopReason.MAX_TURNS: lambda: play(*map(search, "abcd"), cfg=replace(CFG, max_turns=3)),
    StopReason.MAX_CONTEXT: lambda: play(*(search(str(k)) for k in range(100)), cfg=SMALL),
    StopReason.REPETITION: lambda: play(search("a")),
    StopReason.NO_PROGRESS: lambda: play(*(f"say {k}" for k in range(30))),
    StopReason.TRUNCATED: lambda: play("word " * 600),
    StopReason.ENGINE_ERROR: lambda: play(policy=engine(Finish.ERROR, error="out of memory")),
    StopReason.INFRA_ERROR: lambda: play(search("a"), toolbox=GONE),
}


def test_the_loop_can_reach_every_stop_but_the_graders_and_the_callers() -> None:
    assert set(StopReason) - set(STOPS) == {StopReason.JUDGE_ERROR, StopReason.CANCELLED}


@pytest.mark.parametrize("reason", STOPS)
def test_every_stop_is_reached(reason: StopReason) -> None:
    trajectory = STOPS[reason]()
    assert trajectory.stop is reason
    assert (trajectory.answer is not None) == (reason is StopReason.ANSWERED)
    assert (trajectory.issue_id, trajectory.sample, trajectory.attempt) == (7, 1, 0)
    check_consistent(trajectory, SMALL if reason is StopReason.MAX_CONTEXT else CFG)


def test_no_generation_is_paid_for_that_cannot_fit() -> None:
    says = Says(search("a"), search("b"))
    huge = Library({"b": ToolResult(ToolStatus.OK, "word " * 2000)})
    trajectory = play(policy=says.policy, toolbox=huge, cfg=SMALL)
    assert trajectory.stop is StopReason.MAX_CONTEXT
    assert len(says.requests) == len(trajectory.turns) == 2
    assert trajectory.turns[1].results[0].content.startswith("word")  # recorded, not shown
    check_consistent(trajectory, SMALL)
    for request in says.requests:
        assert len(request.prompt_ids) + request.max_new_tokens <= SMALL.max_context
        assert request.max_new_tokens >= SMALL.reserve


@pytest.mark.parametrize(("missing", "turns"), [(0, 2), (1, 1)])
def test_a_turn_starts_only_with_the_reserve_at_hand(missing: int, turns: int) -> None:
    says = Says(search("a"), ANSWER)
    play(policy=says.policy)
    needed = len(says.requests[1].prompt_ids) + CFG.reserve
    trajectory = play(search("a"), ANSWER, cfg=replace(CFG, max_context=needed - missing))
    assert len(trajectory.turns) == turns
    assert (trajectory.stop is StopReason.MAX_CONTEXT) == bool(missing)


def test_context_that_ends_inside_a_turn_is_max_context_not_truncation() -> None:
    trajectory = play("word " * 600, cfg=replace(CFG, max_context=700))
    assert trajectory.stop is StopReason.MAX_CONTEXT
    assert trajectory.turns[0].flags == (TurnFlag.TRUNCATED,)
    assert len(trajectory.segments[0]) == 700


def test_prompts_that_do_not_fit() -> None:
    says = Says(ANSWER)
    long = replace(TASK, question="word " * 2000)
    run = run_episode(
        long, says.policy, Library(), CHAT, SMALL, issue_id=0, sample=0, attempt=0, seed=0
    )
    trajectory = asyncio.run(run)
    assert (trajectory.stop, trajectory.turns, says.requests) == ("max_context", (), [])
    with pytest.raises(UserError, match="max_context is 200"):
        play(ANSWER, cfg=replace(CFG, max_context=200))


def test_repetition_is_flagged_from_the_second_time_and_stops_at_the_fourth() -> None:
    library = Library()
    trajectory = play(search("a"), search("b"), search("a"), toolbox=library)
    assert [TurnFlag.REPEATED in t.flags for t in trajectory.turns] == [False, False, *[True] * 3]
    assert trajectory.stop is StopReason.REPETITION
    assert library.asked == ["a", "b", "a", "a"]  # the last one is not run


def test_progress_resets_the_idle_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episode, "NO_PROGRESS_STOP", 3)
    talk = [f"say {k}" for k in range(9)]
    trajectory = play(*talk[:2], search("a"), *talk[2:4], search("b"), *talk[4:])
    assert trajectory.stop is StopReason.NO_PROGRESS
    assert len(trajectory.turns) == 9


def test_a_truncated_turn_is_kept_flagged_and_not_acted_on() -> None:
    library = Library()
    trajectory = play(search("a") + " word" * 600, toolbox=library)
    turn = trajectory.turns[0]
    assert trajectory.stop is StopReason.TRUNCATED
    assert (turn.flags, turn.calls, library.asked) == ((TurnFlag.TRUNCATED,), (), [])
    assert turn.end - turn.sample_start == CFG.max_new_tokens
    assert trajectory.segments[0].sampled.sum() == CFG.max_new_tokens


def test_the_environment_closes_what_the_policy_left_open() -> None:
    """The `<|im_end|>` that no policy sampled is the template's: no log-prob, no gradient."""
    for policy in (
        Says(ENGLISH, end=False).policy,  # an engine that stopped without a stop id
        Says(ENGLISH + "<|endoftext|>", end=False).policy,
    ):
        trajectory = play(policy=policy, cfg=replace(CFG, max_turns=2))
        check_consistent(trajectory)
        (segment,), (first, second) = trajectory.segments, trajectory.turns
        assert segment.ids[first.end] == CHAT.im_end_id
        assert segment.provenance[first.end] == Provenance.TEMPLATE
        nudge = CHAT.decode(segment.ids[first.end : second.sample_start])
        assert nudge.startswith(f"{IM_END}\n<|im_start|>user\n")


@pytest.mark.parametrize("finish", [Finish.ERROR, Finish.ABORT])
def test_engine_trouble_keeps_what_was_sampled(finish: Finish) -> None:
    trajectory = play(policy=engine(finish, ids=[5, 6], error="gone"))
    assert (trajectory.stop, trajectory.error) == (StopReason.ENGINE_ERROR, "gone")
    assert trajectory.segments[0].ids[-2:].tolist() == [5, 6]
    check_consistent(trajectory)


def test_an_engine_that_returns_unequal_arrays_is_a_bug() -> None:
    class Broken:
        async def sample(self, request: SampleRequest) -> Completion:
            none = np.zeros(0, np.float32)
            return Completion(np.zeros(2, np.int32), none, none, Finish.STOP)

    with pytest.raises(ValueError, match="lengths differ"):
        play(policy=Broken())


def test_infra_trouble_ends_the_turn_at_once() -> None:
    library = Library({"b": ToolResult(ToolStatus.INFRA_ERROR, "server gone")})
    text = "\n".join(map(search, "abc"))
    trajectory = play(text, toolbox=library)
    assert (trajectory.stop, trajectory.error) == (StopReason.INFRA_ERROR, "server gone")
    assert library.asked == ["a", "b"]
    assert [r.status for r in trajectory.turns[0].results] == ["ok", "infra_error"]


def test_cancellation_propagates() -> None:
    async def cancel() -> None:
        class Waits:
            async def sample(self, request: SampleRequest) -> Completion:
                waiting.set()
                await asyncio.sleep(60)
                raise AssertionError

        waiting = asyncio.Event()
        episode = run_episode(
            TASK, Waits(), Library(), CHAT, CFG, issue_id=0, sample=0, attempt=0, seed=0
        )
        running = asyncio.create_task(episode)
        await waiting.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(cancel())
