"""General-skill accuracy: plain-text prompts completed greedily and compared exactly."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import numpy as np

from agentcpm_jax.evaluate.outage import Outages
from agentcpm_jax.rollout.policy import (
    Completion,
    Finish,
    SampleRequest,
    SamplingParams,
    TokenPolicy,
)
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
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, list[bool]]:
    """For each kind of document: whether the greedy completion of each one is its answer.

    One that the engine fails at is asked again; one that fails on its own is left out.
    Raises `BreakerOpen` when the engine completes nothing any more.
    """
    outages = Outages("skills", max(len(documents), 1), announce)

    async def one(number: int, doc: Document) -> bool | None:
        answer = encode(doc.answer)

        async def once(attempt: int) -> Completion:
            request = SampleRequest(
                rid=f"skill-{number}-{attempt}/",
                prompt_ids=encode(doc.page + doc.prompt),
                max_new_tokens=len(answer),
                params=SamplingParams(temperature=0.0, stop_ids=(int(answer[-1]),)),
            )
            try:
                return await policy.sample(request)
            except Exception as error:  # of a server, say: no answer, as every other failure
                none = np.zeros(0, np.int32)
                why = f"{type(error).__name__}: {error}"
                return Completion(none, np.zeros(0, np.float32), none, Finish.ERROR, why)

        completion = await outages.ask(once, _failure)
        return None if _failure(completion) else np.array_equal(completion.ids, answer)

    right = await asyncio.gather(*(one(i, doc) for i, doc in enumerate(documents)))
    out: dict[str, list[bool]] = {}
    for doc, ok in zip(documents, right, strict=True):
        out.setdefault(doc.kind, []).extend([] if ok is None else [ok])
    return out


def _failure(completion: Completion) -> str:
    """Why the engine completed nothing; "" when it did."""
    failed = completion.finish in (Finish.ERROR, Finish.ABORT)
    return (completion.error or str(completion.finish)) if failed else ""
