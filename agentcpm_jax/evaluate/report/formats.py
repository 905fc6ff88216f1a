"""Numbers as people read them."""

from __future__ import annotations

import math

from agentcpm_jax.evaluate.passk import Estimate


def format_number(value: float, step: float | None = None) -> str:
    """A number for people: 3 significant digits, or as many decimals as an axis step needs.

    Thousands become k, M, B; very small numbers get exponents; NaN is n/a.
    """
    if math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    size = max(abs(value), step or 0)
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e5, "k")):
        if size >= limit:
            unit = 1e3 if suffix == "k" else limit
            return format_number(value / unit, step and step / unit) + suffix
    if size < 1e-3:
        mantissa, exponent = f"{value:.{0 if step else 2}e}".split("e")
        return (
            f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
        )
    if step:
        text = f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
    elif float(value).is_integer():
        return f"{value:.0f}"
    else:
        text = f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if float(text) == 0 else text


def format_estimate(v: Estimate, percent: bool = False) -> str:
    """`62.1% [58.0, 66.0]`, or with 3 significant digits when not a percentage.

    A mean over fewer tasks than were asked says so: `62.1% [58.0, 66.0] (380 of 400 tasks)`.
    """

    def number(x: float) -> str:
        return f"{100 * x:.1f}" if percent else format_number(x)

    fewer = f" ({v.tasks} of {v.asked} tasks)" if v.tasks < v.asked else ""
    if math.isnan(v.value):
        return f"n/a{fewer}"
    text = number(v.value) + ("%" if percent else "")
    if math.isnan(v.low) or math.isnan(v.high):
        return text + fewer
    return f"{text} [{number(v.low)}, {number(v.high)}]{fewer}"
