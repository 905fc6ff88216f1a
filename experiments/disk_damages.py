"""The trials of `disk_faults.py`: what is done to which file of a run, and on which file system."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import train as launch_train

from agentcpm_jax import database
from agentcpm_jax.run import doctor, stages  # noqa: F401  (children find them imported)

ROOT = Path(__file__).resolve().parents[1]
ROOM = 48 << 20  # bytes of a file system that is large enough
LIMIT = 1500  # seconds a child may take, on the busiest machine
FLAGS = (
    "--config=configs/tiny.py",
    "--nodoctor",
    "--config.stage.rl.shape.checkpoint_every=1",
    "--config.episode.max_turns=3",
    "--config.stage.rl.stream.group_size=3",
)
Undo = Callable[[], object]


@dataclass(frozen=True)
class Trial:
    """`apply` (workdir, place) does it and returns how it is undone.

    The run begins anew, or is `begun` (three of four steps), or `finished`. `words` are in the line
    that is said, unless it `goes_on`. `child` runs in the first process; one that starts `apart`
    imports everything anew and ends as any process does.
    """

    name: str
    writer: str
    apply: Callable[[Path, Place], Undo]
    words: str = ""
    goes_on: bool = False
    begun: bool = False
    finished: bool = False
    apart: bool = False
    child: Callable[[], object] = lambda: None

    @property
    def mounts(self) -> bool:
        """Whether it needs a file system of its own."""
        made = (small, small_at, readonly, readonly_at, filled)
        return getattr(self.apply, "func", self.apply) in made


class Place:
    """A file system for one workdir at a time, and the processes that run in it."""

    def __init__(self, scratch: Path, compiled: Path, mounts: bool) -> None:
        self.scratch, self.disk, self._mounts = scratch, scratch / "disk", mounts
        self._compiled = str(compiled)
        self.disk.mkdir()
        self._mounted: list[Path] = []

    def prepare(self) -> tuple[Path, Path]:
        """A run that stopped after three steps, and the same one let run to its end."""
        workdir = self.fresh(None)
        self._must(workdir, "--config.stage.rl.shape.steps=3")
        for path in ("report.html", "summary.json", "rl/DONE"):
            (workdir / path).unlink()
        shutil.rmtree(workdir / "rl" / "hf")
        begun = shutil.copytree(workdir, self.scratch / "begun")
        whole = self.fresh(None)
        self._must(whole)
        return begun, shutil.copytree(whole, self.scratch / "whole")

    def fresh(self, source: Path | None) -> Path:
        """A workdir on a new file system: a copy of `source`, or none yet."""
        self.clear()
        if self._mounts:
            self.mount(self.disk, ROOM)
        shutil.rmtree(self.disk / "run", ignore_errors=True)
        workdir = self.disk / "run"
        if source is not None:
            shutil.copytree(source, workdir)
        return workdir

    def start(self, workdir: Path, trial: Trial | None = None, *flags: str) -> tuple[int, str]:
        """Exit code of the command, and from the first sign of an error on all that it says."""
        path = self.scratch / "said.txt"
        steps = flags or ("--config.stage.rl.shape.steps=4",)
        command = [*FLAGS, *steps, f"--workdir={workdir}"]
        with path.open("w") as said:
            if trial is not None and trial.apart:
                env = os.environ | {"JAX_COMPILATION_CACHE_DIR": self._compiled}
                env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
                words = [sys.executable, str(ROOT / "launch" / "train.py"), *command]
                code = subprocess.run(words, stdout=said, stderr=said, env=env).returncode
            else:
                code = self._forked(command, said.fileno(), trial)
        lines = path.read_text().replace("\r", "\n").splitlines()
        bad = re.compile(r"error:|Traceback|Exception|.*Error\b|.*:absl:")
        first = next((i for i, line in enumerate(lines) if bad.match(line)), len(lines))
        return code, "\n".join(lines[first:])

    def mount(self, path: Path, nbytes: int, *options: str) -> None:
        """An empty file system of a size."""
        path.mkdir(parents=True, exist_ok=True)
        how = ",".join([f"size={nbytes}", *options])
        subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", path], check=True)
        self._mounted.append(path)

    def remount(self, path: Path, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)

    def clear(self) -> None:
        """Unmounts everything."""
        while self._mounted:
            subprocess.run(["umount", self._mounted.pop()], check=True)

    close = clear

    def _must(self, workdir: Path, *flags: str) -> None:
        code, said = self.start(workdir, None, *flags)
        if code:
            raise RuntimeError(f"exit code {code}: {said}")

    def _forked(self, command: list[str], output: int, trial: Trial | None) -> int:
        """The parent has imported everything and never touches a device."""
        if pid := os.fork():
            deadline = time.monotonic() + LIMIT
            while time.monotonic() < deadline:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.05)
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            raise TimeoutError(f"a run did not end within {LIMIT} s")
        code = 70
        try:
            os.dup2(output, 1)
            os.dup2(output, 2)
            jax.config.update("jax_compilation_cache_dir", self._compiled)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            if trial is not None:
                trial.child()
            code = launch_train.main(command)
        except BaseException as error:
            print(f"Exception: {error!r}", flush=True)
        sys.stdout.flush()
        os._exit(code)


# ---- damages


def flip(file: Callable[[Path], Path], workdir: Path, place: Place) -> Undo:
    """One bit in the middle."""
    path = file(workdir)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return bool


def change(how: Callable[[Path], object], workdir: Path, place: Place) -> Undo:
    """Whatever `how` does to the workdir."""
    how(workdir)
    return bool


def step(workdir: Path) -> Path:
    return workdir / "rl" / "checkpoints" / "3"


def largest(workdir: Path) -> Path:
    """Parameters and moments lie together; most of it is these."""
    return max((step(workdir) / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def lose_the_log(workdir: Path) -> Path:
    for path in workdir.glob("experience.db*"):
        path.unlink()
    return step(workdir) / "log" / "experience.db"


def overwrite(path: Path, start: int) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xaa" * (size - start))


def flip_a_recorded_batch(workdir: Path) -> None:
    """Of step 3, which is computed again: its checkpoint is not there."""
    shutil.rmtree(step(workdir))
    with sqlite3.connect(workdir / "experience.db") as raw:
        query = "SELECT issue_id, sample, payload FROM trajectory JOIN shipped USING"
        query += " (issue_id, sample) WHERE shipped.step = 2"
        issue, sample, blob = raw.execute(query).fetchone()
        damaged = bytearray(blob)
        damaged[len(blob) // 2] ^= 1
        key = (bytes(damaged), issue, sample)
        raw.execute("UPDATE trajectory SET payload = ? WHERE issue_id = ? AND sample = ?", key)
    raw.close()


def needed_weights(workdir: Path) -> Path:
    """Of version 2, with which the batch of step 4 is sampled: as if killed before it was."""
    with sqlite3.connect(workdir / "experience.db") as raw:
        mine = "issue_id IN (SELECT issue_id FROM issue WHERE batch >= 3)"
        raw.execute(f"DELETE FROM decision WHERE {mine}")
        raw.execute(f"DELETE FROM trajectory WHERE {mine}")
        raw.execute("UPDATE issue SET state = 'issued' WHERE batch >= 3")
    raw.close()
    return workdir / "rl" / "weights" / "v000002" / "model.safetensors"


def tear(name: str, workdir: Path, place: Place) -> Undo:
    """The first bytes of a file are there, then zeros, as after a power cut."""
    path = workdir / name
    content = path.read_bytes()
    path.write_bytes(content[:20] + bytes(len(content) - 20))
    return bool


def hold_the_log(workdir: Path, place: Place) -> Undo:
    code = (
        "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "c.execute('BEGIN IMMEDIATE'); print('held', flush=True); time.sleep(1500)"
    )
    words = [sys.executable, "-c", code, str(workdir / "experience.db")]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    return holder.kill


# ---- full, read-only and failing disks


def small(nbytes: int, workdir: Path, place: Place) -> Undo:
    """All of the run's file system."""
    place.remount(place.disk, f"size={nbytes}")
    return partial(place.remount, place.disk, f"size={ROOM}")


