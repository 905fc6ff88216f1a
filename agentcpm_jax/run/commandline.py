"""`--config=file.py:variant --config.a.b=value --workdir=dir` -> a checked configuration.

absl and ml_collections raise while they parse; here every such mistake becomes one `UserError`.
"""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from agentcpm_jax.config import ExperimentConfig, from_config_dict
from agentcpm_jax.types import UserError

CHECKOUT = Path(__file__).resolve().parents[2]
#: Values of `--explain=`; without a value it is the first.
EXPLAINED = ("estimate", "aot", "arrays")


class Command(NamedTuple):
    """What the command line asks for."""

    config: ExperimentConfig
    workdir: Path
    accept_data: bool = False  # resume although the data were edited
    doctor: bool | None = None  # True: examine only, False: do not examine, None: examine first
    explain: str = ""  # 'estimate', 'aot' or 'arrays': announce the plan, and stop
    slice: str = ""  # the TPU slice (or GPUs) of the plan; empty: the smallest that fits
    prices: str = ""  # JSON file of its prices


def parse(argv: Sequence[str]) -> Command:
    """Parse the flags; raises `UserError` for a missing file, unknown flag or key, wrong type."""
    first, rest = _config_first(argv)
    rest = ["--explain=estimate" if flag.lstrip("-") == "explain" else flag for flag in rest]
    ordered = ["train", first, *rest]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=ordered)
    flags.DEFINE_string("workdir", "", "where the run lives", flag_values=values)
    flags.DEFINE_boolean("doctor", None, "examine what the config names", flag_values=values)
    flags.DEFINE_enum("explain", "", ["", *EXPLAINED], "", flag_values=values)
    flags.DEFINE_string("slice", Command._field_defaults["slice"], "", flag_values=values)
    flags.DEFINE_string("prices", "", "JSON file of prices for --explain", flag_values=values)
    flags.DEFINE_boolean("accept_data", False, "resume with edited data", flag_values=values)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # absl logs what it then raises
            positional = values(ordered)
    except flags.UnrecognizedFlagError as error:
        raise UserError(
            f"{error}; known: --config, --config.<key>=..., --workdir, --[no]doctor, "
            "--accept_data, --explain[=aot|arrays] with --slice and --prices"
        ) from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # ml_collections puts the repr of a KeyError, escapes included, into the next one.
        text = " ".join(str(error).replace("\\n", " ").replace("\\", "").split())
        if text[:1] in ("'", '"') and text[-1:] == text[:1]:
            text = text[1:-1]
        raise UserError(f"{text}; look the key up in {first.removeprefix('--config=')}") from None
    if positional[1:]:
        raise UserError(f"unexpected argument {positional[1]!r}; overrides are --config.a.b=value")
    loaded: Any = values["config"].value
    config = from_config_dict(loaded)
    workdir = Path(values["workdir"].value or config.workdir)
    rest: list[Any] = [values[name].value for name in Command._fields[2:]]
    return Command(config, workdir, *rest)


def explained(command: Command, announce: Callable[[str], None]) -> bool:
    """Announces the plan if `--explain` was given; returns whether it was."""
    if not command.explain:
        return False
    from agentcpm_jax.plan.explain import explain  # only then: it imports the train step

    how = {"compiled": command.explain == "aot", "arrays": command.explain == "arrays"}
    announce(explain(command.config, command.slice, prices=command.prices, **how))
    return True


def find_config(path: str) -> Path:
    """Find a config file: a relative path is tried in the working directory, then the checkout."""
    tried = dict.fromkeys(directory / path for directory in (Path.cwd(), CHECKOUT))
    for candidate in tried:
        if candidate.is_file():
            return candidate
    where = " and ".join(str(p) for p in tried)
    known = ", ".join(sorted(f"configs/{p.name}" for p in (CHECKOUT / "configs").glob("*.py")))
    raise UserError(f"no config file {path!r}: tried {where}; there are {known}")


def _config_first(argv: Sequence[str]) -> tuple[str, list[str]]:
    """(--config=<absolute path>[:variant], the other flags); overrides may precede --config."""
    given = [a for a in argv if a.startswith(("--config=", "-config="))]
    rest = [a for a in argv if a not in given]
    if len(given) != 1:
        raise UserError(
            "give one --config=FILE, e.g. --config=configs/quickstart.py"
            + (f"; got {len(given)}" if given else "")
        )
    path, _, variant = given[0].partition("=")[2].partition(":")
    found = find_config(path)
    _check_syntax(found)
    return f"--config={found}" + (f":{variant}" if variant else ""), rest


def _check_syntax(path: Path) -> None:
    try:
        ast.parse(path.read_text())
    except (SyntaxError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", "?")
        raise UserError(f"{path}:{line} is not Python: {error}; mend the config file") from None
