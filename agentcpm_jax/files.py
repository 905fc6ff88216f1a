"""Files of this package."""

from __future__ import annotations

from pathlib import Path

#: The models in this package, Hugging Face directories made by experiments/make_base.py:
#: 'shipped:base', and 'shipped:sft', the quickstart's agent after SFT (for short runs and tests).
SHIPPED = {
    f"shipped:{name}": Path(__file__).resolve().parent / "assets" / f"tiny_{name}"
    for name in ("base", "sft")
}