def small_at(name: str, nbytes: int, workdir: Path, place: Place) -> Undo:
    """The file system of one directory of the run."""
    place.mount(workdir / name, nbytes)
    return partial(place.remount, workdir / name, f"size={ROOM}")


def readonly_at(name: str, workdir: Path, place: Place) -> Undo:
    place.mount(workdir / name, ROOM, "ro")
    return partial(place.remount, workdir / name, "rw")


def readonly(workdir: Path, place: Place) -> Undo:
    place.remount(place.disk, "ro")
    return partial(place.remount, place.disk, "rw")


def filled(left: int, removed: tuple[str, ...], workdir: Path, place: Place) -> Undo:
    """What the run wrote last is not there, and `left` bytes of room are."""
    for name in removed:
        path = workdir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    filler = place.disk / "others"
    filler.write_bytes(bytes(shutil.disk_usage(place.disk).free - left))
    return filler.unlink


def failing(number: int, pattern: str) -> None:
    """In the child: the disk does not take the files of a name."""
    fsync = os.fsync

    def refused(descriptor: int) -> None:
        if re.search(pattern, os.readlink(f"/proc/self/fd/{descriptor}")):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    os.fsync = refused


def file_limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))


def no_patience() -> None:
    database.BUSY_SECONDS = 1.0


def nothing(workdir: Path, place: Place) -> Undo:
    return bool


def damage(name: str, writer: str, apply: Callable[[Path, Place], Undo], words: str) -> Trial:
    return Trial(name, writer, apply, words, begun=True)


