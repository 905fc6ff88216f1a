"""`docs/api.md` lists what users may import, with the signatures that the code has."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "api.md"


def listed() -> Iterator[tuple[str, str]]:
    """(module, line) of every name in the code blocks of the page."""
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        module = ""
        for line in block.splitlines():
            if line.startswith("# "):
                module = f"agentcpm_jax.{line[2:]}"
            elif line:
                yield module, line


def shown(name: str, value: Any) -> str:
    """`name(parameters)`; of a protocol or an enumeration the name and its members."""
    if getattr(value, "_is_protocol", False):
        methods = [k for k, v in vars(value).items() if inspect.isfunction(v) and k[0] != "_"]
        inside = [
            shown(m, getattr(value, m)).replace("(self", "(").replace("(, ", "(") for m in methods
        ]
        return f"{name}: {', '.join(inside)}"
    if hasattr(value, "__members__"):
        return f"{name}: {', '.join(value.__members__)}"
    if isinstance(value, type) and issubclass(value, Exception):
        return f"{name}(message)"
    found = inspect.signature(value)
    plain = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    plain = [p if _is_plain(p.default) else p.replace(default=Ellipsis) for p in plain]
    text = str(found.replace(parameters=plain, return_annotation=found.empty))
    text = re.sub(r"<([A-Za-z.]+): [^>]*>", r"\1", text.replace("=Ellipsis", "=..."))
    return f"{name}{text}"


def _is_plain(default: Any) -> bool:
    return default is inspect.Parameter.empty or isinstance(default, str | int | float | None)


@pytest.mark.parametrize("module", sorted({module for module, _ in listed()}))
def test_the_listed_names_have_the_listed_signatures(module: str) -> None:
    lines = [line for where, line in listed() if where == module]
    names = [re.split(r"[(:]", line)[0] for line in lines]
    assert [shown(n, getattr(importlib.import_module(module), n)) for n in names] == lines


def test_what_is_listed_has_a_docstring_of_its_own() -> None:
    found = list(listed())
    assert len(found) == len({(m, line) for m, line in found}) > 60
    for module, line in found:
        value = getattr(importlib.import_module(module), re.split(r"[(:]", line)[0])
        assert inspect.getdoc(value), f"{module}: {line}"
