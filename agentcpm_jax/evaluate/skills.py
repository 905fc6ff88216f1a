"""General-skill accuracy: plain-text prompts completed greedily and compared exactly."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import numpy as np

from agentcpm_jax.rollout.policy import SampleRequest, SamplingParams, TokenPolicy
from agentcpm_jax.world.skills import REPORTED, Document, SkillMix, skill_document


def skill_documents(per_kind: int, seed: int = 0, split: str = "test") -> list[Document]:
    """`per_kind` documents of each reported skill, made of the names that `split` reserves."""
    rng = random.Random(f"skills/{split}/{seed}")
    mix = SkillMix(recall_drills=0)
    return [skill_document(rng, kind, mix, split) for kind in REPORTED for _ in range(per_kind)]


async def skill_scores(
    policy: TokenPolicy,
    encode: Callable[[str], np.ndarray],
    documents: Sequence[Document],
) -> dict[str, list[bool]]:
    """For each kind of document: whether the greedy completion of each one is its answer."""

    async def one(number: int, doc: Document) -> bool:
        answer = encode(doc.answer)
        completion = await policy.sample(
            SampleRequest(
                rid=f"skill-{number}/",
                prompt_ids=encode(doc.page + doc.prompt),
                max_new_tokens=len(answer),
                params=SamplingParams(temperature=0.0, stop_ids=(int(answer[-1]),)),
            )
        )
        return np.array_equal(completion.ids, answer)

    right = await asyncio.gather(*(one(i, doc) for i, doc in enumerate(documents)))
    out: dict[str, list[bool]] = {}
    for doc, ok in zip(documents, right, strict=True):
        out.setdefault(doc.kind, []).append(ok)
    return out
