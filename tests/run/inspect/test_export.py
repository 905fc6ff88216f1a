"""The exported tables hold what the log holds, bit for bit, and say what they mean."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from agentcpm_jax.run.inspect.columns import TABLES
from agentcpm_jax.run.inspect.export import export_run
from agentcpm_jax.run.inspect.opened import open_run
from agentcpm_jax.run.observe.metrics import read_metrics
from agentcpm_jax.types import UserError
from tests.run.recorded_run import EVIL, STEPS, finished


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export") / "deep" / "out"
    counts = export_run(finished(), directory)
    assert counts == {n: pq.read_metadata(directory / f"{n}.parquet").num_rows for n in TABLES}
    return directory


def test_tokens_are_those_of_the_log(out: Path) -> None:
    table = pq.read_table(out / "tokens.parquet")
    with open_run(finished()) as run:
        for issue in run.log.issues("rl"):
            for t in run.log.load_group(issue.issue_id).trajectories:
                for index, segment in enumerate(t.segments):
                    rows = _where(table, issue_id=issue.issue_id, sample=t.sample, segment=index)
                    np.testing.assert_array_equal(rows["token"], segment.ids)
                    np.testing.assert_array_equal(rows["position"], np.arange(len(segment)))
                    logprob = rows["logprob"].to_numpy(zero_copy_only=False)
                    assert logprob.astype(np.float32).tobytes() == segment.logprob.tobytes()
                    assert rows["logprob"].null_count == int((~segment.sampled).sum())
                    names = rows["provenance"].to_pylist()
                    assert [n == "sampled" for n in names] == segment.sampled.tolist()
                    assert sum(rows["shared"].to_pylist()) == segment.shared_prefix_len


def test_what_was_trained_is_marked_with_its_advantage(out: Path) -> None:
    tokens = pq.read_table(out / "tokens.parquet")
    shipped = pq.read_table(out / "shipped.parquet").to_pylist()
    with open_run(finished()) as run:
        expected = [s for batch in range(STEPS + 1) for s in run.log.shipped("rl", batch)]
    assert len(shipped) == len(expected)
    for row, entry in zip(shipped, expected, strict=True):
        key = {"issue_id": entry.issue_id, "sample": entry.sample, "segment": entry.segment_index}
        assert key == {name: row[name] for name in key}
        trained = entry.segment.sampled & entry.credit.keep
        rows = _where(tokens, **key)
        assert rows["trained"].to_pylist() == trained.tolist()
        assert row["trained_tokens"] == trained.sum()
        assert row["age"] == row["step"] - 1 - entry.segment.version[trained].min()
        advantage = rows["advantage"].to_numpy(zero_copy_only=False)[trained]
        np.testing.assert_array_equal(advantage, entry.credit.advantage[trained])
    assert sum(tokens["trained"].to_pylist()) == sum(r["trained_tokens"] for r in shipped)
    ordinals = [r["ordinal"] for r in shipped if r["step"] == 1]
    assert ordinals == list(range(len(ordinals)))


def test_turns_issues_decisions_and_metrics(out: Path) -> None:
    turns = _where(pq.read_table(out / "turns.parquet"), issue_id=1, sample=1).to_pylist()
    good, malformed = turns[0]["calls"]
    assert json.loads(good["arguments"]) == {"q": EVIL, "<b>": 1} and good["error"] is None
    assert malformed["arguments"] is None and malformed["error"] == "bad_json"
    assert malformed["end"] - malformed["start"] == 3 and turns[0]["flags"] == ["format_error"]
    assert turns[0]["results"] == [{"status": "ok", "content": f"result {EVIL}", "seconds": 0.25}]

    issues = pq.read_table(out / "issues.parquet").to_pylist()
    assert [i["state"] for i in issues].count("shipped") == STEPS + 1
    assert {i["reason"] for i in issues if i["state"] == "dropped"} == {"over_age"}
    assert issues[0]["answers"] == [EVIL, "nobody"] and issues[0]["changed_at"] > 1e9

    decisions = pq.read_table(out / "decisions.parquet").to_pylist()
    assert {d["filter"] for d in decisions if d["issue_id"] == 1} == {"format", "over_age"}

    values = {
        (m["step"], m["name"]): m["value"]
        for m in pq.read_table(out / "metrics.parquet").to_pylist()
    }
    for row in read_metrics(finished() / "rl" / "metrics.jsonl"):
        assert values[row["step"], "train/loss"] == row["train/loss"]


def test_every_column_is_explained(out: Path) -> None:
    readme = (out / "README.md").read_text()
    for name, doc in TABLES.items():
        schema = pq.read_schema(out / f"{name}.parquet")
        assert schema.names == [c.name for c in doc.columns]
        about = json.loads(schema.metadata[b"agentcpm_jax"])
        assert about["row"] == doc.row and about["export_schema"] == 1
        for column in doc.columns:
            said = schema.field(column.name).metadata[b"description"].decode()
            assert said == column.doc and f"| {column.name} | " in readme and said in readme


def test_an_existing_directory_is_left_alone(out: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists; name a directory that does not"):
        export_run(finished(), out)
    with pytest.raises(UserError, match=r"no config\.json"):
        export_run(tmp_path, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def _where(table, **key):
    import pyarrow.compute as pc

    for name, value in key.items():
        table = table.filter(pc.equal(table[name], value))
    return table