def fails(name: str, writer: str, number: int, pattern: str, words: str) -> Trial:
    child = partial(failing, number, pattern)
    return Trial(name, writer, nothing, words, begun=True, child=child)


FULL = "No space left on device; make room on its disk"
END = ("rl/DONE", "rl/hf", "report.html", "summary.json")
TRIALS = (
    damage("flip_state", "checkpoint: parameters, moments", partial(flip, largest), "checksum"),
    damage("flip_loader", "checkpoint: loader state", partial(
        flip, lambda w: step(w) / "meta/metadata"), "meta/metadata has another checksum"),
    damage("flip_snapshot", "checkpoint: log", partial(flip, lose_the_log), "log/experience.db"),
    damage("short_state", "checkpoint", partial(change, lambda w: os.truncate(
        largest(w), largest(w).stat().st_size - 1)), "bytes"),
    damage("lost_state", "checkpoint", partial(change, lambda w: largest(w).unlink()), "missing"),
    damage("alien", "checkpoint", partial(change, lambda w: (
        step(w) / "state/core").touch()), "core does not belong there"),
    damage("lost_manifest", "checkpoint", partial(change, lambda w: (
        step(w) / "manifest.json").unlink()), "manifest.json is missing"),
    damage("log_header", "log", partial(change, lambda w: overwrite(
        w / "experience.db", 0)), "not a database; move it away (mv"),
    damage("log_pages", "log", partial(change, lambda w: overwrite(
        w / "experience.db", 16384)), "malformed; move it away (mv"),
    damage("log_row", "log: a recorded batch", partial(
        change, flip_a_recorded_batch), "is damaged"),
    damage("flip_weights", "weights", partial(flip, needed_weights), "are damaged"),
    damage("torn_config", "config.json", partial(tear, "config.json"), "is damaged"),
    damage("torn_digest", "tokenizer.sha256", partial(tear, "tokenizer.sha256"), "is damaged"),
    Trial("torn_metrics", "metrics.jsonl", partial(change, lambda w: overwrite(
        w / "rl/metrics.jsonl", 3000)), goes_on=True, begun=True),
    Trial("torn_tokenizer", "tokenizer", partial(
        tear, "tokenizer/tokenizer.json"), goes_on=True, begun=True),
    Trial("torn_done", "DONE", partial(tear, "rl/DONE"), "is damaged", begun=True, finished=True),
    Trial("held_log", "log", hold_the_log, "holds it: close it there", begun=True,
          child=no_patience),
    Trial("full_40k", "the run's disk", partial(small, 40 << 10), "make room on its disk"),
    Trial("full_300k", "the run's disk", partial(small, 300 << 10), "make room on its disk"),
    Trial("full_2m", "the run's disk", partial(small, 2 << 20), "make room on its disk"),
    Trial("full_4m", "the run's disk", partial(small, 4 << 20), "make room on its disk"),
    Trial("full_8m", "the run's disk", partial(small, 8 << 20), "make room on its disk",
          apart=True),
    Trial("full_12m", "the run's disk", partial(small, 12 << 20), "make room on its disk",
          apart=True),
    Trial("full_16m", "the run's disk", partial(small, 16 << 20), "make room on its disk"),
    Trial("full_log", "log", partial(filled, 0, END), "make room on its disk", finished=True),
    Trial("full_hf", "hf", partial(filled, 2 << 20, END), FULL, finished=True),
    Trial("full_report", "report.html", partial(
        filled, 48 << 10, END[2:]), f"report.html: {FULL}", finished=True),
    Trial("full_checkpoints", "checkpoint", partial(
        small_at, "rl/checkpoints", 1 << 20), f"checkpoints: {FULL}", apart=True),
    Trial("full_weights", "weights", partial(small_at, "rl/weights", 1 << 20), "make room"),
    Trial("readonly_checkpoints", "checkpoint", partial(
        readonly_at, "rl/checkpoints"), "Read-only file system; mount its disk for writing"),
    Trial("readonly", "the run's disk", readonly, "Read-only file system", begun=True),
    Trial("file_limit", "the first file of 1 MB", nothing, "(ulimit -f)", child=file_limit),
    fails("eio_metrics", "metrics.jsonl", errno.EIO, r"/\.metrics\.jsonl", "its disk fails"),
    fails("eio_config", "config.json", errno.EIO, r"/\.config\.json", "its disk fails"),
    fails("eio_manifest", "checkpoint", errno.EIO, r"/\.manifest\.json", "its disk fails"),
    fails("eio_weights", "weights", errno.EIO, r"/weights/.*safetensors", "its disk fails"),
    fails("quota_done", "DONE", errno.EDQUOT, r"/\.DONE", "make room within your quota"),
    fails("quota_hf", "hf", errno.EDQUOT, r"/\.hf\..*safetensors", "make room within your quota"),
    fails("quota_summary", "summary.json", errno.EDQUOT, r"/\.summary", "within your quota"),
)  # fmt: skip
