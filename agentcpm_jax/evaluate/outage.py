"""Outages pass: what failed for reasons outside the policy is asked again until it has an answer.

A failure says nothing about the policy, so it is never a result. After a pause that grows the same
is asked again, and given up in one of two ways, which the others tell apart:

    others get answers      what fails on its own for `GRACE` seconds stays without an answer
    nobody gets an answer   after `PATIENCE` seconds everything ends, as `BreakerOpen`

Where no other is being asked, one that had an answer before is asked once more, and decides.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from agentcpm_jax.rollout.groups import BreakerOpen

ATTEMPTS = 4  # before anything is given up
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds; each is twice the one before
GRACE = 60.0
PATIENCE = 300.0
LONGEST_PATIENCE = 3600.0  # as long as first attempts are under way: episodes may be long
TELL_AFTER = 2.0  # seconds without an answer that are worth a line
_NEVER = -float("inf")

T = TypeVar("T")
Once = Callable[[int], Awaitable[T]]  # attempt -> its result
Failure = Callable[[T], str]  # why a result is no answer; "" for an answer


class Outages:
    """What the askers of one evaluation know of each other.

    Args:
      name: of the evaluation, for messages.
      concurrency: how many are asked at a time; those that pause are not among them.
      announce: shows a line when answers cease, and when they are back.
    """

    def __init__(self, name: str, concurrency: int, announce: Callable[[str], None]) -> None:
        self._name, self._announce = name, announce
        self._slots, self._checking = asyncio.Semaphore(concurrency), asyncio.Lock()
        self._answered = _NEVER  # when anybody last had an answer, by the event loop's clock
        self._silent: float | None = None  # when the first failure since then was
        self._checked = _NEVER  # when the witness last had none
        self._untried = 0  # first attempts under way
        self._told = False
        self._witness: Callable[[], Awaitable[bool]] | None = None

    async def ask(self, once: Once[T], failure: Failure[T]) -> T:
        """The first result that is an answer; the last failure of what is given up.

        Raises `BreakerOpen` when nobody gets an answer any more.
        """
        time = asyncio.get_running_loop().time
        first = before = time()
        for attempt in itertools.count():
            async with self._slots:
                started = time()
                self._untried += not attempt
                try:
                    result = await once(attempt)
                finally:
                    self._untried -= not attempt
            now, why = time(), failure(result)
            if not why:
                self.remember(once, failure, attempt)
                self._note_answer(now)
                return result
            first = first if attempt else now
            self._silent = now if self._silent is None else self._silent
            if attempt + 1 >= ATTEMPTS and now - first >= GRACE:
                if before < self._answered < started:
                    return result
                await self._ask_witness(since=before)
                silence = time() - self._silent if self._silent is not None else 0.0
                if silence >= (LONGEST_PATIENCE if self._untried else PATIENCE):
                    raise BreakerOpen(
                        f"{self._name}: no answer for {silence:.0f} s; the last failure: {why}"
                    )
            self._tell(now, why)
            before = now
            await asyncio.sleep(min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE))
        raise AssertionError("unreachable")

    def remember(self, once: Once[T], failure: Failure[T], attempt: int) -> None:
        """This attempt had an answer: it can bear witness whether answers are to be had."""
        self._witness = partial(_answers, once, failure, attempt)

    async def _ask_witness(self, since: float) -> None:
        time = asyncio.get_running_loop().time
        async with self._checking:
            if self._answered > since or not self._witness:
                return
            if time() - self._checked < LONGEST_PAUSE:
                return
            async with self._slots:
                answers = await self._witness()
            if answers:
                self._note_answer(time())
            else:
                self._checked = time()

    def _tell(self, now: float, why: str) -> None:
        silent = self._silent is not None and now - self._silent >= TELL_AFTER
        if silent and not self._told:
            self._told = True
            self._announce(f"{self._name}: no answers ({why}); asking again, {PATIENCE:.0f} s long")

    def _note_answer(self, now: float) -> None:
        self._answered, self._silent = now, None
        if self._told:
            self._told = False
            self._announce(f"{self._name}: answers again")


async def _answers(once: Once[T], failure: Failure[T], attempt: int) -> bool:
    return not failure(await once(attempt))
