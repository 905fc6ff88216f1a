"""Draws which folder of the package imports which: docs/architecture.svg, from the syntax trees.

    python experiments/architecture.py            # a second; imports nothing of the package

A box is a folder (or a file beside them) with the first sentence of its docstring. Boxes stand in
the order that `tests/test_architecture.py` enforces, users above what they use. An arrow is an
import; one that other arrows imply (a -> b -> c implies a -> c) is left out, and so are those to
the lowest row, which everything may import.
"""

from __future__ import annotations

import ast
import html
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.test_architecture import (
    DEVICE_WORLD,
    HOST_WORLD,
    LAYERS,
    PACKAGE,
    imported_unit,
    imports_of,
    package_files,
    unit_of,
)

OUT = ROOT / "docs" / "architecture.svg"
WIDTH, BOX, HEIGHT, GAP, ROW, LETTERS = 1240, 204, 58, 60, 104, 31
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328 } .name { font-weight: 600 }
  .what { font-size: 11px; fill: #57606a } rect { fill: #f6f8fa; stroke: #8c959f }
  .host rect { fill: #ddf4ff } .device rect { fill: #fff1e5 } path { fill: none; stroke: #8c959f }
  .arrow { fill: #8c959f; stroke: none } .paper { fill: #ffffff; stroke: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .what { fill: #9198a1 } rect { fill: #21262d; stroke: #656c76 }
    .host rect { fill: #0c2d4a } .device rect { fill: #3d2410 } path { stroke: #656c76 }
    .arrow { fill: #656c76 } .paper { fill: #0d1117 }
  }
"""


def main() -> int:
    """Writes the picture."""
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(draw())
    print(OUT.relative_to(ROOT))
    return 0


def draw() -> str:
    """The picture as SVG text."""
    boxes = _places()
    height = ROW * len(LAYERS) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>Imports between the folders of agentcpm_jax</title>",
        f'<style>{STYLE}</style><rect class="paper" width="{WIDTH}" height="{height}"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"',
        ' markerHeight="7" orient="auto"><path class="arrow" d="M0 0L8 4L0 8z"/></marker></defs>',
    ]
    for start, end in sorted(reduced(graph())):
        if end in LAYERS[0]:
            continue
        (x1, y1), (x2, y2) = boxes[start], boxes[end]
        x1, y1, x2 = x1 + BOX / 2, y1 + HEIGHT, x2 + BOX / 2
        bend = (y2 - y1) / 2
        curve = f"M{x1} {y1}C{x1} {y1 + bend} {x2} {y2 - bend} {x2} {y2 - 2}"
        parts.append(
            f'<path d="{curve}" marker-end="url(#tip)"><title>{start} imports {end}</title></path>'
        )
    for unit, (x, y) in sorted(boxes.items()):
        kind = "host" if unit in HOST_WORLD else "device" if unit in DEVICE_WORLD else "bridge"
        first, second = _two_lines(_what(unit))
        parts.append(
            f'<g class="{kind}"><rect x="{x}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="6"/>'
            f'<text class="name" x="{x + 10}" y="{y + 18}">{unit}</text>'
            f'<text class="what" x="{x + 10}" y="{y + 34}">{html.escape(first)}</text>'
            f'<text class="what" x="{x + 10}" y="{y + 48}">{html.escape(second)}</text></g>'
        )
    key = (
        "blue: host world, never imports jax; orange: device world, never waits or serves; "
        "grey: bridges and what both need. Everything may import the lowest row."
    )
    parts.append(f'<text class="what" x="20" y="{height - 12}">{key}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def graph() -> dict[str, set[str]]:
    """unit -> the units it imports."""
    found: dict[str, set[str]] = {unit: set() for layer in LAYERS for unit in layer}
    for path in package_files():
        if (unit := unit_of(path)) in found:
            targets = {imported_unit(name) for name, _, _ in imports_of(path)}
            found[unit] |= {t for t in targets if t in found and t != unit}
    return found


def reduced(edges: dict[str, set[str]]) -> set[tuple[str, str]]:
    """The edges of a graph without circles that no path of other edges replaces."""
    below: dict[str, set[str]] = {}

    def reach(unit: str) -> set[str]:
        if unit not in below:
            below[unit] = set(edges[unit]).union(*(reach(t) for t in edges[unit]))
        return below[unit]

    return {
        (unit, target)
        for unit, targets in edges.items()
        for target in targets
        if not any(target in reach(other) for other in targets - {target})
    }


def _places() -> dict[str, tuple[float, float]]:
    """Upper left corners; within a layer, units stand near the middle of what uses them."""
    edges, places = graph(), {}
    for row, layer in enumerate(reversed(LAYERS)):

        def pull(unit: str) -> tuple[float, str]:
            users = [places[u][0] for u in places if unit in edges[u]]
            return (sum(users) / len(users) if users else WIDTH / 2, unit)

        units = sorted(layer, key=pull)
        left = (WIDTH - len(units) * (BOX + GAP) + GAP) / 2
        for column, unit in enumerate(units):
            places[unit] = (left + column * (BOX + GAP), 16 + row * ROW)
    return places


def _what(unit: str) -> str:
    folder = ROOT / PACKAGE / unit
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def _two_lines(text: str) -> tuple[str, str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) < LETTERS:
            lines[-1] = f"{lines[-1]} {word}".strip()
        else:
            lines.append(word)
    second = lines[1] if len(lines) > 1 else ""
    return lines[0], second + ("…" if len(lines) > 2 else "")


if __name__ == "__main__":
    sys.exit(main())
