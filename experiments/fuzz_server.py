"""Hostile bodies against `launch/serve.py`: it refuses what is wrong, and goes on.

    python experiments/fuzz_server.py --n 5000

A real server process with the shipped agent is sent bodies to all its routes, some at a time: right
ones with fields of any JSON type and size, right ones whose bytes are changed, cut or nested, and
streams whose client leaves. Checked:

    no answer has a status of 500 or more, none is missing, each refusal has a message, and what is
    answered is what was asked for; at the end the engine samples what it sampled at first, nothing
    runs, and the process has the memory that it had after the first fifth

Writes experiments/results/fuzz_server.{json,md}; exits 1 when something broke.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
AGENT = ROOT / "agentcpm_jax" / "assets" / "tiny_sft"

AT_A_TIME = 8
TIMEOUT = 300.0  # s for an answer: programs are compiled meanwhile
MAX_GROWTH = 64.0  # MiB between the first fifth, in which programs are compiled, and the end

PROBE = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 5, 383, 384, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**400),
    *(0.5, 1.0, -0.0, 1e-300, 1e308, float("nan"), float("inf"), -1.5),
    *("", "a", "\ud800", "x" * 1000, "\x00", "<|im_end|>", "</tool_call>", "auto", "text", "\n"),
    *([], [0], [1, 2, 3], ["a"], [None], [[1]], [[1], [2]], [2**33], [-1], [1.5], [True]),
    *({}, {"a": 1}, {"type": "text"}, {"type": "function", "function": {"name": "f"}}),
]
SAMPLING = (
    *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "n"),
    *("ignore_eos", "sampling_seed", "frequency_penalty", "repetition_penalty", "no_stop_trim"),
    *("skip_special_tokens", "min_new_tokens", "regex", "json_schema", "stream_interval", "bogus"),
)
FIELDS = {
    "/generate": (
        *("rid", "stream", "return_logprob", "logprob_start_len", "text", "input_ids"),
        *("sampling_params", "top_logprobs_num", "lora_path", "extra_key", "bogus"),
    ),
    "/v1/chat/completions": (
        *("messages", "tools", "tool_choice", "max_tokens", "max_completion_tokens", "rid"),
        *("temperature", "top_p", "top_k", "stop", "stop_token_ids", "seed", "stream", "model"),
        *("stream_options", "response_format", "logprobs", "logit_bias", "chat_template_kwargs"),
    ),
    "/tokenize": ("prompt", "messages", "tools", "bogus"),
    "/detokenize": ("tokens", "bogus"),
    "/abort_request": ("rid", "abort_all"),
    "/pause_generation": ("mode",),
    "/continue_generation": ("bogus",),
    "/flush_cache": ("bogus",),
    "/update_weight_version": ("new_version", "abort_all_requests"),
    "/update_weights_from_disk": ("model_path", "weight_version", "abort_all_requests", "bogus"),
}
SAMPLES = ("/generate", "/v1/chat/completions")  # routes that most bodies go to
RIGHT: dict[str, dict[str, Any]] = {
    "/generate": {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 3}},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    "/tokenize": {"prompt": "who wrote it"},
    "/detokenize": {"tokens": [3, 4, 5]},
    "/abort_request": {"rid": "nobody/"},
    "/update_weight_version": {"new_version": "default", "abort_all_requests": False},
    "/update_weights_from_disk": {"model_path": str(AGENT)},
}


def main() -> int:
    """Start a server, send the bodies, check it, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=5000, help="bodies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of fuzz_server.*")
    args = parser.parse_args()
    began = time.monotonic()
    with server() as (process, url):
        found = asyncio.run(attack(url, process.pid, args.n, args.seed))
        if process.poll() is not None:
            found["broken"].append(f"the server has ended with code {process.returncode}")
    found |= {"n": args.n, "seed": args.seed, "seconds": round(time.monotonic() - began)}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "fuzz_server.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "fuzz_server.md").write_text(table(found))
    print(table(found))
    return 1 if found["broken"] else 0


