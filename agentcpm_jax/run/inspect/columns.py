"""The tables of an export: what each column means and which Arrow type it has."""

from __future__ import annotations

from dataclasses import dataclass

EXPORT_SCHEMA = 1  # increased when a column changes its meaning or is removed

INT, FLOAT, TEXT, BOOL = "int64", "float64", "string", "bool"
CALLS = "calls"  # list<struct<name, arguments (JSON), error, message, start, end>>
RESULTS = "results"  # list<struct<status, content, seconds>>
TEXTS = "list<string>"


@dataclass(frozen=True)
class Column:
    """`type` is one of the constants above or an Arrow type's name."""

    name: str
    type: str
    doc: str


@dataclass(frozen=True)
class TableDoc:
    """A table; `row` names what one of its rows is."""

    row: str
    columns: tuple[Column, ...]


_ISSUE = Column("issue_id", INT, "Issue: one task handed out once, one group of samples")
_SAMPLE = Column("sample", INT, "Index of the sample in its group, from 0")
_ATTEMPT = Column("attempt", INT, "Attempt at the sample, from 0; the last one counts")
_SEGMENT = Column("segment", INT, "Index of the segment in its trajectory")

TABLES: dict[str, TableDoc] = {
    "issues": TableDoc(
        "issue",
        (
            _ISSUE,
            Column("stage", TEXT, "Stage of the run; of evaluations stage/model/decoding"),
            Column("kind", TEXT, "train or eval"),
            Column("task_uid", TEXT, "Hash of the task's content"),
            Column("question", TEXT, "The question"),
            Column("answers", TEXTS, "Accepted answers"),
            Column("task_kind", TEXT, "Kind of the task, e.g. hop2"),
            Column("epoch", INT, "Pass over the tasks, from 0"),
            Column("ordinal", INT, "Index in the stage's task sequence"),
            Column("batch", INT, "Batch it was issued for, from 0 (deterministic mode only)"),
            Column("state", TEXT, "issued, ready, shipped, dropped or done"),
            Column("reason", TEXT, "Why it was dropped; empty otherwise"),
            Column("issued_at", FLOAT, "Seconds since 1970"),
            Column("changed_at", FLOAT, "Seconds since 1970 of the last change of state"),
        ),
    ),
    "trajectories": TableDoc(
        "attempt at a sample",
        (
            _ISSUE,
            _SAMPLE,
            _ATTEMPT,
            Column("last", BOOL, "Whether this is the sample's last attempt, the one that counts"),
            Column("stop", TEXT, "Why the episode ended"),
            Column("verdict", TEXT, "right, wrong or unknown"),
            Column("reward", FLOAT, "Null when the verdict is unknown"),
            Column("answer", TEXT, "The answer given; null for none"),
            Column("error", TEXT, "What failed, in words; usually empty"),
            Column("trainable", BOOL, "False when only its text is known, not its tokens"),
            Column("num_segments", INT, "Bit-exact prefix chains of tokens"),
            Column("num_turns", INT, "Completions that were sampled"),
            Column("num_tokens", INT, "Tokens, prefixes shared by segments counted once"),
            Column("oldest_version", INT, "Of its sampled tokens; -1 without any"),
            Column("newest_version", INT, "Of its sampled tokens; -1 without any"),
            Column("seconds", FLOAT, "Wall time of the episode"),
        ),
    ),
    "turns": TableDoc(
        "turn of an attempt",
        (
            _ISSUE,
            _SAMPLE,
            _ATTEMPT,
            Column("turn", INT, "Index of the turn, from 0"),
            Column("segment", INT, "Segment whose tokens the turn's positions count"),
            Column("start", INT, "First token that the turn showed to the policy"),
            Column("sample_start", INT, "First token that the policy sampled"),
            Column("end", INT, "One past its last token"),
            Column("flags", TEXTS, "format_error, repeated, truncated, no_call"),
            Column("calls", CALLS, "Tool calls; start and end are positions, -1 when not located"),
            Column("results", RESULTS, "What the tools answered, in the order of the calls"),
        ),
    ),
    "tokens": TableDoc(
        "token of a segment of an attempt",
        (
            _ISSUE,
            _SAMPLE,
            _ATTEMPT,
            _SEGMENT,
            Column("position", "int32", "Index in the segment, from 0"),
            Column("token", "int32", "Token id of the run's tokenizer"),
            Column("provenance", TEXT, "template, sampled, demo, history, tool or injected"),
            Column("shared", BOOL, "Belongs to the prefix shared with the parent segment"),
            Column("logprob", "float32", "Nats, under the policy that sampled it; null elsewhere"),
            Column("version", "int32", "Of that policy; null where not sampled"),
            Column("trained", BOOL, "Whether a shipped batch trains it here"),
            Column("advantage", "float32", "As trained; null where not trained"),
        ),
    ),
    "shipped": TableDoc(
        "segment of a batch, in the order in which it is packed",
        (
            Column("stage", TEXT, "RL stage"),
            Column("step", INT, "Step of metrics, from 1: batch n is trained in step n + 1"),
            Column("ordinal", INT, "Place in the batch"),
            _ISSUE,
            _SAMPLE,
            _SEGMENT,
            Column("trained_tokens", INT, "Tokens that it trains"),
            Column("age", INT, "Batch minus the version of its oldest trained token"),
        ),
    ),
    "decisions": TableDoc(
        "decision of a filter",
        (
            Column("decision_id", INT, "In the order in which they were made"),
            _ISSUE,
            Column("sample", INT, "Null: about the whole group"),
            Column("filter", TEXT, "Name of the filter"),
            Column("reason", TEXT, "Why"),
        ),
    ),
    "metrics": TableDoc(
        "figure of a step",
        (
            Column("stage", TEXT, "Stage; the phases of a pretraining stage are stage/phaseN"),
            Column("step", INT, "Completed steps, from 1"),
            Column("name", TEXT, "group/name"),
            Column("value", FLOAT, "Null: not finite"),
        ),
    ),
}


def readme(title: str, counts: dict[str, int]) -> str:
    """The tables and their columns as Markdown."""
    out = [f"# {title}", "", f"Tables of export schema {EXPORT_SCHEMA}, one Parquet file each. The",
           "same words stand in each file: `pyarrow.parquet.read_schema(f).field(c).metadata`.",
           "`issue_id`, `sample`, `attempt` and `segment` join them.", ""]  # fmt: skip
    for name, table in TABLES.items():
        out += [f"## {name}.parquet", "", f"One row is one {table.row}; {counts[name]:,} rows.", ""]
        out += ["| column | type | meaning |", "|---|---|---|"]
        out += [f"| {c.name} | {_shown(c.type)} | {c.doc} |" for c in table.columns]
        out.append("")
    return "\n".join(out)


def _shown(kind: str) -> str:
    structs = {
        CALLS: "list of {name, arguments (JSON), error, message, start, end}",
        RESULTS: "list of {status, content, seconds}",
    }
    return structs.get(kind, kind)
