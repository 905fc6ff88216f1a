"""What every server of a pool must do: the same test bodies for ours, a real SGLang and the toy.

A `Subject` is a running server with two sets of weights and the trainer's view of both. The test
files `test_contract_*.py` import these functions and provide one.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.pool.probe import Logprobs, Trainer
from agentcpm_jax.pool.servers import PoolConfig, SGLangPool
from agentcpm_jax.rollout.policy import Completion, Finish, SampleRequest, SamplingParams
from agentcpm_jax.types import UserError

PROMPT = [10, 20, 30, 40, 50]
LONG = 600  # tokens of a request that is to be interrupted


@dataclass(frozen=True)
class Subject:
    """`weights[i]` is a directory; `logprobs[i]` what the trainer says under it."""

    url: str
    context: int
    vocab_size: int
    weights: tuple[str, str]
    logprobs: tuple[Logprobs, Logprobs]
    chat: ChatFormat
    max_gap: float  # nats; see `agree`
    exact_in_place: bool  # whether tokens after an in-place update are the new model's
    other_model: str  # a directory of another model, which the server must not take

    def post(self, path: str, body: dict[str, Any], timeout: float = 240.0) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=timeout, trust_env=False)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=240.0, trust_env=False)

    def generate(self, new: int = 8, temperature: float = 0.0, **changes: Any) -> dict[str, Any]:
        answer = self.post("/generate", body(new, temperature, **changes))
        assert answer.status_code == 200, answer.text
        return answer.json()

    def load(self, index: int, version: str, flush: bool = True) -> None:
        update = {"model_path": self.weights[index], "weight_version": version}
        answer = self.post("/update_weights_from_disk", update | {"flush_cache": flush})
        assert (answer.status_code, answer.json()["success"]) == (200, True), answer.text


def body(new: int, temperature: float = 0.0, **changes: Any) -> dict[str, Any]:
    params = {"max_new_tokens": new, "temperature": temperature, "ignore_eos": True}
    sampling = params | changes.pop("sampling_params", {})
    request = {"input_ids": PROMPT, "return_logprob": True, "sampling_params": sampling}
    return request | changes


def check(subject: Subject, answer: dict[str, Any], names: dict[str, int]) -> np.ndarray:
    """An answer's spans and lengths; |log-prob - trainer's| (nats) of each of its tokens.

    `names`: version -> index of the weights.
    """
    ids, meta = answer["output_ids"], answer["meta_info"]
    rows = meta["output_token_logprobs"]
    assert [row[1] for row in rows] == ids and len(ids) == meta["completion_tokens"]
    spans = meta["weight_versions"]
    assert [s["start"] for s in spans] == [0, *(s["end"] for s in spans[:-1])]
    assert spans[-1]["end"] == len(ids)
    assert meta["weight_version"] == spans[-1]["version"]
    assert all(a["version"] != b["version"] for a, b in pairwise(spans))
    text, gaps = np.asarray([*PROMPT, *ids], np.int32), []
    for span in spans:
        expected = subject.logprobs[names[span["version"]]](text)[len(PROMPT) :]
        for i in range(span["start"], span["end"]):
            gaps.append(abs(rows[i][0] - float(expected[i])))
    return np.asarray(gaps)


def check_gaps(subject: Subject, gaps: np.ndarray) -> None:
    """Fails, with the worst of them, unless `agree`."""
    assert agree(subject, gaps), f"of {len(gaps)} tokens: {np.sort(gaps)[-5:]}"


def agree(subject: Subject, gaps: np.ndarray) -> bool:
    """Whether log-probabilities are the trainer's under the version they are said to be of.

    These are two float32 forward passes: about one sampled token in five thousand differs by more
    than `max_gap`, as each of the two differs from float64. So one token in a hundred, and one of
    any answer, may differ by up to ten times `max_gap`. Another version differs by whole nats.
    """
    beyond = int((gaps > subject.max_gap).sum())
    return beyond <= max(1, len(gaps) // 100) and bool(gaps.max() <= 10 * subject.max_gap)


@contextmanager
def in_flight(subject: Subject, new: int = LONG, **changes: Any) -> Iterator[list[dict[str, Any]]]:
    """A streamed request that is known to have sampled something; its answers, last one last."""
    answers: list[dict[str, Any]] = []
    begun = threading.Event()

    def read() -> None:
        request = body(new, 1.0, stream=True, **changes)
        try:
            with httpx.stream(
                "POST", subject.url + "/generate", json=request, timeout=300, trust_env=False
            ) as stream:
                for line in stream.iter_lines():
                    if line.startswith("data: {"):
                        answers.append(json.loads(line[6:]))
                        begun.set()
        finally:
            begun.set()

    thread = threading.Thread(target=read)
    thread.start()
    begun.wait()
    try:
        yield answers
    finally:
        thread.join()


# --- the protocol ---------------------------------------------------------------------------


def test_information(subject: Subject) -> None:
    info = subject.get("/model_info").json()
    assert info["is_generation"] is True and isinstance(info["weight_version"], str)
    arguments = subject.get("/server_info").json()
    assert arguments["context_length"] == subject.context
    assert subject.get("/v1/models").json()["data"]
    for path in ("/health", "/health_generate"):
        assert subject.get(path).status_code == 200


def test_ids_logprobs_and_versions_belong_together(subject: Subject) -> None:
    subject.load(0, "c-0")
    for temperature in (0.0, 1.0):
        answer = subject.generate(24, temperature, rid=f"together/{temperature}/")
        assert answer["meta_info"]["id"] == f"together/{temperature}/"
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 24}
        assert answer["meta_info"]["prompt_tokens"] == len(PROMPT)
        check_gaps(subject, check(subject, answer, {"c-0": 0}))


def test_greedy_is_reproducible_and_stop_ids_end_it(subject: Subject) -> None:
    subject.load(0, "c-0")
    ids = subject.generate(12)["output_ids"]
    assert subject.generate(12)["output_ids"] == ids
    stop = ids[5]
    params = {"stop_token_ids": [stop], "ignore_eos": False}
    stopped = subject.generate(12, sampling_params=params)
    assert stopped["output_ids"] == ids[: ids.index(stop) + 1]
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_the_tightest_restrictions_are_greedy(subject: Subject) -> None:
    subject.load(0, "c-0")
    greedy = subject.generate(12)["output_ids"]
    for tight in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        answer = subject.generate(12, 1.0, sampling_params=tight)
        assert answer["output_ids"] == greedy, tight


def test_stop_strings_leave_the_text_and_stay_in_the_ids(subject: Subject) -> None:
    subject.load(0, "c-0")
    plain = subject.generate(16)
    needle = subject.chat.decode(plain["output_ids"])[3:6]
    stopped = subject.generate(16, sampling_params={"stop": [needle]})
    ids = stopped["output_ids"]
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": needle}
    assert ids == plain["output_ids"][: len(ids)]
    assert needle in subject.chat.decode(ids) and needle not in subject.chat.decode(ids[:-1])
    assert needle not in stopped["text"]


def test_bad_requests_are_refused_with_a_message(subject: Subject) -> None:
    for bad in (
        {"input_ids": []},
        {"input_ids": [1] * (subject.context + 1)},
        body(subject.context),
    ):
        answer = subject.post("/generate", bad)
        assert answer.status_code == 400, (bad, answer.text)
        assert answer.json()["error"]["message"]
    assert subject.generate(2)["output_ids"]  # it is still there


def test_a_stream_adds_up_and_its_last_part_has_the_spans(subject: Subject) -> None:
    subject.load(0, "c-0")
    with in_flight(subject, 48) as answers:
        pass
    lengths = [len(a["output_ids"]) for a in answers]
    assert lengths == sorted(lengths) and lengths[-1] == 48
    check_gaps(subject, check(subject, answers[-1], {"c-0": 0}))


def test_text_is_read_as_the_trainer_reads_it(subject: Subject) -> None:
    found = subject.post("/tokenize", {"prompt": "who wrote it", "add_special_tokens": False})
    assert found.json()["tokens"] == subject.chat.encode_text("who wrote it").tolist()
    messages = [{"role": "user", "content": "who wrote it"}]
    found = subject.post("/tokenize", {"messages": messages})
    assert found.json()["tokens"] == subject.chat.prompt_ids(messages).tolist()


def test_a_chat_has_tools_usage_and_versions(subject: Subject) -> None:
    subject.load(0, "c-0")
    messages = [{"role": "user", "content": "who wrote it"}]
    parameters = {"type": "object", "properties": {"query": {"type": "string"}}}
    function = {"name": "search", "description": "Find pages.", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    request = {"model": "m", "messages": messages, "tools": tools, "max_tokens": 12}
    answer = subject.post("/v1/chat/completions", request | {"temperature": 0.0})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    # Not compared with the trainer's own: SGLang 0.5.23 adds a key of its own to every tool it
    # shows. Rollouts send ids and are not concerned.
    prompt = subject.post("/tokenize", {"messages": messages, "tools": tools}).json()
    assert found["usage"]["prompt_tokens"] == prompt["count"]
    assert found["choices"][0]["message"]["role"] == "assistant"
    assert found["choices"][0]["finish_reason"] in ("stop", "length", "tool_calls")
    assert found["metadata"]["weight_version"] == "c-0"


# --- weights and interruptions ----------------------------------------------------------------


def test_an_update_changes_weights_and_version(subject: Subject) -> None:
    for index in (1, 0):
        subject.load(index, f"u-{index}")
        assert subject.get("/model_info").json()["weight_version"] == f"u-{index}"
        check_gaps(subject, check(subject, subject.generate(16), {f"u-{index}": index}))
    wrong = check(subject, subject.generate(16), {"u-0": 1})
    assert wrong.max() > 100 * subject.max_gap, "the two sets of weights must differ"


def test_an_update_from_nowhere_is_refused_and_harmless(subject: Subject) -> None:
    refused_and_harmless(subject, subject.weights[0] + "-is-not-there")


def refused_and_harmless(subject: Subject, path: str) -> None:
    subject.load(0, "c-0")
    update = {"model_path": path, "weight_version": "c-9"}
    answer = subject.post("/update_weights_from_disk", update)
    assert (answer.status_code, answer.json()["success"]) == (400, False)
    assert subject.get("/model_info").json()["weight_version"] == "c-0"
    check_gaps(subject, check(subject, subject.generate(8), {"c-0": 0}))


def test_abort_returns_what_there_is(subject: Subject) -> None:
    subject.load(0, "c-0")
    with in_flight(subject, rid="abort/1/") as answers:
        subject.post("/abort_request", {"rid": "abort/1/"})
    last = answers[-1]
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(last["output_ids"]) < LONG
    check_gaps(subject, check(subject, last, {"c-0": 0}))


def test_pause_abort_ends_requests_and_holds_new_ones(subject: Subject) -> None:
    subject.load(0, "c-0")
    held: list[dict[str, Any]] = []
    with in_flight(subject) as answers:
        subject.post("/pause_generation", {"mode": "abort"})
    assert answers[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    waiting = threading.Thread(target=lambda: held.append(subject.generate(4)))
    waiting.start()
    subject.load(1, "c-1")
    assert not held
    subject.post("/continue_generation", {})
    waiting.join()
    check_gaps(subject, check(subject, held[0], {"c-1": 1}))


def test_retract_splits_a_request_exactly(subject: Subject) -> None:
    check_gaps(subject, split_by_update(subject, "retract"))


def test_in_place_is_exact_only_without_old_keys_and_values(subject: Subject) -> None:
    assert agree(subject, split_by_update(subject, "in_place")) == subject.exact_in_place


def split_by_update(subject: Subject, mode: str) -> np.ndarray:
    """A request that lives through an update; the gaps of its tokens, as `check` gives them."""
    subject.load(0, "s-0")
    with in_flight(subject) as answers:
        subject.post("/pause_generation", {"mode": mode})
        try:
            subject.load(1, "s-1", flush=mode != "in_place")
        finally:
            subject.post("/continue_generation", {})
    spans = answers[-1]["meta_info"]["weight_versions"]
    assert [s["version"] for s in spans] == ["s-0", "s-1"]
    assert len(answers[-1]["output_ids"]) == LONG
    return check(subject, answers[-1], {"s-0": 0, "s-1": 1})


def test_an_idle_cache_can_be_flushed(subject: Subject) -> None:
    assert subject.post("/flush_cache", {}).status_code == 200


# --- the pool over it -------------------------------------------------------------------------


def test_the_pool_verifies_samples_updates_and_resumes(subject: Subject) -> None:
    """Three updates while 24 requests run, in the modes that promise exactness."""
    for mode in ("abort", "retract"):
        gaps, done, figures = pool_run(subject, [subject.url], mode)
        check_gaps(subject, gaps)
        assert figures["pool/uncertain_tokens"] == 0
        assert len({v for c in done for v in c.versions.tolist()}) >= 2


def test_the_pool_refuses_a_server_of_another_model(subject: Subject) -> None:
    """One line, nothing sampled, the server unharmed: real ones do not survive such weights."""
    subject.load(0, "c-0")
    pool = SGLangPool(PoolConfig(urls=(subject.url,), max_gap=1e-4), "suite-wrong")
    config = json.loads((Path(subject.other_model) / "config.json").read_text())
    trainer = Trainer(subject.vocab_size, subject.chat, subject.logprobs[0], config=config)
    with pytest.raises(UserError, match=f"wrong model on {subject.url}: ") as error:
        pool.start(trainer, 0, subject.other_model)
    pool.close()
    assert "\n" not in str(error.value) and pool.counters.tokens == 0
    check_gaps(subject, check(subject, subject.generate(8), {"c-0": 0}))


def pool_run(
    subject: Subject, urls: list[str], mode: str, router: str = ""
) -> tuple[np.ndarray, list[Completion], dict[str, float]]:
    """Samples under updates; |log-prob - trainer's| (nats) of every token under its version."""
    cfg = replace(
        PoolConfig(urls=tuple(urls), router_url=router, health_every=5.0, max_gap=1e-4),
        pause=mode,  # type: ignore[arg-type]
    )
    pool = SGLangPool(cfg, f"suite-{mode}-{len(urls)}")
    trainer = Trainer(subject.vocab_size, subject.chat, subject.logprobs[0])
    rng = np.random.default_rng(3)
    asked = [
        SampleRequest(
            f"{i}-0-0/0/",
            rng.integers(0, subject.vocab_size, 6).astype(np.int32),
            int(rng.integers(40, 160)),
            SamplingParams(1.0, (), (i,)),
            deadline=240.0,
        )
        for i in range(24)
    ]

    async def together() -> list[Completion]:
        tasks = []
        for version in (1, 2, 3, None):  # the last quarter begins under the last version
            quarter = asked[len(tasks) : len(tasks) + 6]
            tasks += [asyncio.create_task(pool.sample(r)) for r in quarter]
            if version is not None:
                results = await asyncio.to_thread(
                    pool.update_weights, version, subject.weights[version % 2]
                )
                assert set(results.values()) == {""}, results
        return list(await asyncio.gather(*tasks))

    try:
        pool.start(trainer, 0, subject.weights[0])
        done = asyncio.run(together())
        figures = pool.snapshot()
    finally:
        pool.close()
    gaps = []
    for r, c in zip(asked, done, strict=True):
        assert (c.finish, c.error, len(c.ids)) == (Finish.LENGTH, "", r.max_new_tokens)
        text, start = np.concatenate([r.prompt_ids, c.ids]), len(r.prompt_ids)
        for version in np.unique(c.versions):
            expected = subject.logprobs[int(version) % 2](text)[start:]
            mine = c.versions == version
            gaps.append(np.abs(c.logprobs - expected)[mine])
    return np.concatenate(gaps), done, figures
