"""General skills: what the base model can do besides being an agent, and may forget in training.

Each document is a prompt and the one right continuation, as plain text (no chat template):

    recall   a page of facts, then `recall founder ` -> the name that followed `founder `
    sort     `sort 9 4 7 1 5 = ` -> `1 4 5 7 9 `
    add      `add 7 12 = ` -> `3 ` (modulo 16)
    repeat   `repeat Kar Vel Tor Min = ` -> the same names again (trains copying; not reported: it
             shares its copying heads with the agent)
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from agentcpm_jax.world.names import FIRST, RELATIONS, SECOND, split_of

REPORTED = ("recall", "sort", "add")


@dataclass(frozen=True)
class Document:
    """`prompt` is given, `answer` is what a skilled model continues with.

    `drills` are earlier (question, answer) pairs on the same page: in training they give several
    lessons for one page; a test has none.
    """

    kind: str
    prompt: str
    answer: str
    page: str = ""
    drills: tuple[tuple[str, str], ...] = ()

    @property
    def parts(self) -> list[tuple[str, bool]]:
        """(text, whether it is an answer) in order; their concatenation is the document."""
        drilled = [p for q, a in self.drills for p in ((q, False), (a, True))]
        return [(self.page, False), *drilled, (self.prompt, False), (self.answer, True)]


@dataclass(frozen=True)
class SkillMix:
    """Relative frequency of each kind, and the length of recall pages and repeats."""

    recall: float = 4.0
    sort: float = 1.0
    add: float = 0.7
    repeat: float = 1.5
    recall_facts: tuple[int, int] = (4, 8)
    recall_pages: tuple[int, int] = (1, 2)
    repeat_names: tuple[int, int] = (2, 6)
    recall_drills: int = 3  # further questions about the same page


#: What the base is trained on, by name: short pages first, since copying appears sooner that way.
MIXES = {
    "easy": SkillMix(recall=5.0, add=2.0, recall_facts=(2, 4), recall_pages=(1, 1)),
    "full": SkillMix(add=1.5),
}


def document(rng: random.Random, mix: SkillMix) -> Document:
    """One document drawn from `mix`; names come from the pairs of the training split alone."""
    kinds = ("recall", "sort", "add", "repeat")
    kind = rng.choices(kinds, weights=[getattr(mix, k) for k in kinds])[0]
    return skill_document(rng, kind, mix)


def skill_document(rng: random.Random, kind: str, mix: SkillMix, split: str = "train") -> Document:
    """One document of the given kind."""
    if kind == "recall":
        return _recall(rng, mix, split)
    if kind == "sort":
        numbers = rng.sample(range(16), 5)
        return Document(kind, f"sort {_spaced(numbers)}= ", f"{_spaced(sorted(numbers))}\n")
    if kind == "add":
        a, b = rng.randrange(16), rng.randrange(16)
        return Document(kind, f"add {a} {b} = ", f"{(a + b) % 16} \n")
    names = "".join(name(rng, split) for _ in range(rng.randint(*mix.repeat_names)))
    return Document(kind, f"repeat {names}= ", f"{names}\n")


def name(rng: random.Random, split: str) -> str:
    """A random name whose pair of words belongs to `split`."""
    while True:
        i, j = rng.randrange(len(FIRST)), rng.randrange(len(SECOND))
        if split_of(i, j) == split:
            return f"{FIRST[i]} {SECOND[j]}"


def _recall(rng: random.Random, mix: SkillMix, split: str) -> Document:
    """Facts under their relation words; the last page's fact counts when pages repeat one."""
    facts: dict[str, str] = {}
    lines: list[str] = []
    for _ in range(rng.randint(*mix.recall_pages)):
        lines.append(name(rng, split))
        upper = min(mix.recall_facts[1], len(RELATIONS))
        relations = rng.sample(RELATIONS, rng.randint(mix.recall_facts[0], upper))
        for relation in relations:
            facts[relation] = name(rng, split)
            lines.append(f"{relation} {facts[relation]}")
    page = "\n".join(lines) + "\n"
    asked = rng.sample(list(facts), min(mix.recall_drills + 1, len(facts)))
    pairs = [(f"recall {relation} ", f"{facts[relation]}\n") for relation in asked]
    return Document("recall", *pairs[-1], page=page, drills=tuple(pairs[:-1]))


def _spaced(numbers: list[int]) -> str:
    return "".join(f"{n} " for n in numbers)
