"""Which job a process joins, which rows it makes, and whom the watchdog names."""

from __future__ import annotations

import threading

import jax
import numpy as np
import pytest

from agentcpm_jax.data.loader import EpochBatches
from agentcpm_jax.data.rows import text_row
from agentcpm_jax.mesh import AXES
from agentcpm_jax.run.multihost import decide, gathered, local_rows, settings, share_batch
from agentcpm_jax.run.observe import watchdog
from agentcpm_jax.run.observe.watchdog import Post, Watchdog, verdict
from agentcpm_jax.sharding import batch_sharding
from agentcpm_jax.types import UserError

PLAIN = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SRUN = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (
            PLAIN,
            {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3},
        ),
        (SRUN, {}),
        (SRUN | {"SLURM_NTASKS": "1"}, None),  # one task
        ({"SLURM_JOB_ID": "17", "SLURM_NTASKS": "8"}, None),  # in an allocation, without srun
        ({"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "TPU_WORKER_ID": "1"}, {}),  # GKE
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "s-0.svc"}, {}),  # several slices
    ],
)
def test_the_environment_says_which_job_this_is(environ, expected) -> None:
    assert settings({"JAX_PLATFORMS": "cpu"} | environ) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"JAX_PROCESS_ID": None}, "JAX_PROCESS_ID not; set all of"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID='4' must be numbers, the second below"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two'"),
    ],
)
def test_half_a_description_is_a_mistake(change, words) -> None:
    environ = {k: v for k, v in (PLAIN | change).items() if v is not None}
    with pytest.raises(UserError) as error:
        settings(environ)
    assert words in str(error.value)


def test_a_job_of_one_process_asks_nobody() -> None:
    assert decide("x", lambda: 3) == 3
    params = {"a": np.zeros(2)}
    assert gathered(params) is params
    batch = EpochBatches([text_row(range(4))], 4, 1).batch(0)
    assert share_batch("y", lambda: batch) is batch


def test_each_process_makes_its_rows_and_all_count_the_same() -> None:
    rng = np.random.default_rng(0)
    rows = [text_row(rng.integers(1, 99, n)) for n in (7, 3, 8, 5, 6, 2, 8, 4, 1)]
    whole = EpochBatches(rows, 8, 4, seed=1)
    parts = [EpochBatches(rows, 8, 4, seed=1, only=only) for only in ([0, 2], [1, 3])]
    for step in range(3):  # the last batch of an epoch is filled up with padding
        batch, (a, b) = whole.batch(step), (part.batch(step) for part in parts)
        for name in ("tokens", "segment_ids", "loss_mask", "positions", "weights"):
            theirs = np.empty_like(getattr(batch, name))
            theirs[[0, 2]], theirs[[1, 3]] = getattr(a, name), getattr(b, name)
            np.testing.assert_array_equal(theirs, getattr(batch, name))
        assert a.num_tokens == b.num_tokens == batch.num_tokens > 0
        assert a.num_sequences == b.num_sequences == batch.num_sequences


def test_rows_of_this_process_are_those_of_its_devices() -> None:
    mesh = jax.make_mesh((1,) * 4, AXES)
    np.testing.assert_array_equal(local_rows(batch_sharding(mesh), (3, 8)), [0, 1, 2])

    class Half:  # the devices of a process hold rows 4 to 7, each half of the time
        def addressable_devices_indices_map(self, shape):
            assert shape == (8, 16)
            time = slice(0, 8), slice(8, 16)
            return {i: (slice(4 + i, 5 + i), time[j]) for i in range(4) for j in range(2)}

    np.testing.assert_array_equal(local_rows(Half(), (8, 16)), [4, 5, 6, 7])


def post(process: int, count: int, phase: str, since: float) -> Post:
    return Post(process, f"host{process}", 7, phase, count, since)


def test_the_verdict_names_those_behind() -> None:
    mine = post(0, 20, "train step", 100.0)
    board = [mine, post(1, 20, "train step", 101.0), post(2, 19, "reading the batch", 90.0)]
    said = verdict(mine, board, 160.0)
    assert "process 0 (host0): step 7, train step, for 60 s" in said
    assert "waits for process 2 (host2): step 7, reading the batch, for 70 s" in said
    assert "host1" not in said
    assert "all 2 processes are in it" in verdict(mine, board[:2], 160.0)
    assert "the others wait for it" in verdict(board[2], board, 160.0)
    assert "not known" in verdict(mine, [], 160.0)


def test_a_negative_deadline_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"hang_seconds=-3\.0 must be 0"):
        Watchdog(-3.0)


def test_a_step_beyond_its_deadline_ends_the_process(tmp_path, monkeypatch) -> None:
    """Resumable, with the verdict and every thread's stack on disk."""
    left, said, board = threading.Event(), [], {}

    class Store:
        def key_value_set(self, key, value, allow_overwrite):
            board[key] = value

        def key_value_dir_get(self, prefix):
            return [(k, v) for k, v in board.items() if k.startswith(prefix)]

    monkeypatch.setattr(watchdog, "_store", Store)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    dog = Watchdog(0.2, said.append, tmp_path, leave=lambda code: (codes.append(code), left.set()))
    codes: list[int] = []
    with dog.watching() as on_phase:
        on_phase(1, "train step")
        on_phase(2, "train step")
        assert left.wait(60)
    assert codes[0] == 130 and "step 2, train step" in said[0]
    assert "step 2, train step" in (tmp_path / "hang-process-0.txt").read_text()
