"""The contract suite against the fault-injecting toy: the fake keeps the contract it breaks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.tokenizer import load_chat
from tests.doubles.fault_server import FaultServer, ToyEngine
from tests.doubles.toy_pool import Servers, toy_logprobs, toy_weights
from tests.pool.contract_suite import *  # noqa: F403
from tests.pool.contract_suite import Subject
from tests.pool.served_models import other_model

VOCABULARY = 544


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Iterator[Subject]:
    root, running = tmp_path_factory.mktemp("toy"), Servers()
    chat = load_chat(SHIPPED["shipped:sft"])
    engine = ToyEngine(VOCABULARY, 1024)
    url = running.start(FaultServer(engine, chunk=4, chat=chat))

    def logprobs(weights: str):
        return lambda ids: toy_logprobs(np.asarray(ids), weights, VOCABULARY)

    yield Subject(
        url=url,
        context=1024,
        vocab_size=VOCABULARY,
        weights=(toy_weights(root, "w0"), toy_weights(root, "w1")),
        logprobs=(logprobs("w0"), logprobs("w1")),
        chat=chat,
        max_gap=1e-6,
        exact_in_place=True,
        other_model=other_model(root),
    )
    running.close()
