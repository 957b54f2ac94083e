"""SIGINT and SIGTERM: one is a wish, two are an order. Real signals to real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from strop.runs import Interrupt

LOOP = """
import sys, time
from strop.runs.interrupt import Interrupt
with Interrupt() as interrupt:
    print("ready", flush=True)
    while not interrupt.is_requested:
        time.sleep(0.01)
    print("asked", flush=True)
    if sys.argv[1] == "stubborn":
        time.sleep(60)
    print("saved", flush=True)
    interrupt.exit()
"""


def start(how: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_lets_the_step_finish_and_the_second_does_not(number, code):
    with start("obedient") as process:
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
        assert (output, process.returncode) == ("asked\nsaved\n", code)
        assert "Stopping after this step" in errors
    with start("stubborn") as process:
        process.send_signal(number)
        assert process.stdout is not None and process.stdout.readline() == "asked\n"
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
        assert (output, process.returncode) == ("", code)


def test_handlers_are_put_back():
    def mine(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, mine), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyError), Interrupt() as interrupt:
            assert signal.getsignal(signal.SIGTERM) is not mine
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupt.is_requested and interrupt.exit_code == 143
            raise KeyError
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is before[1]
    finally:
        signal.signal(signal.SIGTERM, before[0])
    fresh = Interrupt()
    assert not fresh.is_requested and fresh.exit_code == 0
