"""The import rules and house rules that a machine can check, read from the syntax trees."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "agentcpm_jax"

#: Imports point from a later line to an earlier one, never within a line and never upwards.
LAYERS: list[set[str]] = [
    {"types", "tree", "files"},
    {"disk", "manifest"},
    {"mesh", "database", "ranges", "migrations", "records"},
    {"sharding", "world"},
    {"chat", "dock", "rewards", "tasks"},
    {"log", "model", "data"},
    {"rollout", "hf"},
    {"weights"},
    {"merge", "evaluate", "engine", "train", "pool"},
    {"checkpoint", "config"},
    {"plan"},
    {"run"},
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

HOST_WORLD = {
    *("tasks", "world", "dock", "chat", "rollout", "log", "rewards", "pool", "evaluate"),
    *("database", "records"),
}
DEVICE_WORLD = {"model", "merge", "train", "plan", "sharding", "mesh", "tree"}
ARRAY_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "chex"}
SERVING_LIBRARIES = {"asyncio", "aiohttp", "httpx", "requests", "urllib3", "fastapi", "uvicorn"}
TEXT_LIBRARIES = {"transformers", "tokenizers"}

BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base", "_lib"}
#: Libraries that are no requirements, and the only file that may import them, when it is asked to.
ON_DEMAND = {
    "transformers": {"hf/tokenizer.py", "hf/parity.py"},
    "torch": {"hf/parity.py"},
}
#: The files of `hf/` that a merge needs.
WITHOUT_JAX = {"names", "files", "locate", "companions", "card"}
MAX_LINES = 700
MAX_LAUNCH_LINES = 60
FILES_OF_A_FOLDER = range(3, 16)
#: Rooms that are being furnished.
SMALL_FOLDERS = {
    "dock": "the tool protocol; routers, sandboxes and tool servers come to stand beside it",
}


def package_files() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def shipped_files() -> list[Path]:
    folders = (PACKAGE, "launch", "configs", "experiments", "tests")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[str, int, bool]]:
    """(absolute dotted name, line, at module level) of every import, wherever it stands.

    `from a import b` yields `a.b`, which is at least as long as the imported module's name.
    """
    root = ast.parse(source)
    inner = {
        id(node)
        for function in ast.walk(root)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(root):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            names = [str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)]
        for name in names:
            yield name, getattr(node, "lineno", 0), id(node) not in inner


def unit_of(path: Path) -> str:
    """`agentcpm_jax/model/qwen3.py` -> `model`; `agentcpm_jax/tree.py` -> `tree`."""
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[str, int, bool]]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    yield from imports(path.read_text(), module, is_package)


def imported_unit(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def test_every_file_of_the_package_has_a_place_in_the_order() -> None:
    assert {unit_of(path) for path in package_files()} - {"__init__"} <= LEVEL.keys()


def test_imports_point_one_way() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in package_files()
        for name, line, _ in imports_of(path)
        if (target := imported_unit(name)) is not None
        and target != unit_of(path)
        and LEVEL.get(target, 99) >= LEVEL.get(unit_of(path), -1)
    ]
    assert wrong == []


def test_modules_import_in_no_circle() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package_files()
    }

    def targets(path: Path) -> set[str]:
        found = set()
        for name, _, _ in imports_of(path):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            found |= {name} if name and name != PACKAGE else set()
        return found

    graph = {module: targets(path) - {module} for module, path in modules.items()}
    while leaves := [module for module, needs in graph.items() if not needs]:
        for leaf in leaves:
            del graph[leaf]
        for needs in graph.values():
            needs.difference_update(leaves)
    assert graph == {}


def test_the_host_world_never_touches_arrays() -> None:
    forbidden_units = LEVEL.keys() - HOST_WORLD - {"types", "files", "ranges", "disk", "manifest"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in package_files()
        if unit_of(path) in HOST_WORLD
        for name, line, _ in imports_of(path)
        if name.split(".")[0] in ARRAY_LIBRARIES or imported_unit(name) in forbidden_units
    ]
    assert wrong == []


def test_the_device_world_never_waits_serves_or_tokenises() -> None:
    wrong = []
    for path in package_files():
        if unit_of(path) not in DEVICE_WORLD:
            continue
        for name, line, _ in imports_of(path):
            library = name.split(".")[0]
            if (
                library in SERVING_LIBRARIES
                or name.startswith(("http.", "urllib.request"))
                or library in TEXT_LIBRARIES
                or imported_unit(name) in HOST_WORLD
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_nobody_but_the_log_knows_its_tables() -> None:
    """SQL and its library stay in `log/` and `database.py`; the others call methods."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in package_files()
        if unit_of(path) not in {"log", "database"}
        for name, line, _ in imports_of(path)
        if name.split(".")[0] == "sqlalchemy" or name == f"{PACKAGE}.log.schema"
    ]
    assert wrong == []


def test_the_agent_of_a_gpu_host_needs_no_arrays() -> None:
    """It runs in SGLang's environment, which has no jax."""
    weights = ROOT / PACKAGE / "weights"
    files = [weights / f"{name}.py" for name in ("store", "mirror", "agent")]
    below = [ROOT / PACKAGE / f"{name}.py" for name in ("types", "files", "disk", "manifest")]
    allowed = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (*files, *below)]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in (*files, *below)
        for name, line, _ in imports_of(path)
        if name.split(".")[0] in ARRAY_LIBRARIES
        or (imported_unit(name) is not None and not name.startswith(tuple(allowed)))
    ]
    assert wrong == []


