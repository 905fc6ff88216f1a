"""Pages from the templates in `templates/`; every value that a template shows is escaped.

Texts come from models and web pages and may be made to break a page: nothing in them is markup,
and the characters that hide or reorder text are shown as what they are.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from agentcpm_jax.files import duration_text

# control characters, and those that reorder the text around them
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]")


def render_template(name: str, **values: Any) -> str:
    """The page as text; a value that a template asks for and does not get is an error."""
    return _environment().get_template(name).render(values)


@cache
def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["duration"] = duration_text
    return found


def without_controls(text: str) -> str:
    """Text with the characters that hide or reorder it replaced."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _shown(value: Any) -> Any:
    """A value as a page shows it; markup, which templates made, as it is."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return without_controls(value)
    return value
