"""Which row of the cache a prompt takes: prefixes, copies, and what is given up first."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agentcpm_jax.engine.slots import BLOCK, MIN_COPY, CacheSlot, Slots

TEXT = np.arange(100, 200, dtype=np.int32)


def taken(slots: Slots, prompt: np.ndarray, *, fed: bool = True) -> CacheSlot:
    place = slots.place(prompt, reuse=True)
    slots.take(place, prompt)
    if fed:
        slots.fed[place.slot] = len(prompt) - 1
    return place


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.data())
def test_shared_is_the_longest_common_prefix(data):
    """Of texts that end and differ before, at and after the edges of blocks."""
    edges = st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK - 1])
    slots = Slots(5, 3 * BLOCK)
    prompt = np.random.default_rng(0).integers(0, 3, data.draw(edges) + 1).astype(np.int32)
    for slot in range(5):
        slots.text[slot, : len(prompt)] = prompt
        slots.text[slot, data.draw(edges)] += 1
        slots.known[slot] = data.draw(edges)
    for slot, found in enumerate(slots.shared(prompt)):
        n = min(int(slots.known[slot]), len(prompt))
        differs = (i for i in range(n) if slots.text[slot, i] != prompt[i])
        assert found == next(differs, n)


def test_the_next_turn_finds_its_own_row():
    slots = Slots(3, 200)
    first = taken(slots, TEXT[:30])
    slots.append(first.slot, TEXT[30:40])
    slots.release(first.slot)
    other = taken(slots, TEXT[50:70])
    place = slots.place(TEXT[:60], reuse=True)
    assert (place.slot, place.kept, place.source) == (first.slot, 39, -1)
    assert other.slot != first.slot


def test_a_group_copies_the_prompt_of_its_first_sample():
    slots = Slots(4, 200)
    first = taken(slots, TEXT[:30], fed=False)
    for _ in range(3):
        place = taken(slots, TEXT[:30], fed=False)
        assert (place.source, place.shared) == (first.slot, 29)
        assert place.slot != first.slot


def test_a_short_common_prefix_is_not_copied():
    slots = Slots(2, 200)
    taken(slots, TEXT[:30])
    other = np.concatenate([TEXT[: MIN_COPY - 1], TEXT[50:60]])
    assert slots.place(other, reuse=True).source == -1


def test_the_row_used_longest_ago_is_given_up():
    slots = Slots(3, 200)
    places = [taken(slots, TEXT[i * 20 : i * 20 + 15]) for i in range(3)]
    for place in (places[1], places[0], places[2]):
        slots.release(place.slot)
    assert slots.place(TEXT[80:95], reuse=True).slot == places[1].slot


def test_a_long_text_is_not_cut_for_a_prompt_that_wants_little_of_it():
    slots = Slots(2, 200)
    first = taken(slots, TEXT)
    slots.release(first.slot)
    place = slots.place(np.concatenate([TEXT[:10], TEXT[:20]]), reuse=True)
    assert place.slot != first.slot
    assert (place.source, place.shared) == (first.slot, 10)


def test_new_weights_leave_nothing_cached():
    slots = Slots(3, 200)
    idle, busy = taken(slots, TEXT[50:90]), taken(slots, TEXT[:40])
    slots.release(idle.slot)
    slots.forget()
    assert slots.place(TEXT[50:90], reuse=True).kept == 0
    assert slots.fed[busy.slot] == 0 and slots.known[busy.slot] == 40


def test_running_texts_find_each_other_again_without_circles():
    slots = Slots(4, 200)
    texts = [np.concatenate([TEXT[:30], TEXT[i + 1 : 50]]) for i in range(4)]
    busy = [taken(slots, text).slot for text in texts]
    slots.forget()
    places = slots.replace(busy)
    assert [p.slot for p in places] == busy and places[0].shared == 0
    for i, place in enumerate(places[1:], start=1):
        assert place.shared == 30 and place.source in busy[:i]
