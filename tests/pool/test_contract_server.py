"""The contract suite against our own server: the JAX engine behind SGLang's protocol, float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.engine.server import EngineServer, ServerConfig
from agentcpm_jax.engine.serving import ServedLocal
from agentcpm_jax.hf.tokenizer import load_chat
from tests.doubles.toy_pool import Servers
from tests.pool.contract_suite import *  # noqa: F403
from tests.pool.contract_suite import PROMPT, Subject, refused_and_harmless
from tests.pool.served_models import (
    CONTEXT,
    FIRST,
    VOCABULARY,
    other_model,
    trainer_logprobs,
    two_weights,
)


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Iterator[Subject]:
    weights = two_weights(tmp_path_factory.mktemp("weights"))
    cfg = EngineConfig(slots=8, capacity=CONTEXT, row_buckets=(), token_buckets=(32,))
    served, chat, running = ServedLocal(str(FIRST), cfg), load_chat(FIRST), Servers()
    front = EngineServer(
        served, ServerConfig(port=0), chunk=16, chat=chat, model=served.describe(str(FIRST))
    )
    yield Subject(
        url=running.start(front),
        context=CONTEXT,
        vocab_size=VOCABULARY,
        weights=weights,
        logprobs=(trainer_logprobs(weights[0]), trainer_logprobs(weights[1])),
        chat=chat,
        max_gap=1e-5,
        exact_in_place=True,
        other_model=other_model(tmp_path_factory.mktemp("other")),
    )
    running.close()
    served.close()


def test_a_longer_prompt_finds_the_shorter_one_in_the_cache(subject: Subject) -> None:
    subject.post("/flush_cache", {})
    first = subject.generate(24)
    longer = [*PROMPT, *first["output_ids"], 60, 70]
    assert first["meta_info"]["cached_tokens"] == 0
    again = subject.generate(8, input_ids=longer)
    assert again["meta_info"]["cached_tokens"] == len(longer) - 3
    subject.post("/flush_cache", {})
    fresh = subject.generate(8, input_ids=longer)
    assert fresh["meta_info"]["cached_tokens"] == 0
    assert fresh["output_ids"] == again["output_ids"]


def test_weights_of_another_shape_are_refused_and_harmless(subject: Subject) -> None:
    refused_and_harmless(subject, subject.other_model)
