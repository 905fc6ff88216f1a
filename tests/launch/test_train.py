"""The command as its user meets it: every mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agentcpm_jax.run.commandline import CHECKOUT, parse
from agentcpm_jax.run.start.owner import owned
from agentcpm_jax.run.start.resume import claim

sys.path.insert(0, str(CHECKOUT / "launch"))
import train as launch_train

BASE = CHECKOUT / "agentcpm_jax" / "assets" / "tiny_base"
SFT = "--config=configs/sft_qwen3_4b.py:runlocal"
RL = "--config=configs/rl_qwen3_4b.py:runlocal"


@pytest.fixture
def fails(tmp_path, capsys, monkeypatch) -> Callable[..., str]:
    """Run the command in an empty directory; it must fail as a user error. Returns its line."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, started: bool = False) -> str:
        code = launch_train.main([*argv, "--workdir=work"])
        stderr = capsys.readouterr().err
        lines = [line for line in stderr.replace("\r", "\n").split("\n") if "error: " in line]
        assert code == 2 and len(lines) == 1, stderr
        assert "Traceback" not in stderr
        if not started:
            assert not (tmp_path / "work").exists(), "something was written"
        return lines[0]

    return run


def test_unknown_key(fails) -> None:
    assert "rowz" in fails(SFT, "--config.stage.sft.shape.rowz=2")


def test_missing_file(fails) -> None:
    line = fails(SFT, "--config.stage.sft.data.path=absent.jsonl")
    assert "absent.jsonl" in line


def test_corrupt_line_is_numbered_and_the_rest_usable_by_flag(fails, tmp_path, capsys) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    lines = [json.dumps(good)] * 8
    (tmp_path / "data.jsonl").write_text("\n".join([*lines, "{broken", *lines]) + "\n")
    flags = [SFT, "--config.stage.sft.data.path=data.jsonl", "--config.stage.sft.shape.steps=1"]
    line = fails(*flags)
    assert "data.jsonl:9" in line and "skip_bad" in line
    flags += ["--config.stage.sft.data.skip_bad=True", "--workdir=work"]
    flags += ["--config.stage.sft.epochs=2"]  # 16 rows of one batch: two steps
    assert launch_train.main(flags) == 0
    row, last = map(json.loads, (tmp_path / "work/sft/metrics.jsonl").read_text().splitlines())
    assert last["step"] == 2
    assert row["sft/rows_kept"] == 16 and row["sft/rows_bad"] == 1


def test_tasks_without_answers(fails, tmp_path) -> None:
    (tmp_path / "tasks.jsonl").write_text('{"question": "why?", "answers": []}\n')
    line = fails(RL, "--config.stage.rl.tasks_path=tasks.jsonl")
    assert "tasks.jsonl, line 1" in line and "answer" in line


def test_impossible_mesh(fails) -> None:
    line = fails(SFT, "--config.mesh.tensor=2")
    assert "tensor 2" in line and "1 device" in line


def test_prompt_longer_than_context(fails) -> None:
    line = fails(RL, "--config.episode.max_context=20", started=True)
    assert "max_context is 20" in line


def test_context_beyond_the_engines_capacity(fails) -> None:
    line = fails(RL, "--config.stage.rl.engine.capacity=128")
    assert "384" in line and "128" in line


