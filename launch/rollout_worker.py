"""Sample for a running trainer, from another process or machine; start as many as you like.

    python launch/train.py --config=CONFIG --config.log_url=postgresql+psycopg://host/db
    python launch/rollout_worker.py --config=CONFIG --config.log_url=postgresql+psycopg://host/db

Same configuration and --workdir as the trainer's; the workdir is on a file system that both see,
since the weights are read from it. --groups=N: groups at a time (default: what fills the engine).
Ends with the run's RL stages. Exit codes: 0 done, 1 engine or tools are down, 2 a mistake in the
configuration or an unreachable database, 130 interrupted (its claims are given back).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agentcpm_jax.run.start.signals import StopSignal, say


def main(argv: list[str]) -> int:
    """Work until the run ends; a signal may come while all the rest is still imported."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        with StopSignal(answer=say):
            return work(argv)
    except KeyboardInterrupt:  # its claims go to others when their lease ends
        return 130


def work(argv: list[str]) -> int:
    """Parse, work, say how much was handed in."""
    from agentcpm_jax.run.commandline import check_worker, parse
    from agentcpm_jax.types import UserError

    try:
        command = parse([flag for flag in argv if not flag.startswith("--groups=")])
        groups = [flag.partition("=")[2] for flag in argv if flag.startswith("--groups=")]
        if groups and not (groups[-1].isdecimal() and int(groups[-1])):
            raise UserError(f"--groups={groups[-1]}: give a whole number of at least 1")
        count = int(groups[-1]) if groups else 0
        check_worker(command.config, command.workdir)  # before jax and all the rest are imported
        from agentcpm_jax.rollout.groups import StreamError
        from agentcpm_jax.run.worker import run_worker

        try:
            handed_in = run_worker(command.config, command.workdir, groups=count, announce=say)
        except StreamError as failed:  # the engine or the tools, not the command
            say(f"failed: {failed}; its claims are free again")
            return 1
    except UserError as error:
        say(f"error: {error}")
        return 2
    print(f"{handed_in} groups handed in")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
