"""`--config=file.py:variant --config.a.b=value --workdir=dir` -> a checked configuration.

absl and ml_collections raise while they parse; here every such mistake becomes one `UserError`.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from agentcpm_jax.config import ExperimentConfig, from_config_dict
from agentcpm_jax.plan.slices import device_count
from agentcpm_jax.ranges import did_you_mean
from agentcpm_jax.run.custom import check_custom
from agentcpm_jax.run.start.document import CHECKOUT, read_document
from agentcpm_jax.run.start.job import settings
from agentcpm_jax.run.start.limits import check_files, check_limits, check_worker
from agentcpm_jax.run.start.owner import check_place, check_unowned
from agentcpm_jax.run.start.resume import check_config
from agentcpm_jax.types import UserError

__all__ = ["CHECKOUT", "Command", "check_workdir", "check_worker", "explained", "parse"]
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
    """Parse the flags; raises `UserError` for a missing file, unknown flag or key, wrong type, and
    for limits that contradict each other."""
    name, rest = _config_first(argv)
    rest = ["--explain=estimate" if flag.lstrip("-") == "explain" else flag for flag in rest]
    ordered = ["train", *rest]
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "where the run lives", flag_values=values)
    flags.DEFINE_boolean("doctor", None, "examine what the config names", flag_values=values)
    flags.DEFINE_enum("explain", "", ["", *EXPLAINED], "", flag_values=values)
    flags.DEFINE_string("slice", Command._field_defaults["slice"], "", flag_values=values)
    flags.DEFINE_string("prices", "", "JSON file of prices for --explain", flag_values=values)
    flags.DEFINE_boolean("accept_data", False, "resume with edited data", flag_values=values)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # absl logs what it then raises
            document = read_document(name)
            for flag in rest:
                _check_key(document, flag)
            config_flags.DEFINE_config_dict(
                "config", document, flag_values=values, sys_argv=ordered
            )
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
        raise UserError(f"{text}; look the key up in {name}") from None
    if positional[1:]:
        raise UserError(f"unexpected argument {positional[1]!r}; overrides are --config.a.b=value")
    loaded: Any = values["config"].value
    if not (place := values["workdir"].value or loaded.workdir):
        raise UserError("config.workdir is empty; give the --workdir in which the run lies")
    workdir = Path(place)
    planned = bool(values["explain"].value)
    config = from_config_dict(loaded, workdir, planned=planned)
    check_limits(config)
    if values["slice"].value:
        device_count(values["slice"].value)
    if (prices := values["prices"].value) and not Path(prices).is_file():
        raise UserError(f"--prices={prices}: no such file; give a JSON file of prices")
    rest: list[Any] = [values[name].value for name in Command._fields[2:]]
    return Command(config, workdir, *rest)


def check_workdir(command: Command) -> None:
    """Check, before anything heavy is imported, that the command may go on in its workdir.

    Raises `UserError`: what the configuration names is not there; the workdir cannot be written,
    another process owns it, or it holds a run of another configuration.
    """
    check_custom(command.config)
    if command.explain:
        return
    check_place(command.workdir)
    if not command.doctor and settings(os.environ) is None:  # else it may be this job's process 0
        check_unowned(command.workdir)
    check_config(command.config, command.workdir)
    if not command.doctor:  # which says it beside its other findings
        check_files(command.config, command.workdir)
        from agentcpm_jax.run.start.models import check_models, tokenizer_of

        with tokenizer_of(command.config) as used:
            check_models(command.config, command.workdir, used)


def explained(command: Command, announce: Callable[[str], None]) -> bool:
    """Announces the plan if `--explain` was given; returns whether it was."""
    if not command.explain:
        return False
    from agentcpm_jax.plan.explain import explain  # only then: it imports the train step

    how = {"compiled": command.explain == "aot", "arrays": command.explain == "arrays"}
    announce(explain(command.config, command.slice, prices=command.prices, **how))
    return True


def _config_first(argv: Sequence[str]) -> tuple[str, list[str]]:
    """(FILE or FILE:variant of --config=FILE or --config FILE, the other flags)."""
    given, rest, words = [], [], iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "-config"):
            rest.append(word)
        elif (name := value if equals else next(words, "")) and not name.startswith("-"):
            given.append(name)
    if len(given) != 1:
        raise UserError(
            "give one --config=FILE, e.g. --config=configs/quickstart.py"
            + (f"; got {len(given)}" if given else "")
        )
    return given[0], rest


def _check_key(document: Any, flag: str) -> None:
    """Check that the configuration has the key of `--config.a.b=value`, however deep."""
    key = flag.lstrip("-").removeprefix("no").partition("=")[0]
    if not (flag.startswith("-") and key.startswith("config.")):
        return
    at, path = document, "config"
    for name in key.split(".")[1:]:
        name = name.partition("[")[0]
        if not isinstance(at, ConfigDict):
            raise UserError(f"unknown config key {key}; {path} is a value and has no keys")
        if name not in at:
            hint = did_you_mean(name, at.keys())
            raise UserError(f"unknown config key {key}: {path} has no {name!r}; {hint}")
        at, path = at[name], f"{path}.{name}"