def test_truncated_and_mismatched_checkpoints(fails, tmp_path) -> None:
    shutil.copytree(BASE, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    line = fails(SFT, "--config.stage.sft.init_from=cut")
    assert "model.safetensors" in line
    line = fails(SFT, f"--config.stage.sft.init_from={BASE}", "--config.model.width=64")
    assert "128" in line and "64" in line
    assert "nowhere" in fails(SFT, "--config.stage.sft.init_from=nowhere")


def test_a_small_vocabulary_is_refused(fails) -> None:
    assert "542" in fails(SFT, "--config.model.vocab_size=100")


def test_help_and_no_arguments(capsys) -> None:
    assert launch_train.main(["--help"]) == 0
    assert "--config=configs/quickstart.py" in capsys.readouterr().out
    assert launch_train.main([]) == 2
    assert "--config=FILE" in capsys.readouterr().err


HEAVY = {
    *("jax", "jaxlib", "flax", "optax", "grain", "orbax", "chex", "sqlalchemy", "httpx"),
    *("aiohttp", "tokenizers", "transformers", "safetensors", "jinja2"),
}
MISTAKEN = f"""
import sys
sys.path.insert(0, {str(CHECKOUT / "launch")!r})
code = __import__(sys.argv[1]).main(sys.argv[2:])
print(*{{name.split(".")[0] for name in sys.modules}})
sys.exit(code)
"""


REFUSED = [
    ["--config=configs/quickstart.py", "--config.stage.rl.optimizer.lrr=1"],
    ["--config=configs/rl_qwen3_4b.py", "--config.stage.rl.loss.name=ppo2"],
    ["--config=configs/quickstart.py", "--wrokdir=x"],
    ["--config=nofile.py"],
    ["--config=configs/quickstart.py:smok"],
    ["--config=configs/tiny.py", "--config.stage.rl.shape.row_length=192", "--doctor"],
    ["--config=configs/tiny.py", "--config.stage.rl.shape.checkpoint_every=0"],
    ["--config=configs/tiny.py", "--explain", "--slice=v5p32"],
    ["--config=configs/tiny.py", "--workdir={resumed}", "--config.seed=1"],
    ["--config=configs/tiny.py", "--workdir={owned}"],
    ["--config=configs/tiny.py", "--workdir={file}/run"],
    ["--config=configs/tiny.py", "--config.stage.rl.tasks_path=absent.jsonl"],
    ["--config=configs/tiny.py", "--config.stage.rl.tasks_path={empty}"],
    ["--config=configs/tiny.py", "--config.stage.rl.tasks_path={file}"],
    [SFT, "--config.stage.sft.data.path=absent.jsonl"],
    ["--config=configs/quickstart.py", "--config.stage.eval.tasks_path=absent.jsonl"],
    ["--config=configs/quickstart.py", "--config.stage.merge.validation.tasks_path=absent.jsonl"],
    ["--config=configs/tiny.py", "--config.stage.rl.grader=exakt"],
    ["--config=configs/tiny.py", "--config.stage.rl.grader=nowhere:reward", "--doctor"],
    ["--config=configs/tiny.py", "--config.tools=('nowhere:tool',)", "--explain"],
    ["--config=configs/quickstart.py", "--config.stage.merge.validation.grader=exakt"],
    ["--config=configs/tiny.py", "--config.stage.rl.grader=judge"],
]


@pytest.mark.parametrize("argv", REFUSED)
@pytest.mark.parametrize("script", ["train", "rollout_worker"])
def test_a_refusal_imports_nothing_heavy(argv: list[str], script: str, tmp_path: Path) -> None:
    """What it imports decides how soon it answers, on whatever machine."""
    claim(parse(["--config=configs/tiny.py"]).config, tmp_path / "resumed")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    places = {name: tmp_path / name for name in ("resumed", "owned", "empty", "file")}
    with owned(tmp_path / "owned"):
        done = mistaken(script, *(word.format(**places) for word in argv))
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1
    assert HEAVY & set(done.stdout.split()) == set()


ARRAYS = {"jax", "jaxlib", "flax", "optax", "grain", "orbax", "chex"}


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("train", ["--config=configs/tiny.py", "--config.episode.max_context=20"]),
        ("train", ["--config=configs/tiny.py", "--config.stage.rl.init_from=nowhere"]),
        ("train", ["--config=configs/tiny.py", "--config.tokenizer=nowhere"]),
        ("train", [SFT, "--config.model.vocab_size=100"]),
        ("merge", ["absent.yaml", "out"]),
        ("convert", ["absent", "out"]),
        ("serve", ["absent"]),
        ("serve", ["absent", "--slots=0"]),
        ("data", ["check", "absent.jsonl"]),
        ("data", ["check", "absent.jsonl", "--tasks"]),
        ("data", ["check", "absent.jsonl", "--tokenizer=absent"]),
        ("inspect_run", ["replay", "absent", "--step=1"]),
        ("inspect_run", ["why", "absent", "1"]),
        ("inspect_run", ["export", "absent", "out"]),
        ("inspect_run", ["wy", "absent", "1"]),
        ("pool_agent", ["--source=/absent", "--directory=/proc/absent/weights"]),
    ],
)
def test_every_launcher_refuses_without_jax(script: str, argv: list[str], tmp_path: Path) -> None:
    done = mistaken(script, *argv, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []
    assert ARRAYS & set(done.stdout.split()) == set()


@pytest.mark.parametrize("argv", REFUSED[:4])
def test_a_mistake_is_answered_at_once(argv: list[str]) -> None:
    """In at most 1 s of CPU (0.5 s in November 2026)."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert mistaken("train", *argv).returncode == 2
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if seconds[-1] <= 1.0:
            break
    assert min(seconds) <= 1.0, seconds


def mistaken(script: str, *argv: str, cwd: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    """A launcher in a process of its own, which prints what it has imported."""
    command = [sys.executable, "-c", MISTAKEN, script, *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_merge_command_reports_a_missing_recipe(tmp_path: Path, capsys) -> None:
    import merge as launch_merge

    assert launch_merge.main([str(tmp_path / "none.yaml"), str(tmp_path / "out")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
