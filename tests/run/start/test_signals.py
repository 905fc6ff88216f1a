"""Ctrl-C and SIGTERM are answered at once, in Python, in compiled code and while importing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentcpm_jax.run.start.document import CHECKOUT
from agentcpm_jax.run.start.signals import GRACE, RESUMABLE, StopSignal

CHILD = """
import sys, time
import numpy
from agentcpm_jax.run.start import signals
signals.GRACE = 0.5
with signals.StopSignal(answer=signals.say) as stop:
    stop.patient = sys.argv[1] == "step"
    stop.importing = sys.argv[1] == "importing"
    try:
        print("ready", flush=True)
        if sys.argv[1] == "python":
            time.sleep(60)
        elif sys.argv[1] == "deaf":  # as a compiler: no handler runs until it returns
            numpy.sort(numpy.arange(600_000_000)[::-1] % 9973)
        elif sys.argv[1] == "collecting":  # jax has such a callback
            import gc
            naps = iter([0.3, 0.3, 0.3])
            gc.callbacks.append(lambda *_: time.sleep(next(naps, 0)))
            while True:
                gc.collect()
        elif sys.argv[1] == "cleaning":
            try:
                time.sleep(60)
            finally:
                time.sleep(60)
        elif sys.argv[1] == "importing":  # where nothing may be raised
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                print("raised", flush=True)
        else:
            while not stop.requested:
                time.sleep(0.01)
            time.sleep(1.0)  # the step, which takes longer than the grace
            print("saved", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("doing", ["python", "deaf", "collecting", "cleaning", "importing", "step"])
def test_one_line_at_once_and_an_end(doing: str, number: signal.Signals) -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, doing],
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.send_signal(number)
    began = time.monotonic()
    line = process.stderr.readline()
    assert line.startswith(f"interrupted by {number.name}: ") and time.monotonic() - began < 5
    out, rest = process.communicate(timeout=30)
    assert rest == ""
    assert process.returncode == (0 if doing == "step" else RESUMABLE)
    assert "raised" not in out and ("saved" in out) == (doing == "step")
    assert ("after this step" in line) == (doing == "step")


def test_without_an_answer_it_only_asks() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert signal.getsignal(signal.SIGTERM) == before, "a second one acts as usual"


def test_the_grace_leaves_ten_seconds_in_all() -> None:
    assert GRACE < 10


@pytest.mark.parametrize("seconds", [0.15, 0.5, 1.2])
@pytest.mark.parametrize("script", ["train.py", "rollout_worker.py"])
def test_a_launcher_can_be_stopped_while_it_imports(
    script: str, seconds: float, tmp_path: Path
) -> None:
    command = [sys.executable, str(CHECKOUT / "launch" / script), "--config=configs/tiny.py"]
    process = subprocess.Popen(
        [*command, f"--workdir={tmp_path / 'w'}"], stderr=subprocess.PIPE, text=True
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said and "NameError" not in said
    if process.returncode == RESUMABLE:
        assert said.startswith("interrupted by SIGTERM: ")
    else:  # before the first line of ours, or done: a worker refuses an SQLite log
        assert process.returncode in (-signal.SIGTERM, 2)
