"""Look inside a run: finished, interrupted or still going. Nothing in it is changed.

    python launch/inspect_run.py replay RUN --step 12            # the step again: bit-equal?
    python launch/inspect_run.py why RUN 345 --sample 2          # one issue, token by token
    python launch/inspect_run.py export RUN out_dir              # everything as parquet

RUN is a workdir. Exit codes: 0 done (replay: bit-equal), 1 the replayed step differs, 2 a mistake
in the command or a run that cannot be read (one line says which).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agentcpm_jax.types import UserError


def main(argv: list[str]) -> int:
    """Parse, call, print what came out."""
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0 if argv else 2
    try:
        from agentcpm_jax.run.inspect.commands import parse

        asked = parse(argv)
        if asked.command == "replay":
            from agentcpm_jax.run.inspect.replay import describe, replay

            found = replay(asked.run, asked.step, asked.stage, announce=progress)
            print("\n".join(describe(found)))
            return 0 if found.equal else 1
        if asked.command == "why":
            from agentcpm_jax.run.inspect.why import write_why

            print(f"page: {write_why(asked.run, asked.issue, asked.sample, asked.out)}")
            return 0
        from agentcpm_jax.run.inspect.export import export_run

        for table, rows in export_run(asked.run, asked.out, announce=progress).items():
            print(f"{table}.parquet: {rows:,} rows")
        print(f"columns: {asked.out / 'README.md'}")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing in the run was changed", file=sys.stderr)
        return 130


def progress(line: str) -> None:
    """What takes long, on stderr."""
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
