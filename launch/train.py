"""Run or resume an experiment.

    python launch/train.py --config=configs/quickstart.py:smoke --workdir=/tmp/smoke
    python launch/train.py --config=configs/quickstart.py --config.seed=1 --doctor

The same command resumes an interrupted run, and runs on every host of a job that Slurm, GKE, a TPU
pod or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID describe. --doctor examines pool,
judge, database, disk, data and stops; a launch does so first, unless --nodoctor. --explain: what a
run takes on --slice. --accept_data: resume with edited data. Exit codes: 0 done, 2 a mistake of
yours (one line says which), 130 resumable.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from agentcpm_jax.run.commandline import explained, parse
from agentcpm_jax.types import UserError


def main(argv: list[str]) -> int:
    """Parse, run, say where the report is."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        command = parse(argv)  # a mistake is answered before jax and all the rest are imported
        from agentcpm_jax.rollout.stream import StreamError
        from agentcpm_jax.run.doctor import check
        from agentcpm_jax.run.multihost import Interrupted, join
        from agentcpm_jax.run.stages import run_experiment

        join(announce=tqdm.write)
        if explained(command, announce=print) or check(command, announce=tqdm.write):
            return 0
        report = run_experiment(*command[:3], progress=progress, announce=tqdm.write)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stopped:
        print(f"interrupted: {str(stopped) or 'the same command resumes'}", file=sys.stderr)
        return 130
    except StreamError as failed:  # engine, tools or tasks, not the command
        print(f"failed: {failed}; the same command resumes", file=sys.stderr)
        return 1
    print(f"report: {report}")
    return 0


def progress(description: str, total: int, initial: int = 0) -> tqdm:
    """A bar on a terminal; a line every ten seconds elsewhere."""
    seconds = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(desc=description, total=total, initial=initial, mininterval=seconds, ncols=110)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
