"""Run or resume an experiment; the same command resumes an interrupted run.

    python launch/train.py --config=configs/quickstart.py:smoke --workdir=/tmp/smoke

--config: Python, YAML, a run's config.json. On every host of a job: Slurm, GKE, a TPU pod, or
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID. --doctor examines pool, judge, database,
disk, data and stops; a launch does so first, unless --nodoctor. --explain: what it takes on
--slice. --accept_data: resume with edited data. Exit: 0 done, 2 a mistake of yours, 130 resumable.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agentcpm_jax.run.start.signals import Interrupted, StopSignal, say


def main(argv: list[str]) -> int:
    """Run, or say why not; a signal may come while all the rest is still imported."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        with StopSignal(answer=say) as stop:
            return run(argv, stop)
    except (Interrupted, KeyboardInterrupt) as stopped:
        if str(stopped):  # else `stop` has answered
            say(f"interrupted: {stopped}")
        return 130


def run(argv: list[str], stop: StopSignal) -> int:
    from agentcpm_jax.run.commandline import check_workdir, explained, parse
    from agentcpm_jax.types import UserError

    try:
        command = parse(argv)  # a mistake is answered before jax and all the rest are imported
        check_workdir(command)
        from agentcpm_jax.rollout.groups import StreamError
        from agentcpm_jax.run import doctor, multihost, stages
        from agentcpm_jax.run.observe.progress import announce, progress

        multihost.join(announce)
        if explained(command, announce=print) or doctor.check(command, announce):
            return 0
        shown = {"progress": progress, "announce": announce, "stop": stop}
        try:
            print(f"report: {stages.run_experiment(*command[:3], **shown)}")
        except StreamError as failed:  # engine, tools or tasks, not the command
            say(f"failed: {failed}; the same command resumes")
            return 1
    except UserError as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
