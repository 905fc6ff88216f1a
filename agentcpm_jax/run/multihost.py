"""Several processes, one job: joining it, stopping and deciding together, sharing batches, weights.

Process 0 owns the workdir, the experience log and the stream of rollouts; the others take part in
every step. What must be the same everywhere (whether a stage is done, when to stop, the batch of a
step) is decided by process 0 and sent to the others, which never derive it from a disk or a clock.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from agentcpm_jax.data.batch import Batch
from agentcpm_jax.run.start.job import EXPLICIT, settings
from agentcpm_jax.run.start.signals import SIGNALS, Interrupted
from agentcpm_jax.types import UserError

T = TypeVar("T")

_FOREVER_MS = 1000 * 3600 * 24 * 30  # process 0 may be long at rollouts and evaluations


def join(
    announce: Callable[[str], None] = lambda line: None, environ: Mapping[str, str] = os.environ
) -> None:
    """Joins the job that the environment describes; call it before devices are used.

    Does nothing when the environment describes none. Raises `UserError` when the description is
    incomplete or the coordinator cannot be reached.
    """
    found = settings(environ)
    if found is None or jax.distributed.is_initialized():
        return
    if environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        with _handlers_kept():
            jax.distributed.initialize(**found)
    except (ValueError, RuntimeError) as error:
        where = found.get("coordinator_address", "the cluster's coordinator")
        raise UserError(
            f"cannot join the job at {where}: {str(error).splitlines()[0]}; start all processes "
            f"with the same {EXPLICIT[0]}, or unset it for a job of one process"
        ) from None
    atexit.register(jax.distributed.shutdown)
    place = f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
    announce(f"{place}: {jax.local_device_count()} of {jax.device_count()} devices")


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """JAX's notice of preemption takes SIGTERM for itself alone; here Python's handlers stay."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def is_main() -> bool:
    """Whether this is process 0."""
    return jax.process_index() == 0


def decide(name: str, make: Callable[[], T]) -> T:
    """Call `make` on process 0 only and return its value (JSON) on every process.

    `name` must be used only once in a job. An exception of `make` is raised on process 0; the
    others raise `Interrupted`.
    """
    if jax.process_count() == 1:
        return make()
    if not is_main():
        return _receive(name)
    try:
        value = make()
    except BaseException as error:
        _send(name, {"failed": f"{type(error).__name__}: {error}"})
        raise
    _send(name, {"value": value})
    return value


@contextmanager
def main_first(name: str) -> Iterator[None]:
    """Run the body on process 0, then on the others; these raise `Interrupted` if it failed."""
    if not is_main():
        _receive(name)
    try:
        yield
    except BaseException as error:
        if is_main() and jax.process_count() > 1:
            _send(name, {"failed": f"{type(error).__name__}: {error}"})
        raise
    if is_main() and jax.process_count() > 1:
        _send(name, {"value": None})


def any_process(flag: bool) -> bool:
    """Whether `flag` is set on any process; every process calls it at the same step.

    It waits for the step under way, which a common answer needs; that costs little.
    """
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def local_rows(sharding: Any, shape: tuple[int, int]) -> np.ndarray:
    """i64[rows]: indices of the rows of a batch of `shape` [B,T] on this process's devices."""
    parts = sharding.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([np.arange(shape[0])[index[0]] for index in parts]))


def on_devices(batch: Batch, shardings: Any, rows: int) -> Batch:
    """A batch of global arrays from host arrays of all `rows` rows, or of those of `local_rows`.

    Args:
      shardings: a `Batch` of shardings; None (one device): `batch` as it is.
    """
    if shardings is None or jax.process_count() == 1:
        return batch

    def one(host: Any, sharding: Any) -> jax.Array:
        host = np.asarray(host)
        shape = (rows, *host.shape[1:]) if host.ndim else ()
        return jax.make_array_from_process_local_data(sharding, host, shape)

    return jax.tree.map(one, batch, shardings)


def share_batch(name: str, make: Callable[[], Batch]) -> Batch:
    """Process 0 makes the batch, every process returns it, bit for bit; errors as in `decide`."""
    made: list[Batch] = []

    def shape() -> tuple[int, ...]:
        made.append(make())
        return made[0].shape

    rows, length = decide(name, shape)
    if jax.process_count() == 1:
        return made[0]
    batch = made[0] if made else Batch.empty(rows, length)
    fields = {k: np.asarray(v) for k, v in vars(batch).items() if v is not None}
    # As integers: the broadcast is a sum over processes, which turns -0.0 into 0.0.
    bits = {k: v.view(np.int32) for k, v in fields.items()}
    heard = multihost_utils.broadcast_one_to_all(bits)
    return Batch(**{k: np.asarray(heard[k]).view(v.dtype) for k, v in fields.items()})


def gathered(arrays: Any) -> Any:
    """A tree of global arrays as numpy on process 0, one array at a time; None leaves elsewhere.

    Every process calls it. In a job of one process: `arrays` itself.
    """
    if jax.process_count() == 1:
        return arrays

    def one(x: Any) -> np.ndarray | None:
        host = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(host) if is_main() else None

    return jax.tree.map(one, arrays)


def on_main(arrays: Any) -> Any:
    """Copies of a tree of global arrays, spread over the devices of process 0, one array at a time;
    None leaves elsewhere. No host's memory holds any of them whole.

    Every process calls it. In a job of one process: `arrays` itself.
    """
    if jax.process_count() == 1:
        return arrays
    ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    grid = np.array(ordered).reshape(jax.process_count(), -1)
    job, own = Mesh(grid, ("process", "device")), Mesh(grid[jax.process_index()], ("device",))

    def one(x: jax.Array) -> jax.Array | None:
        split = [axis for axis, size in enumerate(x.shape) if size % grid.shape[1] == 0]
        widest = max(split, key=lambda axis: x.shape[axis], default=None)
        spec = PartitionSpec(*("device" if axis == widest else None for axis in range(x.ndim)))
        copied = jax.device_put(x, NamedSharding(job, spec), may_alias=False)
        if not is_main():
            return None
        parts = [shard.data for shard in copied.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(own, spec), parts)

    return jax.tree.map(one, arrays)


def client() -> Any:
    """The job's key-value store; None in a job of one process."""
    from jax._src import distributed  # private, but orbax and grain use it too

    return distributed.global_state.client


def _send(name: str, value: Any) -> None:
    client().key_value_set(f"agentcpm/{name}", json.dumps(value))


def _receive(name: str) -> Any:
    received = json.loads(client().blocking_key_value_get(f"agentcpm/{name}", _FOREVER_MS))
    if "failed" in received:
        raise Interrupted(f"process 0 stopped ({received['failed']}); the same command resumes")
    return received["value"]
