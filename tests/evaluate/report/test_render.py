"""The templates escape what they show, miss nothing, and are part of the package."""

from __future__ import annotations

import fnmatch
import tomllib
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from agentcpm_jax.evaluate.report import render
from agentcpm_jax.evaluate.report.charts import COLOURS
from agentcpm_jax.evaluate.report.render import render_template

ROOT = Path(__file__).parents[3]
TEMPLATES = Path(render.__file__).parent / "templates"


def test_values_are_escaped_and_hidden_characters_are_shown() -> None:
    page = render_template("layout.html.j2", title="</title><script>'\"&\x00\u202e\n")
    assert "<title>&lt;/title&gt;&lt;script&gt;&#39;&#34;&amp;\ufffd\ufffd\n</title>" in page


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="title"):
        render_template("layout.html.j2")


def test_the_text_of_a_chart_is_the_only_value_that_is_not_escaped() -> None:
    sources = {path.name: path.read_text() for path in TEMPLATES.iterdir()}
    raw = [(n, word) for n, s in sources.items() for word in s.split() if "|safe" in word]
    assert raw == [("report.html.j2", "svg|safe")]
    assert not [n for n, s in sources.items() if "autoescape" in s or "Markup" in s]


def test_the_page_sets_every_colour_of_the_charts_for_both_schemes() -> None:
    style = (TEMPLATES / "page.css").read_text()
    for colour in COLOURS:
        name, value = colour.removeprefix("var(").removesuffix(")").split(",")
        assert style.count(f"{name}: #") == 2 and f"{name}: {value}" in style


def test_the_templates_are_data_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["agentcpm_jax"]
    names = [path.relative_to(ROOT / "agentcpm_jax").as_posix() for path in TEMPLATES.iterdir()]
    assert len(names) == 8
    assert [n for n in names if not any(fnmatch.fnmatch(n, p) for p in patterns)] == []
