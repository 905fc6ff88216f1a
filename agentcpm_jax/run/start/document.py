"""The file that `--config` names, as a `ConfigDict`: Python with a variant, YAML, a stored run's.

configs/quickstart.py:smoke        its get_config("smoke")
my.yaml, my.json                   the keys of a configuration; what is left out has its default
runs/tiny, runs/tiny/config.json   what that run was started with
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from agentcpm_jax.config import config_from_json, edge_of, given_config
from agentcpm_jax.ranges import did_you_mean
from agentcpm_jax.types import UserError

CHECKOUT = Path(__file__).resolve().parents[3]
TEXT = (".yaml", ".yml", ".json")


def read_document(name: str) -> ConfigDict:
    """The configuration of FILE or FILE:variant, before overrides.

    Raises:
      UserError: no such file, or one that cannot be read; unknown variant or key.
    """
    path, _, variant = name.partition(":")
    directory = Path(path) / "config.json"
    found = directory if directory.is_file() else find_config(path)
    if found.suffix == ".py":
        return _run_python(found, variant)
    if found.suffix not in TEXT:
        raise UserError(f"{path} is none of {', '.join(('.py', *TEXT))}; give such a config file")
    if variant:
        raise UserError(f"{path} has no variants; leave out {':' + variant!r}")
    return _read_text(found)


def find_config(path: str) -> Path:
    """Find a config file: a relative path is tried in the working directory, then the checkout."""
    tried = dict.fromkeys(directory / path for directory in (Path.cwd(), CHECKOUT))
    for candidate in tried:
        if candidate.is_file():
            return candidate
    where = " and ".join(str(p) for p in tried)
    known = sorted(f"configs/{p.name}" for p in (CHECKOUT / "configs").glob("*.py"))
    hint = did_you_mean(path, known)
    raise UserError(f"no config file {path!r}: tried {where}; there are {', '.join(known)}; {hint}")


def _run_python(path: Path, variant: str) -> ConfigDict:
    known = _variants(path)
    if variant and known is not None and variant not in known:
        hint = did_you_mean(variant, known) if known else "it has none, leave it out"
        raise UserError(f"unknown variant {variant!r} of {path}; {hint}")
    values = flags.FlagValues()
    given = ["train", f"--config={path}" + (f":{variant}" if variant else "")]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=given)
    values(given)
    made: Any = values["config"].value
    if not isinstance(made, ConfigDict):
        raise UserError(f"{path}: get_config returns {type(made).__name__}, not a ConfigDict")
    return made


def _variants(path: Path) -> list[str] | None:
    """The names that the file's `get_config` compares its argument with; None: it cannot be told.

    Read, not run: a `get_config` that ignores what it does not know would run something else.
    """
    try:
        tree = ast.parse(path.read_text())
    except (SyntaxError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", "?")
        raise UserError(f"{path}:{line} is not Python: {error}; mend the config file") from None
    made = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "get_config"]
    if not made and "get_config" not in ast.dump(tree):  # else it is imported, or assigned
        raise UserError(f"{path} has no get_config; define it: it returns the configuration")
    if not made:
        return None
    if not (arguments := [*made[0].args.posonlyargs, *made[0].args.args]):
        return []
    name = arguments[0].arg
    uses = [n for n in ast.walk(made[0]) if isinstance(n, ast.Name) and n.id == name]
    compared, known = 0, []
    for node in ast.walk(made[0]):
        if isinstance(node, ast.Compare) and _is(node.left, name):
            compared += 1
            known += list(_strings(node.comparators))
        if isinstance(node, ast.Match) and _is(node.subject, name):
            compared += 1
            known += list(_strings(node.cases))
    return [v for v in known if v] if compared == len(uses) else None


def _is(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _strings(nodes: list[Any]) -> Iterator[str]:
    """Every string in what a variant is compared with; of the cases of a match, their patterns."""
    for node in nodes:
        for inner in ast.walk(node.pattern if isinstance(node, ast.match_case) else node):
            if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                yield inner.value


def _read_text(path: Path) -> ConfigDict:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2's numbers: 1e-4 is one; no key stands twice."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            merge = "tag:yaml.org,2002:merge"  # << may stand twice
            _once([(key.value, value) for key, value in node.value if key.tag != merge])
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        text = path.read_text(encoding="utf-8")
        raw = (
            json.loads(text, object_pairs_hook=_once)
            if path.suffix == ".json"
            else yaml.load(text, Loader)
        )
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read: {said}; mend the config file") from None
    if not isinstance(raw, Mapping):
        raise UserError(f"{path} holds no keys; begin with those of config.json, such as stages:")
    stages = raw.get("stages", ())
    if isinstance(stages, list) and any(isinstance(stage, Mapping) for stage in stages):
        return edge_of(config_from_json(raw, path))
    try:
        return given_config(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a mapping; ValueError when a key stands twice, of which one would be lost."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"the key {twice[0]!r} stands twice")
    return dict(pairs)
