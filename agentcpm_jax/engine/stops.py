"""Where a completion stops: the number of stop ids, and stop strings cut in tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MAX_STOP_IDS = 8  # of one request


def cut_at_stop(
    text: Callable[[Sequence[int]], str], ids: Sequence[int], new: int, stops: Sequence[str]
) -> tuple[int | None, str]:
    """(how many ids to keep, the string): up to the first of the last `new` ids that completes a
    stop string; (None, '') when none does. `text` decodes ids."""
    whole = text(ids)
    if not any(stop in whole for stop in stops):
        return None, ""
    for count in range(len(ids) - new + 1, len(ids) + 1):
        part = text(ids[:count])
        found = next((stop for stop in stops if stop in part), None)
        if found is not None:
            return count, found
    return None, ""
