"""Each record of a file is accounted for, and a row shows what of it is trained."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.data.examine import examine_conversations, examine_tasks
from agentcpm_jax.data.sft import SFTDataConfig
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.tokenizer import load_chat
from agentcpm_jax.run.observe.dataset import announce_data, data_tables
from agentcpm_jax.types import Provenance, UserError

ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SKIP = SFTDataConfig(skip_bad=True)


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return load_chat(SHIPPED["shipped:sft"])


def written(folder: Path, *rows: dict | str) -> str:
    path = folder / "data.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return str(path)


def test_each_dropped_record_is_named(chat, tmp_path) -> None:
    untrained = {"messages": [ASK, SAY | {"weight": 0}]}
    long = {"messages": [ASK | {"content": "q " * 200}, SAY]}
    path = written(tmp_path, {"messages": [ASK, SAY]}, "{", untrained, long, {"a": 1})
    rows, found = examine_conversations(path, chat, SKIP, row_length=100)
    assert found.counts == {"kept": 1, "bad": 2, "nothing_trained": 1, "too_long": 1}
    named = zip((2, 3, 4, 5), found.dropped, strict=True)
    assert all(text.startswith(f"{path}:{line}: ") for line, (_, text) in named)
    assert found.lengths == (len(rows[0]),) and found.trained == rows[0].num_trained
    said = "\n".join(found.lines())
    assert said.startswith(f"1 of 5 records of {path} are used; dropped: 2 bad")
    for line in (2, 3, 4, 5):
        assert f"{path}:{line}: " in said
    assert "1 more; launch/data.py check names all" in "\n".join(found.lines(named=1))
    with pytest.raises(UserError, match=r":2: not JSON.*skip_bad"):
        examine_conversations(path, chat, SFTDataConfig())


@pytest.mark.parametrize("seed", range(5))
def test_kept_and_dropped_are_all_records_of_any_mixture(chat, tmp_path, seed: int) -> None:
    rng = random.Random(seed)
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}
    good = [
        {"messages": [ASK, SAY]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "completion": "a"},
    ]
    flawed = {
        "bad": ["{", "[1]", '{"text": "\\ud83d"}', '{"text": "a", "text": "b"}', {"q": "a"}]
        + [{"messages": [ASK, turn]} for turn in (called, SAY | {"mask": 1}, {"role": "x"})]
        + [{"messages": [SAY]}, {"chosen": "a", "rejected": "b"}],
        "nothing_trained": [{"messages": [ASK, SAY | {"train": False}]}],
        "too_long": [{"text": "a " * 300}],
    }
    reasons = rng.choices(["kept", *flawed], k=60)
    rows = [rng.choice(good if reason == "kept" else flawed[reason]) for reason in reasons]
    path = written(tmp_path, *rows)
    trained, found = examine_conversations(path, chat, SKIP, row_length=100)
    assert found.counts == Counter(reasons) and len(trained) == reasons.count("kept")
    wanted = [(r, f"{path}:{line}: ") for line, r in enumerate(reasons, 1) if r != "kept"]
    for (reason, said), (expected, where) in zip(found.dropped, wanted, strict=True):
        assert reason == expected and said.startswith(where) and len(said) > len(where)
    said = "\n".join(found.lines())
    assert said.startswith(f"{len(trained)} of 60 records") and all(w in said for _, w in wanted)
    announced: list[str] = []
    announce_data(tmp_path, found, announced.append)
    assert announced[0] == said.split("\n")[0]
    records, dropped, *_ = data_tables(tmp_path)
    assert set(records.rows) == set(found.counts.items())
    assert len(dropped.rows) <= len(wanted)


def test_a_row_shows_what_is_trained(chat, tmp_path) -> None:
    turns = [ASK, SAY | {"content": "x", "train": False}, ASK, SAY]
    _, found = examine_conversations(written(tmp_path, {"messages": turns}), chat, SKIP)
    text = "\n".join(found.lines())
    assert "[[a<|im_end|>]]" in text and "[[x" not in text
    colored = "\n".join(found.lines(color=True))
    assert "\033[32ma<|im_end|>\033[0m" in colored and "[[" not in colored


def test_what_steers_a_terminal_is_not_shown(chat, tmp_path) -> None:
    turns = [ASK, SAY | {"content": "\x1b[2J\x07"}]
    _, found = examine_conversations(written(tmp_path, {"messages": turns}), chat, SKIP)
    assert not set("\x1b\x07") & set("\n".join(found.lines()))


def test_thoughts_that_the_template_leaves_out_are_noted(tmp_path) -> None:
    from tokenizers import Tokenizer

    from agentcpm_jax.chat.format import template_text

    tokenizer = Tokenizer.from_file(str(SHIPPED["shipped:sft"] / "tokenizer.json"))
    path = written(tmp_path, {"messages": [ASK, SAY | {"thinking": "t"}]})
    for template, noted in (("qwen3-instruct-2507", True), ("qwen3-thinking-2507", False)):
        chat = ChatFormat.from_parts(tokenizer, template_text(template))
        _, found = examine_conversations(path, chat, SKIP)
        assert bool(found.notes) == noted


def test_raw_text_is_trained_without_a_template(chat, tmp_path) -> None:
    text = {"prompt": "the lamp of", "completion": " pier<|im_end|>"}
    (row,), _ = examine_conversations(written(tmp_path, text), chat, SKIP)
    assert row.ids[-1] == chat.im_end_id, "control tokens of rendered text count"
    assert chat.decode(row.ids[row.loss_mask]) == " pier<|im_end|>"


def test_template_variables_reach_the_template(tmp_path) -> None:
    from tokenizers import Tokenizer

    from agentcpm_jax.chat.format import template_text

    tokenizer = Tokenizer.from_file(str(SHIPPED["shipped:sft"] / "tokenizer.json"))
    chat = ChatFormat.from_parts(tokenizer, template_text("qwen3-hybrid"))
    for thinking, empty in ((False, True), (True, False)):
        row = {"messages": [ASK, SAY], "enable_thinking": thinking}
        _, found = examine_conversations(written(tmp_path, row), chat, SKIP)
        context = "".join(piece for piece, trained in found.example if not trained)
        assert ("</think>" in context) == empty


def test_context_turns_are_history(chat) -> None:
    segment = chat.demo_segment([ASK, SAY, ASK, SAY], None, {1})
    wrote = [p for p in segment.provenance if p in (Provenance.HISTORY, Provenance.DEMO)]
    assert wrote[0] == Provenance.HISTORY and wrote[-1] == Provenance.DEMO


def test_half_a_surrogate_is_rendered_as_a_replacement_character(chat) -> None:
    """Tools return such text in rollouts, and models write it."""
    cut = "cut \ud83d"
    ids, _ = chat.delta_tokens([{"role": "tool", "content": cut}])
    whole, _ = chat.delta_tokens([{"role": "tool", "content": "cut \ufffd"}])
    assert ids.tolist() == whole.tolist()
    assert len(chat.prompt_ids([{"role": "user", "content": cut}], [{"name": cut}]))
    assert len(chat.assistant_ids({"role": "assistant", "content": cut}))


def test_tasks_are_accounted_for(tmp_path) -> None:
    good = {"question": "q", "answers": ["a"]}
    found = examine_tasks(written(tmp_path, good, "{", good), skip_bad=True)
    assert found.counts == {"kept": 1, "bad": 1, "duplicate": 1}
    assert [text.split(":")[0] for _, text in found.dropped] == ["line 2", "line 3"]
    with pytest.raises(UserError, match="none of 1 records is usable, the first: bad, line 1"):
        examine_tasks(written(tmp_path, "{"), skip_bad=True).usable()
