"""The live log is on a local disk, and its snapshots are whole."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.log.snapshots import (
    filesystem,
    locate_log,
    restore_snapshot,
)
from tests.log.test_experience import assert_same, entries, ready, task, trajectory

MOUNTS = """\
/dev/root / ext4 rw 0 0
tmpfs /dev/shm tmpfs rw 0 0
server:/export /home nfs4 rw 0 0
bucket /mnt/my\\040bucket fuse.gcsfuse rw 0 0
/dev/sdb /mnt/my\\040bucket/disk xfs rw 0 0
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    path = tmp_path / "mounts"
    path.write_text(MOUNTS)
    return path


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("/data/run", "ext4"),
        ("/home/me/run", "nfs4"),
        ("/homes/run", "ext4"),
        ("/mnt/my bucket/run", "fuse.gcsfuse"),
        ("/mnt/my bucket/disk/run", "xfs"),
    ],
)
def test_the_innermost_mount_counts(mounts: Path, where: str, kind: str) -> None:
    assert filesystem(Path(where), mounts) == kind
    place = locate_log(Path(where), mounts=mounts)
    if kind in ("ext4", "xfs"):
        assert (place.url, place.note) == (f"{where}/experience.db", "")
    else:
        assert kind in place.note and "\n" not in place.note and place.url in place.note
        assert filesystem(Path(place.url), mounts) == "ext4"


def test_a_home_on_the_network_holds_no_live_log(mounts: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/home/me/.local/state")
    first = locate_log(Path("/home/me/run"), mounts=mounts)
    assert first.url.startswith("/var/tmp/agentcpm_jax/")
    assert locate_log(Path("/home/me/run"), mounts=mounts) == first
    assert locate_log(Path("/home/me/other"), mounts=mounts).url != first.url
    assert locate_log(Path("/home/me/run"), "postgresql://h/d", mounts).url == "postgresql://h/d"


def test_a_snapshot_under_writing_is_a_consistent_log(tmp_path: Path) -> None:
    live, copy = tmp_path / "live.db", tmp_path / "far" / "copy.db"
    copy.parent.mkdir()
    with ExperienceLog.open(live) as log:
        ids = ready(log, 3)
        log.ship("rl", 0, entries(ids[:2]))
        stop = threading.Event()

        def write() -> None:
            n = 0
            while not stop.is_set():
                i = log.issue("more", "train", task(n), 0, n)
                log.record_trajectory(trajectory(i, seed=n))
                log.finish_group(i, "ready")
                n += 1

        writer = threading.Thread(target=write)
        writer.start()
        before = log.position()
        for _ in range(5):
            assert log.snapshot(copy)
        after = log.position()
        stop.set()
        writer.join()
    assert list(copy.parent.iterdir()) == [copy] and not list(tmp_path.glob(".snapshot-*"))
    live.unlink()
    restore_snapshot(copy, live)
    with ExperienceLog.open(live) as log:
        assert before["issues"] <= log.position()["issues"] <= after["issues"]
        assert [s.issue_id for s in log.shipped("rl", 0)] == ids[:2]
        for issue in log.issues("more", states=["ready"]):  # each of them whole
            (found,) = log.load_group(issue.issue_id).trajectories
            assert_same(found, trajectory(issue.issue_id, seed=issue.ordinal))
