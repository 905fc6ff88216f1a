"""Saved = restored bit for bit; a killed or damaged save never passes for a whole one."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from agentcpm_jax.checkpoint import Checkpointer, newest_snapshot
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.log.snapshots import restore_snapshot
from agentcpm_jax.types import Task, UserError
from tests.doubles.full_disk import files_up_to


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    key: jax.Array


def make_state(seed: int, width: int = 512) -> State:
    params = {
        "embed": jax.random.normal(jax.random.key(seed), (width, 64)),
        "layers": {"scale": jnp.full((2, 64), seed, jnp.bfloat16)},
    }
    opt_state = optax.adamw(1e-3).init(params)
    return State(jnp.int32(seed), params, opt_state, jax.random.key(seed + 1))


def bits(tree: State) -> list[bytes]:
    leaves = jax.tree.leaves(dataclasses.replace(tree, key=jax.random.key_data(tree.key)))
    return [np.asarray(leaf).tobytes() + str(leaf.dtype).encode() for leaf in leaves]


def saved(directory: Path, steps: tuple[int, ...], **kwargs) -> Checkpointer:
    checkpointer = Checkpointer(directory, keep=2)
    for step in steps:
        checkpointer.save(step, state=make_state(step), config={"lr": 1e-3}, **kwargs)
    checkpointer.wait()
    return checkpointer


def test_restored_state_equals_the_saved_one_and_old_steps_leave(tmp_path: Path) -> None:
    writer = saved(tmp_path, (1, 2, 3), extra={"version": 7}, loader_state={"cursor": 12})
    writer.close()
    abstract = jax.eval_shape(lambda: make_state(0))
    restored = Checkpointer(tmp_path).restore(abstract_state=abstract)
    assert restored is not None and restored.step == 3
    assert bits(restored.state) == bits(make_state(3))
    assert (restored.config, restored.extra) == ({"lr": 1e-3}, {"version": 7})
    assert restored.loader_state == {"cursor": 12}
    assert writer.steps() == [2, 3]


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path: Path) -> None:
    expected = bits(make_state(1))
    advance = jax.jit(
        lambda s: s.replace(params=jax.tree.map(lambda x: x + 1, s.params)), donate_argnums=0
    )
    checkpointer, state = Checkpointer(tmp_path), make_state(1)
    checkpointer.save(1, state=state, config={})
    for _ in range(3):
        state = advance(state)
    jax.block_until_ready(state)
    restored = checkpointer.restore(1, abstract_state=make_state(0))
    checkpointer.close()
    assert restored is not None and bits(restored.state) == expected


def test_a_grain_iterator_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    def pipeline() -> grain.DatasetIterator:
        return iter(grain.MapDataset.range(40).shuffle(seed=3).to_iter_dataset().batch(4))

    iterator = pipeline()
    for _ in range(3):
        next(iterator)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, state=make_state(3), loader=iterator, config={})
    expected = np.stack(list(iterator))  # advances while the save may still be writing
    fresh = pipeline()
    checkpointer.restore(loader=fresh)
    checkpointer.close()
    np.testing.assert_array_equal(np.stack(list(fresh)), expected)


def test_a_plain_loader_state_is_set_on_the_loader(tmp_path: Path) -> None:
    class Cursor:
        state = None

        def set_state(self, state: object) -> None:
            self.state = state

    cursor = Cursor()
    checkpointer = saved(tmp_path, (1,), loader_state={"cursor": 5})
    checkpointer.restore(loader=cursor)
    assert cursor.state == {"cursor": 5}
    checkpointer.close()


def test_an_empty_directory_restores_nothing_and_is_left_alone(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "never_made")
    assert checkpointer.restore(abstract_state=make_state(0)) is None
    assert not (tmp_path / "never_made").exists()


def test_a_step_on_disk_is_not_written_again(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path, (1,))
    assert not checkpointer.save(1, state=make_state(9), config={})
    restored = checkpointer.restore(1, abstract_state=make_state(0))
    checkpointer.close()
    assert restored is not None and bits(restored.state) == bits(make_state(1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: make_state(0, width=256), "embed is float32[512,64], expected float32[256,64]"),
        (
            lambda s: s.replace(params={"embed": s.params["embed"]}),
            "params.layers.scale is bfloat16[2,64], expected absent",
        ),
        (
            lambda s: s.replace(params={**s.params, "head": jnp.zeros(3)}),
            "params.head is absent, expected float32[3]",
        ),
        (
            lambda s: s.replace(step=jnp.float32(0)),
            "leaf step is int32[], expected float32[]",
        ),
    ],
)
def test_a_mismatch_names_path_leaf_and_both_shapes(tmp_path: Path, change, words: str) -> None:
    checkpointer = saved(tmp_path, (1,))
    with pytest.raises(UserError) as error:
        checkpointer.restore(abstract_state=change(make_state(0)))
    checkpointer.close()
    assert words in str(error.value) and str(tmp_path / "1") in str(error.value)
    assert "resume with the configuration" in str(error.value)


def of_before_manifests(step: Path) -> None:
    """Makes a step what older releases wrote: no manifest, and no word of one."""
    (step / "manifest.json").unlink()
    file = step / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["sealed"]
    file.write_text(json.dumps(meta))


def flipped(content: bytes) -> bytes:
    """One bit in the middle is another one."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_any_damage_to_any_file_is_refused_and_the_step_before_it_restored(
    tmp_path: Path, capfd
) -> None:
    with ExperienceLog.open(tmp_path / "live.db") as log:
        log.issue("rl", "train", Task("q", ("a",)), 0, 0)
        checkpointer = saved(tmp_path, (1, 2), loader_state={"step": 2}, log=log)
    step, abstract = tmp_path / "2", jax.eval_shape(lambda: make_state(0))
    names = {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
    assert {"manifest.json", "meta/metadata", "log/experience.db", "state/_METADATA"} < names
    for name in names:
        file = step / name
        content = file.read_bytes()
        for damaged in (flipped(content) if content else b"x", content[:-1], b"", None):
            if damaged == content:
                continue
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with pytest.raises(UserError) as error:
                checkpointer.restore(abstract_state=abstract)
            assert name == "manifest.json" or name in str(error.value)
            assert f"checkpoint {step} is damaged: " in str(error.value)
            assert f"delete it (rm -r {step}) to go on from step 1" in str(error.value)
        file.write_bytes(content)
    (step / "state" / "core").touch()
    with pytest.raises(UserError, match="state/core does not belong there"):
        checkpointer.restore(abstract_state=abstract)
    shutil.rmtree(step)
    restored = checkpointer.restore(abstract_state=abstract)
    assert restored is not None and bits(restored.state) == bits(make_state(1))
    checkpointer.close()
    assert "Traceback" not in capfd.readouterr().err


def test_a_damaged_step_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path, (1, 2))
    for step in ("1", "2"):
        file = tmp_path / step / "state" / "_METADATA"
        file.write_bytes(flipped(file.read_bytes()))
    with pytest.raises(UserError, match=rf"rm -r {tmp_path}/1 {tmp_path}/2\) to start again"):
        checkpointer.restore(abstract_state=make_state(0))
    checkpointer.close()


