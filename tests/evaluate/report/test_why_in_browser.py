"""The page about an issue in a real browser: drawn whole, colours switch, nothing runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentcpm_jax.run.inspect.why import write_why
from tests.evaluate.report.test_page_in_browser import chromium
from tests.run.recorded_run import finished

pytestmark = pytest.mark.browser


def test_the_page_renders_without_running_anything(tmp_path: Path) -> None:
    page = write_why(finished(), 1, out=tmp_path / "why.html")
    done = chromium(tmp_path, "--dump-dom", page.as_uri())
    assert done.stdout.count("data-t=") > 300 and "<script" not in done.stdout
    assert "CONSOLE" not in done.stderr, "the page logged an error"


def test_each_colour_scale_draws_another_picture(tmp_path: Path) -> None:
    page = write_why(finished(), 1, sample=1, out=tmp_path / "why.html")
    text, pictures = page.read_text(), set()
    for scale in range(3):
        plain = text.replace(' id="by-0" checked', ' id="by-0"')
        page.write_text(plain.replace(f' id="by-{scale}"', f' id="by-{scale}" checked'))
        picture = tmp_path / f"{scale}.png"
        chromium(tmp_path, f"--screenshot={picture}", "--window-size=1200,1400", page.as_uri())
        assert picture.stat().st_size > 40_000, "blank pages compress to about 10 kB"
        pictures.add(picture.read_bytes())
    assert len(pictures) == 3