@contextlib.contextmanager
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(process, url) of `launch/serve.py` with the shipped agent."""
    command = [sys.executable, "launch/serve.py", str(AGENT), "--port=0", "--context=384"]
    command += ["--slots=8"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("serving"):
            raise SystemExit(f"the server did not start: exit code {process.wait()}")
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()


async def attack(url: str, pid: int, n: int, seed: int) -> dict[str, Any]:
    """Send `n` bodies; the counts, the memory in MiB at each fifth, and what broke."""
    statuses: Counter[str] = Counter()
    broken: list[str] = []
    queue = iter(range(n))
    memory: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, trust_env=False) as client:
        first = await probe(client)

        async def work() -> None:
            for number in queue:
                path, raw = body(number, seed)
                try:
                    status, problem = await send(client, path, raw, leaves=number % 4 == 0)
                except httpx.HTTPError as error:
                    status, problem = type(error).__name__, "no answer"
                statuses[f"{path} {status}"] += 1
                if problem:
                    broken.append(f"{path} {status}: {problem}: {raw[:300]!r}")
                if path == "/pause_generation":
                    await client.post("/continue_generation")
                if (number + 1) % max(n // 5, 1) == 0:
                    memory.append(resident(pid))

        await asyncio.gather(*(work() for _ in range(AT_A_TIME)))
        broken += await at_the_end(client, first, memory)
    return {"statuses": dict(sorted(statuses.items())), "memory": memory, "broken": broken}


async def send(client: httpx.AsyncClient, path: str, raw: bytes, leaves: bool) -> tuple[str, str]:
    """(status, what is wrong with the answer); `leaves`: the client reads one part of a stream."""
    content = b""
    async with client.stream("POST", path, content=raw) as answer:
        async for part in answer.aiter_bytes():
            content += part
            if leaves and answer.headers["Content-Type"] == "text/event-stream":
                return f"{answer.status_code} left", ""
    status, text = answer.status_code, content.decode()
    problem = ""
    if status >= 500:
        problem = text[:200]
    elif status >= 400:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return str(status), "" if json.loads(text)["error"]["message"] else "no message"
        problem = "a refusal without a message"
    elif answer.headers.get("Content-Type") == "text/event-stream":
        problem = "" if text.endswith("data: [DONE]\n\n") else "the stream does not end"
        problem = problem or ("" if '"error"' not in text else text[-200:])
    return str(status), problem


async def probe(client: httpx.AsyncClient) -> list[int]:
    """The ids of a greedy answer."""
    answer = await client.post("/generate", json=PROBE)
    return answer.json()["output_ids"]


async def at_the_end(client: httpx.AsyncClient, first: list[int], memory: list[float]) -> list[str]:
    """What is not as it was at the start."""
    broken = []
    await client.post("/continue_generation")
    for path in ("/health", "/health_generate"):
        status = (await client.get(path)).status_code
        broken += [f"{path} is {status}"] if status != 200 else []
    if (last := await probe(client)) != first:
        broken.append(f"the engine samples {last}, and {first} at first")
    (state,) = (await client.get("/server_info")).json()["internal_states"]
    if state != {"num_running_reqs": 0, "paused": False}:
        broken.append(f"at the end {state}")
    if memory and memory[-1] - memory[0] > MAX_GROWTH:
        broken.append(f"memory grew: {memory} MiB")
    return broken


def body(number: int, seed: int) -> tuple[str, bytes]:
    """A route and the bytes of a body for it; the number and the seed decide."""
    rng = random.Random(f"{seed}/{number}")
    path = rng.choice(SAMPLES) if rng.random() < 0.7 else rng.choice(sorted(FIELDS))
    made = json.loads(json.dumps(RIGHT.get(path, {})))
    for name in rng.sample(FIELDS[path], min(rng.choice((0, 0, 1, 1, 2, 3)), len(FIELDS[path]))):
        made[name] = value(rng)
    if path == "/generate" and isinstance(params := made.get("sampling_params"), dict):
        for name in rng.sample(SAMPLING, rng.choice((0, 0, 1, 1, 2))):
            params[name] = value(rng)
        if made.get("text") is not None and rng.random() < 0.9:
            made.pop("input_ids", None)
    if path in SAMPLES and rng.random() < 0.3:
        made["stream"] = True
    raw = json.dumps(made).encode()
    return path, spoilt(raw, rng) if rng.random() < 0.15 else raw


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON, mostly one of `VALUES`."""
    kind = rng.random()
    if kind < 0.85 or depth > 2:
        return rng.choice(VALUES)
    if kind < 0.93:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    names = ("a", "type", "function", "name", "role", "content", "parameters", "arguments")
    return {rng.choice(names): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def spoilt(raw: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut, doubled, nested or in another encoding."""
    place = rng.randrange(len(raw) + 1)
    return rng.choice(
        [
            raw[:place],
            raw[:place] + bytes([rng.randrange(256)]) + raw[place + 1 :],
            raw[:place] + raw,
            raw.decode().encode(rng.choice(["utf-16", "utf-32"])),
            b"[" * 10 ** rng.randrange(6) + raw,
            b'{"input_ids":' + b"[" * 1000 + b"]" * 1000 + b"}",
            raw.replace(b"3", b"9" * 10 ** rng.randrange(5)),
            rng.randbytes(place),
            b'{"input_ids":[' + b"1," * 10 ** rng.randrange(6) + b"1]}",
            b'{"text":"' + b"a" * 10 ** rng.randrange(7) + b'"}',
        ]
    )


def resident(pid: int) -> float:
    """MiB of memory that the process has."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def table(found: dict[str, Any]) -> str:
    """The results for people."""
    by_route: dict[str, Counter[str]] = {}
    for name, count in found["statuses"].items():
        path, _, status = name.partition(" ")
        by_route.setdefault(path, Counter())[status] += count
    columns = sorted({status for counts in by_route.values() for status in counts})
    rows = [
        f"`python experiments/fuzz_server.py --n {found['n']} --seed {found['seed']}`",
        f"({found['seconds']} s). Memory of the server after each fifth, MiB: "
        f"{', '.join(map(str, found['memory']))}. Broken: {len(found['broken'])}.\n",
        "| route | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for path, counts in sorted(by_route.items()):
        rows.append(f"| {path} | " + " | ".join(str(counts[c]) for c in columns) + " |")
    return "\n".join([*rows, *(f"- {what}" for what in found["broken"][:20])]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
