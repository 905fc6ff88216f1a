"""The command line of `launch/inspect_run.py`: every mistake becomes one `UserError`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from agentcpm_jax.types import UserError

CONFIG = "config.json"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """`command` and its arguments: replay (run, step, stage), why (run, issue, sample, out) or
    export (run, out). Raises `UserError`."""
    parser = _Parser(prog="inspect_run.py", add_help=False, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    replay = commands.add_parser("replay", add_help=False, allow_abbrev=False)
    replay.add_argument("run", type=Path, metavar="RUN")
    replay.add_argument("--step", type=_positive, required=True)
    replay.add_argument("--stage", default="")

    why = commands.add_parser("why", add_help=False, allow_abbrev=False)
    why.add_argument("run", type=Path, metavar="RUN")
    why.add_argument("issue", type=_whole, metavar="ISSUE")
    why.add_argument("--sample", type=_whole)
    why.add_argument("--out", type=Path)

    export = commands.add_parser("export", add_help=False, allow_abbrev=False)
    export.add_argument("run", type=Path, metavar="RUN")
    export.add_argument("out", type=Path, metavar="OUT_DIR")
    asked = parser.parse_args(list(argv))
    if not (asked.run / CONFIG).is_file():  # known before jax is imported
        raise UserError(f"no run in {asked.run}: it has no {CONFIG}; give the --workdir of a run")
    return asked


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see launch/inspect_run.py --help")


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _positive(text: str) -> int:
    if _whole(text) == 0:
        raise argparse.ArgumentTypeError("0: the first step is 1")
    return int(text)
