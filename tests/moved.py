"""What became of every test of an earlier commit: its new id, merged into, or dropped because.

    git worktree add /tmp/old COMMIT && cd /tmp/old
    python -m pytest --collect-only -q -m '' > /tmp/old.txt
    cd - && python tests/moved.py /tmp/old.txt         # writes tests/golden/moved/tests.tsv

`tests/golden/moved/moved.json` holds the answers that no program can guess: {"files": {old: new},
"tests": {"old file::name": "new file::name" | "merged into ..." | "dropped because ..."}}. A test
function without a successor is an error that names it.
"""

from __future__ import annotations

import ast
import json
import sys
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parent
FOLDER = TESTS / "golden" / "moved"
TABLE = FOLDER / "tests.tsv"


def main(argv: list[str]) -> int:
    """Writes the table; prints what is lost and exits 1 when something is."""
    old = Counter(
        line.partition("[")[0] for line in Path(argv[0]).read_text().splitlines() if "::" in line
    )
    answers = json.loads((FOLDER / "moved.json").read_text())
    files, tests = answers["files"], answers["tests"]
    rows, lost, there = [], [], present()
    for test, count in sorted(old.items()):
        file, _, name = test.partition("::")
        became = tests.get(test, f"{files.get(file, file)}::{name}")
        if became not in there and not became.startswith(("merged into ", "dropped because ")):
            lost.append(f"{test} -> {became}")
        rows.append(f"{test}\t{count}\t{became}")
    TABLE.write_text("old test\tcases\twhat it became\n" + "\n".join(rows) + "\n")
    print("\n".join(lost) or f"{len(rows)} tests, {sum(old.values())} cases: none is lost")
    return int(bool(lost))


def present() -> set[str]:
    """`tests/.../file.py::name` of every test function here, those that a file takes over from
    another (`from tests.pool.contract_suite import *`) included."""
    found = set()
    for path in TESTS.rglob("test_*.py"):
        here = path.relative_to(TESTS.parent).as_posix()
        found |= {f"{here}::{name}" for name in _tests_of(path)}
    return found


def _tests_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "test" in node.name[:5]:
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
            source = TESTS.parent / f"{(node.module or '').replace('.', '/')}.py"
            taken = {alias.name for alias in node.names}
            if source.is_file() and (taken == {"*"} or any(n.startswith("test_") for n in taken)):
                theirs = _tests_of(source)
                names |= theirs if taken == {"*"} else theirs & taken
    return names


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
