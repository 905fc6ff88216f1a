"""Admission against AReaL's own state machine; the age rule against random schedules."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentcpm_jax.rollout.staleness import Admission, choose, oldest_trained
from agentcpm_jax.types import Provenance, Segment

CASES = json.loads((Path(__file__).parents[1] / "golden/staleness/staleness.json").read_text())[
    "cases"
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_admission_follows_areal(case: dict) -> None:
    """State after every operation of sequences run through AReaL's StalenessManager."""
    admission = Admission(**case["config"])
    plain: dict[str, Callable[[], None]] = {
        "enqueue": admission.enqueue,
        "submit": admission.dequeue_submit,
        "accept": admission.accept,
        "reject": admission.reject,
    }
    for n, (op, expected) in enumerate(zip(case["ops"], case["expected"], strict=True)):
        submitted = None
        if op == "try_submit":
            submitted = admission.get_capacity() > 0
            if submitted:
                admission.submit()
        elif op == "version+1":
            admission.version += 1
        elif op.startswith("set_version:"):
            admission.version = int(op.split(":")[1])
        elif op.startswith("recover:"):
            admission.recover(int(op.split(":")[1]))
        else:
            plain[op]()
        assert [submitted, admission.get_capacity(), *admission.stats()] == expected, (n, op)


def test_a_dropped_group_makes_room_for_exactly_one() -> None:
    admission = Admission(batch_size=2, max_staleness=1, max_concurrent=10)
    for _ in range(4):
        admission.submit()
        admission.accept()
    assert admission.get_capacity() == 0
    admission.drop()
    assert admission.get_capacity() == 1
    admission.recover(version=3, accepted=7)
    assert admission.stats() == (7, 0, 0, 0)
    assert admission.get_capacity() == (1 + 3 + 1) * 2 - 7


def test_age_counts_trained_tokens_only() -> None:
    """Neither history nor tokens that a filter took out make a segment old."""
    provenance = np.array([Provenance.HISTORY, *[Provenance.SAMPLED] * 3], np.uint8)
    version = np.array([1, 2, 5, 6], np.int32)
    segment = Segment(np.arange(4), provenance, np.zeros(4, np.float32), version)
    assert oldest_trained(segment, np.ones(4, bool)) == 2
    assert oldest_trained(segment, np.array([True, False, True, True])) == 5
    assert oldest_trained(segment, np.array([True, False, False, False])) is None


def test_choose_is_oldest_first_and_drops_segments_before_groups() -> None:
    ready = {1: [9, 9], 2: [7, 8], 3: [5, 8], 4: [5, 6], 5: [8]}
    choice = choose(ready, [], step=9, batch_size=3, max_staleness=2, wait=False)
    assert choice.over_age == (4,)  # 5 and 6 are older than 7
    assert choice.ship == (2, 3, 5)  # 3 lives on through its segment of version 8
    assert choose(ready, [], 9, 5, 2, wait=False).ship == ()  # four are not five


def test_wait_holds_a_batch_back_for_a_group_that_would_grow_too_old() -> None:
    ready = {4: [3], 5: [3]}
    assert choose(ready, [1], 3, 2, 2, wait=False).ship == (4, 5)
    assert choose(ready, [1], 3, 2, 2, wait=True).ship == ()
    assert choose(ready, [2], 3, 2, 2, wait=True).ship == (4, 5)
    # Three groups of version 2 do not fit into batch 4, their last one, if none ships now.
    assert choose(ready, [2, 2, 2], 3, 2, 2, wait=True).ship == ()


def test_wait_ends_when_nothing_runs_that_could_take_a_place() -> None:
    """An engine behind admission's version made three groups too old for the batches to come."""
    ready = {1: [0], 2: [0], 3: [0], 4: [1]}
    assert choose(ready, [2], 2, 1, 2, wait=True).ship == ()
    assert choose(ready, [], 2, 1, 2, wait=True).ship == (1,)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(0, 4), st.integers(1, 12), st.booleans(), st.integers())
def test_no_schedule_breaks_the_bound(
    batch: int, eta: int, limit: int, wait: bool, seed: int
) -> None:
    """Any completion order: the budget holds, no shipped group is too old, `wait` drops none."""
    rnd = random.Random(seed)
    admission = Admission(batch, eta, limit)
    running: dict[int, int] = {}
    ready: dict[int, list[int]] = {}
    issued = step = moves = 0
    while step < 12:
        moves += 1
        assert moves < 5000, "no progress"
        while admission.get_capacity() > 0:
            admission.submit()
            running[issued] = admission.version
            issued += 1
        assert admission.accepted + admission.running <= (eta + admission.version + 1) * batch
        choice = choose(ready, running.values(), step, batch, eta, wait)
        for i in choice.over_age:
            assert not wait
            del ready[i]
            admission.drop()
        if choice.ship:
            assert len(choice.ship) == batch
            for i in choice.ship:
                assert step - min(ready.pop(i)) <= eta
            step += 1
            admission.version = step
        elif running:
            i = rnd.choice(sorted(running))
            version = running.pop(i)
            if rnd.random() < 0.25:
                admission.reject()
            else:
                admission.accept()
                ready[i] = [rnd.randint(version, admission.version)]
    assert admission.running == len(running)
    assert admission.accepted == step * batch + len(ready)
