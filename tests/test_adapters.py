"""The names that checks from outside call keep their signatures, and give what the goldens say."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentcpm_jax.files import SHIPPED
from tests import adapters
from tests.golden.rl import compare
from tests.golden.rl.table import TABLE, NotOffered

GOLDEN = Path(__file__).parent / "golden"
TOKENIZER = SHIPPED["shipped:sft"]
SIGNATURES = {
    "render": "tokenizer_dir, template, messages, tools=None, add_generation_prompt=False",
    "sft_rows": "path, tokenizer_dir, template, **options",
    "read_sft": "path",
    "read_tasks": "path",
    "parse": "text, style='qwen'",
    "load": "directory",
    "logits": "directory, ids",
    "advantages": "case",
    "loss": "case",
    "admission": "batch, max_staleness",
    "window": "case",
    "credit": "case",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_stay(name: str) -> None:
    found = inspect.signature(getattr(adapters, name)).parameters.values()
    assert ", ".join(str(p.replace(annotation=p.empty)) for p in found) == SIGNATURES[name]


def test_templates_are_rendered() -> None:
    case = json.loads((GOLDEN / "chat" / "chat_cases.json").read_text())["cases"][0]
    for render in case["renders"]:
        options = dict(render["kwargs"])
        again = options.pop("add_generation_prompt", False)
        if not options:
            arguments = (TOKENIZER, render["template"], case["messages"], case["tools"])
            text = adapters.render(*arguments, add_generation_prompt=again)
            assert text == render["expected_text"]
    with pytest.raises(adapters.UserError):
        adapters.render(TOKENIZER, "", [{"role": "nobody", "content": ""}])


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_conversations_are_read_and_trained(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "sort b a"}, {"role": "assistant", "content": "a b"}]
    path = lines(tmp_path / "sft.jsonl", {"messages": messages}, "{")
    good, bad = adapters.read_sft(path)
    assert [(m["role"], m["content"], m["train"]) for m in good["messages"]] == [
        ("user", "sort b a", False),
        ("assistant", "a b", True),
    ]
    assert bad["line"] == 2 and "not JSON" in bad["message"]
    (text,), dropped = adapters.sft_rows(path, TOKENIZER, "qwen3-instruct-2507", skip_bad=True)
    assert "sort b a<|im_end|>" in text and "[[a b<|im_end|>]]" in text and dropped == {"bad": 1}
    with pytest.raises(adapters.UserError, match=":2: not JSON"):
        adapters.sft_rows(path, TOKENIZER, "qwen3-instruct-2507")
    only_bad = lines(tmp_path / "bad.jsonl", "{")
    assert [record["line"] for record in adapters.read_sft(only_bad)] == [1]
    with pytest.raises(adapters.UserError, match="no such file"):
        adapters.read_sft(tmp_path / "none")


def test_tasks_are_read(tmp_path: Path) -> None:
    path = lines(tmp_path / "tasks.jsonl", {"question": "q", "answers": ["a"]}, {"question": "q"})
    good, bad = adapters.read_tasks(path)
    assert (good["question"], good["answers"]) == ("q", ["a"])
    assert bad["line"] == 2 and "answers" in bad["message"]


def test_calls_are_parsed() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><tool_call>{</tool_call>'
    found = adapters.parse(text + "<answer>b</answer>")
    assert found == {
        "calls": [{"name": "f", "arguments": {"x": 1}}, {"error": "bad_json"}],
        "answer": "b",
    }
    with pytest.raises(adapters.NotOffered):
        adapters.parse(text, style="hermes")


def test_models_are_loaded_and_run() -> None:
    params, config = adapters.load(TOKENIZER)
    assert params["embed"].shape == (config["vocab_size"], config["width"])
    found = adapters.logits(TOKENIZER, [1, 2, 3])
    assert found.shape == (3, config["vocab_size"]) and found.dtype == np.float32
    np.testing.assert_allclose(adapters.logits(TOKENIZER, [1, 2]), found[:2], rtol=1e-5, atol=1e-5)


def test_references_are_computed() -> None:
    """One case each; `train/losses/test_oracle.py` has them all."""
    cases = {case.id.split("__")[0]: case for case in compare.load()}
    for call, name in ((adapters.loss, "verl_cispo"), (adapters.advantages, "verl_grpo_std")):
        got = call(cases[name])
        assert got and compare.check(cases[name], lambda inputs, params, got=got: got) == {}
    (missing, *_) = [name for name, entry in TABLE.items() if isinstance(entry, NotOffered)]
    with pytest.raises(adapters.NotOffered):
        adapters.loss(cases[missing])
    for later in (adapters.window, adapters.credit):
        with pytest.raises(adapters.NotOffered):
            later({})


def test_admission_has_the_budget() -> None:
    assert adapters.admission(4, 2).get_capacity() == 12
