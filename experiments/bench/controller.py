"""What the controller costs: CPU per turn with 256 episodes in flight.

    python experiments/bench/controller.py            # about a minute on two quiet cores

The product's own parts from the stream down: `Stream`, group repair, `run_episode` (template,
tokeniser, parser, tool calls), filters and credit, and the experience log on disk. Only the model
and the tool's back end are stand-ins: a scripted policy that answers after a random delay with a
short thought and a tool call, and a tool that returns a text of 500 tokens. 32 groups of 8 samples
run at once, 16 turns each. CPU is that of the whole process, all threads, from the first group to
the last batch; start-up is left out.

Writes experiments/results/controller.{json,md}; exits 1 when a turn costs more than 5 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import tokenizers

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.tokenizer import load_chat
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.rewards.advantages import AdvantageConfig
from agentcpm_jax.rewards.denoise import DenoiseConfig
from agentcpm_jax.rollout.config import EpisodeConfig, StreamConfig
from agentcpm_jax.rollout.policy import Completion, SampleRequest, Scripted
from agentcpm_jax.rollout.stream import Stream
from agentcpm_jax.run.sampling import make_finish, make_run_sample
from agentcpm_jax.types import Task, ToolResult, ToolStatus
from agentcpm_jax.world.graph import WorldConfig
from agentcpm_jax.world.pages import page_text
from agentcpm_jax.world.search import search_index
from agentcpm_jax.world.tools import SCHEMAS

GROUPS, SAMPLES = 32, 8  # 256 episodes in flight
TURNS, OBSERVATION = 16, 500  # turns of an episode, tokens of an observation
LIMIT_MS = 5.0
RESULTS = ROOT / "experiments" / "results"


def main() -> int:
    """Measure, write the table, say whether the figure holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", default=str(SHIPPED["shipped:sft"]), help="HF directory")
    parser.add_argument("--batches", type=int, default=1, help="of 32 groups each")
    args = parser.parse_args()
    figures = measure(load_chat(args.tokenizer), args.batches)
    holds = figures["cpu_ms_per_turn"] <= LIMIT_MS
    write(figures, holds, args)
    return 0 if holds else 1


def measure(chat: ChatFormat, batches: int) -> dict[str, float]:
    """CPU and wall time of `batches` batches of 32 groups, through the stream and the log."""
    actors = Actors(chat)
    cfg = StreamConfig(
        batch_groups=GROUPS,
        group_size=SAMPLES,
        max_staleness=0,  # one batch at a time: all 256 episodes start together
        max_concurrent_groups=GROUPS,
    )
    episode = EpisodeConfig(
        system_prompt="Find the answer with the tools.",
        max_turns=TURNS,
        max_context=40_000,
        max_new_tokens=512,
        repetition_stop=TURNS + 1,
    )
    with (
        tempfile.TemporaryDirectory() as scratch,
        ExperienceLog.open(Path(scratch) / "experience.db") as log,
    ):
        run_sample = make_run_sample(actors, chat, episode, actors.open_toolbox, seed=0)
        finish = make_finish(DenoiseConfig(("environment",)), AdvantageConfig(drop_zero=False))
        with Stream(log, "rl", actors.task_at, run_sample, finish, cfg) as stream:
            cpu, wall = time.process_time(), time.monotonic()
            stream.start()
            tokens = 0
            for step in range(batches):
                shipped = stream.next_step_segments(step)
                tokens += sum(len(s.segment) for s in shipped)
                if step + 1 < batches:
                    stream.set_version(step + 1)
            cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    episodes = batches * GROUPS * SAMPLES
    return {
        "cpu_ms_per_turn": 1e3 * cpu / actors.turns,
        "turns": actors.turns,
        "turns_per_episode": actors.turns / episodes,
        "most_episodes_in_flight": actors.most,
        "observation_tokens": len(chat.encode_text(actors.observation)),
        "completion_tokens": actors.completion_tokens / actors.turns,
        "tokens_per_episode": tokens / episodes,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
    }


class Actors:
    """The policy and the toolbox of all episodes; counts turns and episodes in flight."""

    def __init__(self, chat: ChatFormat) -> None:
        self.turns = self.most = self.completion_tokens = 0
        self._open = 0
        self._rng = random.Random(0)
        index = search_index(WorldConfig())
        self._names = index.world.entities
        pages = (page_text(index.html(name) or "") for name in self._names)
        self.observation = _long(chat, " ".join(pages))
        calls = [self._call(name, number) for number, name in enumerate(self._names[: TURNS - 1])]
        self._calls = [chat.assistant_ids({"role": "assistant", "content": c}) for c in calls]
        self._answers = [
            chat.assistant_ids({"role": "assistant", "content": f"<answer>{a}</answer>"})
            for a in ("yes", "no")
        ]
        self._policy = Scripted(self._say)

    def task_at(self, ordinal: int) -> Task:
        return Task(f"Is the answer to question {ordinal} yes?", ("yes",))

    async def sample(self, request: SampleRequest) -> Completion:
        """A turn, after as long as a busy engine might take."""
        await asyncio.sleep(self._rng.uniform(0.05, 0.5))
        completion = await self._policy.sample(request)
        self.turns += 1
        self.completion_tokens += len(completion.ids)
        return completion

    async def open_toolbox(self, task_meta: Mapping[str, Any], key: tuple[int, ...]) -> Actors:
        self._open += 1
        self.most = max(self.most, self._open)
        return self

    async def close(self) -> None:
        self._open -= 1

    def schemas(self) -> Sequence[Mapping[str, Any]]:
        return SCHEMAS

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        return ToolResult(ToolStatus.OK, self.observation)

    def _say(self, request: SampleRequest) -> list[int]:
        episode, turn, _ = request.rid.split("/")
        issue, sample, _ = map(int, episode.split("-"))
        if int(turn) < TURNS - 1:
            return self._calls[int(turn)].tolist()
        return self._answers[(issue + sample) % 2].tolist()

    def _call(self, name: str, number: int) -> str:
        thought = f"Page {number} may tell more about {name}, so I read it and then compare."
        arguments = json.dumps({"title": name})
        return (
            f'{thought}\n<tool_call>\n{{"name": "visit", "arguments": {arguments}}}\n</tool_call>'
        )


def _long(chat: ChatFormat, text: str) -> str:
    """The beginning of `text` that has OBSERVATION tokens, or a few more."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high) // 2
        if len(chat.encode_text(text[:middle])) < OBSERVATION:
            low = middle + 1
        else:
            high = middle
    return text[:low]


def write(figures: Mapping[str, float], holds: bool, args: argparse.Namespace) -> None:
    """experiments/results/controller.{json,md}."""
    content = {
        "command": " ".join(["python experiments/bench/controller.py", *sys.argv[1:]]),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "tokenizers": tokenizers.__version__},
        "tokenizer": Path(args.tokenizer).name,
        "limit_ms": LIMIT_MS,
        "holds": holds,
        "figures": dict(figures),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "controller.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [
        "# CPU of the controller per turn",
        "",
        f"`{content['command']}` on {content['machine']}, Python {platform.python_version()}, "
        f"tokenizer `{content['tokenizer']}`. At most {LIMIT_MS:g} ms a turn: "
        f"{'held' if holds else 'MISSED'}.",
        "",
        "| figure | value |",
        "| --- | ---: |",
        *(f"| {name} | {value:.4g} |" for name, value in figures.items()),
    ]
    (RESULTS / "controller.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