def test_every_file_cut_short_or_lost_is_noticed_or_without_effect(tmp_path: Path, capfd) -> None:
    """Of a step without a manifest, as older releases wrote it."""
    checkpointer = saved(tmp_path, (1, 2))
    abstract, expected = jax.eval_shape(lambda: make_state(0)), bits(make_state(2))
    of_before_manifests(tmp_path / "2")
    messages = []
    for file in [path for path in (tmp_path / "2").rglob("*") if path.is_file()]:
        content = file.read_bytes()
        for damaged in (content[: len(content) // 2], None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            try:
                restored = checkpointer.restore(abstract_state=abstract)
                assert restored is not None and bits(restored.state) == expected, file
            except UserError as error:
                messages.append(str(error))
            file.write_bytes(content)
    restored = checkpointer.restore(abstract_state=abstract)
    checkpointer.close()
    assert restored is not None and bits(restored.state) == expected
    text = "\n".join(messages)
    for part in ("leaf params.embed is cut short", "the index", "_METADATA", "meta/metadata"):
        assert part in text
    assert f"(rm -r {tmp_path / '2'}) to go on from step 1" in text
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(("nbytes", "with_log"), [(200, False), (20_000, False), (20_000, True)])
def test_a_full_disk_is_one_line_and_leaves_the_step_before(
    tmp_path: Path, capfd, nbytes: int, with_log: bool
) -> None:
    """From the first small file to the arrays and the log: whatever does not fit."""
    with ExperienceLog.open(tmp_path / "live.db") as log:
        log.issue("rl", "train", Task("q", ("a",)), 0, 0)
        checkpointer = saved(tmp_path / "steps", (1,), log=log)
        with files_up_to(nbytes), pytest.raises(UserError) as error:
            kept = log if with_log else None
            checkpointer.save(2, state=make_state(2), config={}, log=kept)
            checkpointer.wait()
        checkpointer.close()
        said = capfd.readouterr().err
        assert "raise the limit on the size of a file (ulimit -f), then the same" in str(
            error.value
        )
        assert str(tmp_path) in str(error.value) and "Traceback" not in said
        assert [path.name for path in (tmp_path / "steps").iterdir()] == ["1"]  # room is given back
        again = saved(tmp_path / "steps", (2,), log=log)
    restored = again.restore(abstract_state=make_state(0))
    again.close()
    assert restored is not None and bits(restored.state) == bits(make_state(2))


def test_a_directory_that_cannot_be_made_is_said_at_once(tmp_path: Path, monkeypatch) -> None:
    checkpointer = saved(tmp_path, (1,))

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "makedirs", refused)
    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(UserError, match="Read-only file system; mount its disk for writing"):
        checkpointer.save(2, state=make_state(2), config={})
        checkpointer.wait()
    monkeypatch.undo()
    checkpointer.close()
    assert checkpointer.steps() == [1]


def test_another_schema_is_refused_by_name(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path, (1,))
    of_before_manifests(tmp_path / "1")
    file = tmp_path / "1" / "meta" / "metadata"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema": 99}))
    with pytest.raises(UserError, match="schema 99, this version reads 1"):
        checkpointer.restore()
    checkpointer.close()


def test_a_step_carries_the_log_and_refuses_an_older_one(tmp_path: Path) -> None:
    live, task = tmp_path / "live.db", Task("q", ("a",))
    checkpointer = Checkpointer(tmp_path / "steps", keep=3)
    with ExperienceLog.open(live) as log:
        for step in (1, 2):
            log.issue("rl", "train", task, 0, step)
            checkpointer.save(step, state=make_state(step), config={}, log=log)
        checkpointer.wait()
        log.issue("rl", "train", task, 0, 3)
        assert checkpointer.restore(log=log) is not None  # further than the step is no harm
    snapshot = newest_snapshot([tmp_path / "absent", tmp_path / "steps"])
    assert snapshot is not None and snapshot.parts[-3:-1] == ("2", "log")
    restore_snapshot(tmp_path / "steps" / "1" / "log" / "experience.db", live)
    with ExperienceLog.open(live) as log:
        assert [issue.ordinal for issue in log.issues("rl")] == [1]
        assert checkpointer.restore(1, log=log) is not None
        with pytest.raises(UserError, match=r"older than checkpoint .*1 issues, then 2.*snapshot"):
            checkpointer.restore(log=log)
    restore_snapshot(snapshot, live)
    with ExperienceLog.open(live) as log:
        assert checkpointer.restore(log=log) is not None
        assert [issue.ordinal for issue in log.issues("rl")] == [1, 2]
    checkpointer.close()


KILLED_CHILD = """
import os, signal, sys, threading
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from tests.test_checkpoint import Checkpointer, make_state
directory = Path(sys.argv[1])

def kill_when_half_written():
    while not list(directory.glob("3.*")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)

checkpointer = Checkpointer(directory)
for step in (1, 2):
    checkpointer.save(step, state=make_state(step, WIDTH), config={"step": step})
    checkpointer.wait()
state = make_state(3, WIDTH)
threading.Thread(target=kill_when_half_written).start()
checkpointer.save(3, state=state, config={"step": 3})
checkpointer.wait()
"""


def test_kill_during_a_save_leaves_the_step_before_it(tmp_path: Path) -> None:
    width = 32768
    tests = Path(__file__).parent
    code = KILLED_CHILD.replace("WIDTH", str(width))
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path), str(tests), str(tests.parent)]
    )
    assert child.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.glob("3*")
    assert leftover.name != "3"

    checkpointer = Checkpointer(tmp_path)
    restored = checkpointer.restore(abstract_state=jax.eval_shape(lambda: make_state(0, width)))
    assert restored is not None and (restored.step, restored.config) == (2, {"step": 2})
    assert bits(restored.state) == bits(make_state(2, width))
    assert leftover.exists()  # a reader removes nothing: the writer might be alive

    assert checkpointer.save(3, state=make_state(3, width), config={"step": 3})
    checkpointer.close()
    assert checkpointer.steps() == [1, 2, 3] and not list(tmp_path.glob("*tmp*"))
