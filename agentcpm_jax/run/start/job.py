"""Which job of several processes the environment describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentcpm_jax.types import UserError

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")


def settings(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None for a job of one process.

    They are all three of `EXPLICIT`. Without them JAX asks Slurm (`srun` of several tasks), GKE and
    multi-slice TPU jobs (TPU_WORKER_HOSTNAMES, MEGASCALE_COORDINATOR_ADDRESS), or the metadata of a
    TPU machine. Raises `UserError` when only some of the three are set, or they are not numbers.
    """
    several_tasks = all(name in environ for name in SLURM) and environ.get("SLURM_NTASKS") != "1"
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    given = [name for name in EXPLICIT if name in environ]
    if len(given) == len(EXPLICIT):
        address, count, index = (environ[name] for name in EXPLICIT)
        if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
            raise UserError(
                f"{EXPLICIT[1]}={count!r} and {EXPLICIT[2]}={index!r} must be numbers, the second "
                "below the first; correct the environment"
            )
        return {
            "coordinator_address": address,
            "num_processes": int(count),
            "process_id": int(index),
        }
    if several_tasks or "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environ:
        return {}
    if given:
        missing = [name for name in EXPLICIT if name not in given]
        raise UserError(
            f"{' and '.join(given)} is set, {' and '.join(missing)} not; set all of "
            f"{', '.join(EXPLICIT)}, or none for a job of one process"
        )
    on_tpu = environ.get("JAX_PLATFORMS", "tpu").startswith("tpu") and not (
        {"TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES"} & environ.keys()
    )
    return {} if on_tpu and any(map(_exists, ("/dev/accel0", "/dev/vfio/0"))) else None


def _exists(path: str) -> bool:
    return Path(path).exists()
