from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentcpm_jax.world.graph import WorldConfig, build_world, look_alikes
from agentcpm_jax.world.names import RELATIONS, SPLITS
from agentcpm_jax.world.search import SearchIndex, search_index

INDEX = SearchIndex(build_world(WorldConfig(stale=0.2, distractors=3)))


@pytest.mark.parametrize("split", SPLITS)
def test_results_are_the_match_and_its_look_alikes(split: str) -> None:
    index = search_index(WorldConfig(seed=4, split=split))
    for name in index.world.entities:
        for query in (name, f"{RELATIONS[0]} {name}"):
            assert set(index.search(query)) == {name, *look_alikes(index.world, name)}


def test_the_position_of_the_match_says_nothing() -> None:
    places = Counter(
        index.search(f"{relation} {name}").index(name)
        for index in (search_index(WorldConfig(seed=s)) for s in range(5))
        for name in index.world.entities
        for relation in RELATIONS
    )
    n = sum(places.values())  # 2000: the standard deviation of a share is 0.01
    assert set(places) == {0, 1, 2, 3}
    assert all(abs(count / n - 0.25) < 0.05 for count in places.values())


def test_the_true_page_is_found_among_stale_and_contradictory_ones() -> None:
    index = SearchIndex(build_world(WorldConfig(stale=1.0, contradictory=1.0, distractors=50)))
    for name in index.world.entities:
        found = index.search(name)
        assert {name, f"{name} archive", f"{name} rumours"} < set(found) and len(found) == 4


def test_body_matches_fill_what_titles_leave() -> None:
    found = INDEX.search("founder")
    assert len(found) == 4
    for title in found:
        assert "founder" in (INDEX.html(title) or "")


def test_equal_queries_have_equal_results_and_few_results_are_kept() -> None:
    again = SearchIndex(build_world(INDEX.world.config))
    name = INDEX.world.entities[0]
    assert again.search(name) == INDEX.search(name)
    assert SearchIndex(build_world(WorldConfig(results=1))).search(name) == [name]
    assert INDEX.search("zeppelin") == INDEX.search("") == INDEX.search('"*^') == []


@settings(deadline=None, max_examples=150)
@given(st.text(st.characters(codec=None), max_size=60))
@example('Kar" OR title:*')
@example("NEAR(a b, 2) AND NOT {title}: ^x*")
@example("'; DROP TABLE page; --")
@example("a_b \x00 \ud800 K\u0301ar")
@example("word " * 5000)
def test_any_text_is_a_query_and_adding_noise_keeps_the_match(text: str) -> None:
    assert len(INDEX.search(text)) <= 4
    name = INDEX.world.entities[7]
    assert name in INDEX.search(f'{name} "{text}')


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(['"', "'", "*", "^", ":", "(", ")", "{", "-", "\x00", ";"]))
def test_operators_between_words_do_not_matter(operator: str) -> None:
    first, second = INDEX.world.entities[3].split()
    found = INDEX.search(f"{operator}{first}{operator} {operator}{second}")
    assert set(found) == set(INDEX.search(f"{first} {second}"))
