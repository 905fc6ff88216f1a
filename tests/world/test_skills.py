"""General-skill documents: right answers, held-out names, several lessons a page."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from agentcpm_jax.world.names import FIRST, SECOND, split_of
from agentcpm_jax.world.skills import REPORTED, SkillMix, document, skill_document

MIX = SkillMix()


def texts(kind: str, split: str = "train", mix: SkillMix = MIX):
    rng = random.Random(kind + split)
    return [skill_document(rng, kind, mix, split) for _ in range(50)]


def test_sort_and_add_are_right() -> None:
    for doc in texts("sort"):
        numbers = [int(n) for n in doc.prompt.removeprefix("sort ").removesuffix("= ").split()]
        assert [int(n) for n in doc.answer.split()] == sorted(numbers)
    for doc in texts("add"):
        a, b = (int(n) for n in doc.prompt.removeprefix("add ").removesuffix("= ").split())
        assert int(doc.answer) == (a + b) % 16


def test_recall_asks_for_the_last_fact_of_its_page() -> None:
    for doc in texts("recall"):
        relation = doc.prompt.removeprefix("recall ")
        lines = [x for x in doc.page.split("\n") if x.startswith(relation)]
        assert doc.answer == lines[-1].removeprefix(relation) + "\n"
        assert 1 <= len(doc.drills) <= MIX.recall_drills
        assert doc.prompt not in [q for q, _ in doc.drills]


def test_parts_make_up_the_document_and_only_answers_are_answers() -> None:
    doc = texts("recall")[0]
    whole = "".join(text for text, _ in doc.parts)
    assert whole.startswith(doc.page) and whole.endswith(doc.prompt + doc.answer)
    assert [text for text, answer in doc.parts if answer] == [a for _, a in doc.drills] + [
        doc.answer
    ]


@pytest.mark.parametrize("split", ["train", "test"])
def test_names_belong_to_the_split(split: str) -> None:
    for doc in texts("recall", split):
        for line in doc.page.strip().split("\n"):
            first, second = line.split()[-2:]
            assert split_of(FIRST.index(first), SECOND.index(second)) == split


def test_the_mix_decides_the_kinds() -> None:
    rng = random.Random(0)
    only = replace(MIX, sort=0, add=0, repeat=0)
    assert {document(rng, only).kind for _ in range(20)} == {"recall"}
    assert set(REPORTED) <= {document(rng, MIX).kind for _ in range(200)}