def test_every_imported_library_is_a_direct_requirement() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in ("export", "data"):
        lines += project["optional-dependencies"][extra]
    required = {re.split(r"[<>=\[; ]", line)[0] for line in lines if line and line[0] != "#"}
    distributions = packages_distributions()
    wrong = [
        f"{path.relative_to(ROOT)} imports {library}"
        for path in [*package_files(), *(ROOT / "launch").glob("*.py")]
        for library in {name.split(".")[0] for name, _, _ in imports_of(path)}
        if library not in {PACKAGE, *ON_DEMAND, *sys.stdlib_module_names}
        and required.isdisjoint(d.lower().replace("_", "-") for d in distributions[library])
    ]
    assert wrong == []


def test_every_direct_requirement_is_imported() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.split(r"[<>=\[; ]", line)[0] for line in lines if line and line[0] != "#"}
    libraries = {
        name.split(".")[0]
        for path in [*package_files(), *(ROOT / "launch").glob("*.py")]
        for name, _, _ in imports_of(path)
    }
    distributions = packages_distributions()
    imported = {
        d.lower().replace("_", "-") for library in libraries for d in distributions.get(library, ())
    }
    assert required <= imported, "a requirement that no file imports"


def test_torch_and_transformers_are_imported_where_they_are_asked_for() -> None:
    """Inside functions of few files; elsewhere they are oracles of tests."""
    files = [*package_files(), *(ROOT / "launch").glob("*.py"), *(ROOT / "configs").glob("*.py")]
    found: dict[str, set[str]] = {library: set() for library in ON_DEMAND}
    for path in files:
        for name, _, at_module_level in imports_of(path):
            if (library := name.split(".")[0]) in ON_DEMAND:
                assert not at_module_level, f"{path} imports {name} at once"
                found[library].add(str(path.relative_to(ROOT / PACKAGE)))
    assert found == ON_DEMAND


def test_merging_from_the_command_line_needs_neither_stages_nor_configuration() -> None:
    units = {imported_unit(name) for name, _, _ in imports_of(ROOT / "launch" / "merge.py")}
    assert "merge" in units and units <= {None, "merge", "types"}


def test_files_of_models_are_read_and_written_without_arrays() -> None:
    """`launch/merge.py` runs where JAX is not installed."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in (ROOT / PACKAGE / "hf").glob("*.py")
        if path.stem in WITHOUT_JAX
        for name, line, _ in imports_of(path)
        if name.split(".")[0] in ARRAY_LIBRARIES | TEXT_LIBRARIES
        or imported_unit(name) not in {None, "hf", "types", "files"}
        or (imported_unit(name) == "hf" and name.split(".")[2] not in WITHOUT_JAX)
    ]
    assert wrong == []


def test_nothing_below_launch_prints() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in package_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert wrong == []


def test_files_are_short_and_named_after_what_they_hold() -> None:
    for path in shipped_files():
        lines = len(path.read_text().splitlines())
        limit = MAX_LAUNCH_LINES if path.parent == ROOT / "launch" else MAX_LINES
        assert lines <= limit, f"{path.relative_to(ROOT)} has {lines} lines, {limit} allowed"
        assert not is_banned(path.stem), f"{path.relative_to(ROOT)} says nothing about its content"


def test_folders_are_rooms() -> None:
    """3 to 15 files each; no name repeats the folder's; three of one family have a folder."""
    wrong = []
    for folder in sorted({path.parent for path in package_files()} - {ROOT / PACKAGE}):
        name = str(folder.relative_to(ROOT / PACKAGE))
        stems = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
        if len(stems) not in FILES_OF_A_FOLDER and name not in SMALL_FOLDERS:
            wrong.append(f"{name}/ has {len(stems)} files")
        heads = Counter(stem.split("_")[0] for stem in stems)
        wrong += [f"{name}/{n}_*: {count} files" for n, count in heads.items() if count >= 3]
        wrong += [f"{name}/{s}.py repeats it" for s in stems if s.split("_")[0] == folder.name]
        if not ast.get_docstring(ast.parse((folder / "__init__.py").read_text())):
            wrong.append(f"{name}/__init__.py does not say what the folder is for")
    assert wrong == []


def is_banned(stem: str) -> bool:
    return stem in BANNED_NAMES or stem.endswith(("_utils", "_helpers", "_lib", "_v2", "_common"))


def test_tests_mirror_the_package_in_folders() -> None:
    """`tests/rollout/test_episode.py` proves `rollout/episode.py`, or its folder."""
    beside = {"launch", "experiments", "doubles", "golden"}
    wrong = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("*.py")
        if (folder := path.parent.relative_to(ROOT / "tests")).parts
        and folder.parts[0] not in beside
        and not (ROOT / PACKAGE / folder).is_dir()
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import jax.numpy as jnp", ("jax.numpy", True)),
        ("def f():\n    from jax import lax", ("jax.lax", False)),
        ("async def f():\n    import jax", ("jax", False)),
        ("if TYPE_CHECKING:\n    import jax", ("jax", True)),
        ("from . import rows", (f"{PACKAGE}.data.rows", True)),
        ("from ..model import qwen3", (f"{PACKAGE}.model.qwen3", True)),
        (f"from {PACKAGE} import model", (f"{PACKAGE}.model", True)),
        ("importlib.import_module('jax')", ("jax", True)),
    ],
)
def test_the_reader_sees_every_form_of_import(source: str, expected: tuple[str, bool]) -> None:
    found = [(name, top) for name, _, top in imports(source, f"{PACKAGE}.data.loader")]
    assert found == [expected]


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))
