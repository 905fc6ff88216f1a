"""Claims: one holder at a time, dead holders replaced, late ones refused; waiters wake."""

from __future__ import annotations

import threading

import pytest

from agentcpm_jax.log.claims import ClaimLost
from agentcpm_jax.log.experience import ExperienceLog
from tests.log.test_experience import entries, task, trajectory


def offered(log: ExperienceLog, count: int) -> list[int]:
    ids = [log.issue("rl", "train", task(n), 0, n) for n in range(count)]
    for issue_id in ids:
        log.claims.offer("rl", issue_id, 5)
    return ids


def taken(log: ExperienceLog, worker: str, limit: int, lease: float = 60.0) -> list[int]:
    return [claim.issue_id for claim in log.claims.take("rl", worker, limit, lease)]


def test_an_issue_has_one_holder_until_it_is_handed_in(log_url: str) -> None:
    with ExperienceLog.open(log_url) as log:
        ids = offered(log, 3)
        log.claims.offer("rl", ids[0], 9)  # offered already: the first offer stands
        (claim,) = log.claims.take("rl", "a", 1, 60.0)
        assert (claim.issue_id, claim.task, claim.version) == (ids[0], task(0), 5)
        assert taken(log, "b", 5) == ids[1:] and taken(log, "c", 5) == []
        assert log.claims.take("other", "c", 5, 60.0) == []
        log.record_trajectory(trajectory(ids[0]), "a")
        with pytest.raises(ClaimLost, match="held by a, no longer by b"):
            log.record_trajectory(trajectory(ids[0]), "b")
        with pytest.raises(ClaimLost):
            log.claims.deliver(ids[0], "b")
        log.claims.deliver(ids[0], "a")
        assert log.claims.delivered("rl") == {ids[0]} and taken(log, "c", 5) == []
        with pytest.raises(ClaimLost, match="handed in"):
            log.record_trajectory(trajectory(ids[0], sample=1), "a")
        log.finish_group(ids[0], "ready")
        log.ship("rl", 0, entries([ids[0]]))
        assert log.claims.delivered("rl") == set()
        log.claims.release("b")
        assert taken(log, "c", 5) == ids[1:]


def test_a_dead_holder_is_replaced_and_refused_when_it_comes_back(log_url: str) -> None:
    with ExperienceLog.open(log_url) as log:
        (issue_id,) = offered(log, 1)
        assert taken(log, "dead", 1, lease=-1.0) == [issue_id]  # its lease is over already
        assert log.claims.live("rl") == {}
        assert log.claims.renew("dead", -1.0) == {issue_id}  # nobody has taken it yet
        assert taken(log, "heir", 1) == [issue_id]
        assert log.claims.live("rl") == {issue_id: "heir"}
        assert log.claims.renew("dead", 60.0) == set()
        log.claims.release("dead")
        with pytest.raises(ClaimLost, match="held by heir"):
            log.record_trajectory(trajectory(issue_id), "dead")
        assert log.load_group(issue_id).trajectories == ()
        assert log.claims.renew("heir", 60.0) == {issue_id}
        log.drop(issue_id, "not_wanted")
        assert log.claims.renew("heir", 60.0) == set()
        with pytest.raises(ClaimLost, match="settled"):
            log.record_trajectory(trajectory(issue_id), "heir")


def test_many_takers_share_without_overlap(log_url: str) -> None:
    with ExperienceLog.open(log_url) as log:
        ids, found = offered(log, 24), {}

        def take(name: str) -> None:
            found[name] = []
            while got := taken(log, name, 2):
                found[name] += got

        threads = [threading.Thread(target=take, args=(f"w{k}",)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(i for got in found.values() for i in got) == ids


def test_a_waiter_wakes_with_the_commit_and_misses_none(log_url: str) -> None:
    with ExperienceLog.open(log_url) as log:
        marks = [log.wait("offered", 0.0)]
        woken = threading.Event()

        def wait() -> None:
            marks.append(log.wait("offered", 60.0, marks[0]))
            woken.set()

        thread = threading.Thread(target=wait)
        thread.start()
        offered(log, 1)
        assert woken.wait(30.0)  # not by time-out
        thread.join()
        assert marks[1] > marks[0]
        assert log.wait("offered", 60.0, marks[0]) >= marks[1]  # it has happened: no waiting
        with pytest.raises(ValueError, match="nothing announces 'nonsense'"):
            log.wait("nonsense", 1.0)


@pytest.mark.postgres
def test_another_process_wakes_the_waiters(postgres) -> None:
    url = postgres.url()
    with ExperienceLog.open(url) as here, ExperienceLog.open(url) as there:
        mark = here.wait("shipped", 0.0)
        ids = [there.issue("rl", "train", task(), 0, 0)]
        there.record_trajectory(trajectory(ids[0]))
        there.finish_group(ids[0], "ready")
        there.ship("rl", 0, entries(ids))
        assert here.wait("shipped", 60.0, mark) > mark
        assert here.shared and not here.snapshot(None)  # a server is backed up by itself
