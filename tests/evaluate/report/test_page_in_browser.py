"""The report in a real browser: it renders whole, loads nothing and runs no script."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from agentcpm_jax.evaluate.report.page import write_report
from tests.evaluate.report.test_page import demo

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)


def chromium(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    assert binary, "Chromium is not installed; apt-get install chromium"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    return subprocess.run(
        [binary, *FLAGS, profile, *flags], capture_output=True, text=True, timeout=120, check=True
    )


def test_the_report_renders_with_charts_tables_and_escaped_pages(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_report(page, demo())
    done = chromium(tmp_path, "--dump-dom", page.as_uri())
    dom = done.stdout
    assert dom.count("<svg") >= 2 and dom.count("<table") >= 1
    assert "<script" not in dom
    assert "CONSOLE" not in done.stderr, "the page logged an error"


def test_a_screenshot_is_not_blank(tmp_path: Path) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    write_report(page, demo())
    chromium(tmp_path, f"--screenshot={picture}", "--window-size=1200,2000", page.as_uri())
    # A blank page of this size compresses to about 10 kB.
    assert picture.stat().st_size > 50_000


def test_a_dark_screen_gets_another_picture(tmp_path: Path) -> None:
    page, pictures = tmp_path / "report.html", []
    write_report(page, demo())
    for scheme in (0, 1):
        picture = tmp_path / f"{scheme}.png"
        chosen = f"--blink-settings=preferredColorScheme={scheme}"
        chromium(
            tmp_path, f"--screenshot={picture}", "--window-size=900,900", chosen, page.as_uri()
        )
        pictures.append(picture.read_bytes())
    assert pictures[0] != pictures[1]


MEASURE = """<script>onload = () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true
  parent.postMessage([document.documentElement.scrollWidth, innerWidth].join(" of "), "*")
}</script></body>"""


def test_a_phone_needs_no_scrolling_to_the_side(tmp_path: Path) -> None:
    """Measured in a frame of 390 pixels, by a script in a copy without the policy."""
    page = tmp_path / "report.html"
    write_report(page, demo())
    free = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
    page.write_text(free.replace("</body>", MEASURE))
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<p id=width></p><script>onmessage = e => { width.textContent = e.data }</script>"
        "<iframe src=report.html style='width:390px;height:800px;border:0'></iframe>"
    )
    done = chromium(
        tmp_path, "--dump-dom", "--hide-scrollbars", "--virtual-time-budget=5000", frame.as_uri()
    )
    assert '<p id="width">390 of 390</p>' in done.stdout
