"""The worker pool: what a request may do to its worker, and what is left of it afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from strop.rewards.worker import WorkerPool

TOY = """
import os, signal, sys, time
from strop.rewards.serve import serve

def make_handler():
    def handle(request):
        for verb, value in request.items():
            if verb == "sleep": time.sleep(value)
            elif verb == "c_loop": pow(7, 10 ** 9)      # one C call that no Python signal handler can interrupt
            elif verb == "crash": os.kill(os.getpid(), signal.SIGSEGV)
            elif verb == "crash_once" and not os.path.exists(value):
                open(value, "w").close(); os.kill(os.getpid(), signal.SIGKILL)
            elif verb == "raise": raise KeyError("no such thing")
            elif verb == "memory": bytearray(1 << 29)
            elif verb == "print": print('{"id": 1, "value": "forged"}', flush=True)
            elif verb == "pids":
                with open(value, "a") as file: file.write(f"{os.getpid()} {os.getppid()}\\n")
            elif verb == "stale_reply":
                for fd in range(3, 20):
                    try: os.write(fd, b'{"id": 0, "value": "stale"}\\n')
                    except OSError: pass
            elif verb == "leak_child":
                import subprocess
                child = subprocess.Popen(["sleep", "60"])
                with open(value, "w") as file: file.write(str(child.pid))
        return request.get("echo")
    return handle

def prepare(request):
    if "prepare_error" in request: raise KeyError("no such question")
    time.sleep(request.get("prepare", 0))

def main():
    serve(
        make_handler,
        respawn="respawn" in sys.argv,
        memory_bytes=(1 << 28) if "limit" in sys.argv else None,
        prepare=prepare if "prepare" in sys.argv else None,
    )
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes pools over a toy worker module; closes them."""
    (tmp_path / "toy_worker.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    pools: list[WorkerPool] = []

    def make(
        *arguments: str,
        timeout: float = 20.0,
        prepare_timeout: float | None = None,
        num_workers: int = 1,
        module: str = "toy_worker",
    ) -> WorkerPool:
        times: dict[str, Any] = {"timeout": timeout, "prepare_timeout": prepare_timeout}
        pools.append(WorkerPool(module, num_workers=num_workers, arguments=arguments, **times))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def is_gone(pid: int) -> bool:
    """No such process, not even a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def has_ended(pid: int) -> bool:
    """Gone, or a zombie that its new parent, init, has not collected yet: no longer in our hands."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return is_gone(pid) or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return is_gone(pid)


def wait_until(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


MODES = pytest.mark.parametrize("mode", ["respawn", "plain"])


@MODES
def test_a_hang_in_one_c_call_is_killed_and_the_next_request_is_answered(toy, mode):
    pool = toy(mode, timeout=0.5)
    hung, fine = pool.map([{"c_loop": True}, {"echo": 5}])
    assert (hung.failure, hung.value) == ("timeout", None)
    assert 500 <= hung.milliseconds < 2000
    assert "0.5 s" in hung.detail
    assert (fine.failure, fine.value) == (None, 5)


@MODES
def test_what_the_worker_prepares_is_not_the_requests_time(toy, mode):
    pool = toy(mode, "prepare", timeout=0.4, prepare_timeout=5.0)
    slow, hung, fine = pool.map([{"prepare": 1.0, "echo": 1}, {"prepare": 0.6, "sleep": 60}, {"echo": 2}])
    assert (slow.failure, slow.value) == (None, 1) and slow.milliseconds < 400
    assert hung.failure == "timeout" and hung.milliseconds < 1000
    assert (fine.failure, fine.value) == (None, 2)


@MODES
def test_a_request_that_cannot_be_prepared_is_an_infra_error(toy, mode):
    pool = toy(mode, "prepare", timeout=5.0, prepare_timeout=0.4)
    hung, broken, fine = pool.map([{"prepare": 60, "echo": 1}, {"prepare_error": True}, {"echo": 2}])
    assert (hung.failure, hung.detail) == ("infra_error", "not ready to judge in 0.4 s")
    assert (broken.failure, broken.detail) == ("infra_error", "KeyError: 'no such question'")
    assert (fine.failure, fine.value) == (None, 2)


@MODES
def test_a_request_that_crashes_every_worker_is_killed_and_others_are_not_touched(toy, mode):
    before, crash, after = toy(mode).map([{"echo": 1}, {"crash": True}, {"echo": 2}])
    assert (before.value, crash.failure, after.value) == (1, "killed", 2)


@MODES
def test_a_worker_killed_from_outside_in_the_middle_costs_the_answer_nothing(toy, mode, tmp_path):
    pool = toy(mode)
    pids = tmp_path / "pids"

    def kill_the_first():
        assert wait_until(lambda: pids.exists() and pids.read_text().endswith("\n"))
        os.kill(int(pids.read_text().split()[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    (reply,) = pool.map([{"pids": str(pids), "sleep": 0.3, "echo": "right"}])
    killer.join()
    assert (reply.failure, reply.value) == (None, "right")
    assert len(pids.read_text().splitlines()) == 2


@MODES
def test_workers_killed_while_idle_are_replaced(toy, mode, tmp_path):
    pool = toy(mode)
    pids = tmp_path / "pids"
    for round_number in range(3):
        (reply,) = pool.map([{"pids": str(pids), "echo": round_number}])
        assert (reply.failure, reply.value) == (None, round_number)
        answering, parent = map(int, pids.read_text().splitlines()[-1].split())
        # The last time also the process that would fork a new one.
        for pid in [answering] if round_number == 0 or mode == "plain" else [parent, answering]:
            os.kill(pid, signal.SIGKILL)


def test_a_kill_does_not_repeat_the_imports(toy, tmp_path):
    slow = tmp_path / "slow_worker.py"
    slow.write_text(TOY.replace("def make_handler():", "def make_handler():\n    time.sleep(1.0)"))
    pool = toy("respawn", timeout=0.2, module="slow_worker")
    hung, fine = pool.map([{"sleep": 60}, {"echo": 1}])
    assert (hung.failure, fine.value) == ("timeout", 1)
    started = time.monotonic()
    assert pool.map([{"sleep": 60}, {"echo": 1}])[1].value == 1
    assert time.monotonic() - started < 0.2 + 0.9


def test_a_request_over_the_memory_limit_is_killed_and_the_next_is_answered(toy):
    bomb, fine = toy("respawn", "limit").map([{"memory": True}, {"echo": 1}])
    assert (bomb.failure, fine.value) == ("killed", 1)
    assert toy("respawn").map([{"memory": True, "echo": 2}])[0].value == 2  # it was the limit


def test_an_exception_is_an_infra_error_with_its_last_line(toy):
    failed, fine = toy("plain").map([{"raise": True}, {"echo": 1}])
    assert (failed.failure, failed.value) == ("infra_error", None)
    assert failed.detail == "KeyError: 'no such thing'"
    assert fine.value == 1


def test_prints_of_the_handler_are_not_taken_for_replies(toy):
    assert toy("plain").map([{"print": True, "echo": "real"}])[0].value == "real"


def test_a_late_reply_to_an_earlier_request_is_not_taken_for_this_ones(toy):
    assert toy("plain").map([{"stale_reply": True, "sleep": 0.1, "echo": "mine"}])[0].value == "mine"


def test_a_request_that_was_given_up_is_not_run_by_the_next_worker(toy, tmp_path):
    pool = toy("respawn", timeout=0.5)
    pids, given_up = tmp_path / "pids", tmp_path / "given_up"
    pool.map([{"pids": str(pids)}])
    os.kill(int(pids.read_text().split()[0]), signal.SIGSTOP)
    stopped, fine = pool.map([{"pids": str(given_up)}, {"echo": 1}])
    assert (stopped.failure, fine.value) == ("timeout", 1)
    assert not given_up.exists()


def test_replies_keep_the_order_of_requests_on_two_workers(toy):
    requests = [{"sleep": 0.05 if i % 3 == 0 else 0.0, "echo": i} for i in range(12)]
    assert [reply.value for reply in toy("respawn", num_workers=2).map(requests)] == list(range(12))


def test_eight_threads_at_once_each_get_their_own_answers(toy):
    pool = toy("respawn", num_workers=2, timeout=0.5)
    results: dict[int, Any] = {}

    def work(thread: int):
        requests: list[Any] = [{"echo": [thread, i]} for i in range(20)]
        if thread == 0:
            requests[10] = {"sleep": 60}
        results[thread] = [(reply.failure, reply.value) for reply in pool.map(requests)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected: dict[int, Any] = {t: [(None, [t, i]) for i in range(20)] for t in range(8)}
    expected[0][10] = ("timeout", None)
    assert results == expected


@MODES
def test_a_megabyte_goes_both_ways(toy, mode):
    text = "é" * 500_000
    assert toy(mode).map([{"echo": text}])[0].value == text


def test_a_stopped_worker_that_reads_nothing_hits_the_deadline(toy, tmp_path):
    pool = toy("plain", timeout=0.5)
    pids = tmp_path / "pids"
    pool.map([{"pids": str(pids)}])
    os.kill(int(pids.read_text().split()[0]), signal.SIGSTOP)
    stopped, fine = pool.map([{"echo": "x" * 1_000_000}, {"echo": 1}])
    assert (stopped.failure, fine.value) == ("timeout", 1)


def test_a_module_that_cannot_be_loaded_is_an_infra_error(toy, tmp_path):
    (tmp_path / "broken_worker.py").write_text("import no_such_module_anywhere\ndef main(): pass\n")
    (tmp_path / "failing_worker.py").write_text(TOY.replace("def make_handler():", "def make_handler():\n    1 / 0"))
    assert toy(module="broken_worker").map([{}])[0].failure == "infra_error"
    pool = toy(module="failing_worker")
    (reply,) = pool.map([{}])
    assert reply.failure == "infra_error"
    assert "ZeroDivisionError: division by zero" in reply.detail
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        pool.start()


@MODES
def test_close_leaves_no_process_and_no_zombie(toy, mode, tmp_path):
    pool = toy(mode, num_workers=2, timeout=0.5)
    pids = tmp_path / "pids"
    pool.map([{"pids": str(pids), "sleep": 0.1} for _ in range(4)])
    pool.map([{"sleep": 60}] * 2)
    pool.map([{"pids": str(pids), "sleep": 0.1} for _ in range(4)])
    pool.close()
    pairs = [[int(pid) for pid in line.split()] for line in pids.read_text().splitlines()]
    answering = {pid for pid, _ in pairs}
    ours = answering if mode == "plain" else {parent for _, parent in pairs}
    assert len(answering) == 4
    assert all(is_gone(pid) for pid in ours)
    assert wait_until(lambda: all(has_ended(pid) for pid in answering), 5.0)
    with pytest.raises(RuntimeError, match="closed"):
        pool.map([{}])


def test_a_kill_takes_the_processes_that_the_request_started_along(toy, tmp_path):
    pool = toy("plain", timeout=0.5)
    (reply,) = pool.map([{"leak_child": str(tmp_path / "child"), "sleep": 60}])
    assert reply.failure == "timeout"
    child = int((tmp_path / "child").read_text())
    assert wait_until(lambda: has_ended(child), 5.0)


@MODES
@pytest.mark.parametrize("busy", [True, False])
def test_workers_end_when_the_parent_is_kill_minus_nined(toy, mode, busy, tmp_path):
    pids = tmp_path / "pids"
    script = f"""
        import sys, time
        sys.path[:0] = {[str(tmp_path), *sys.path]!r}
        from strop.rewards.worker import WorkerPool
        pool = WorkerPool("toy_worker", timeout=0.3, num_workers=1, arguments=[{mode!r}])
        pool.map([{{"pids": {str(pids)!r}, {'"c_loop"' if busy else '"echo"'}: True}}])
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    assert wait_until(lambda: pids.exists() and pids.read_text().endswith("\n"))
    parent.kill()
    parent.wait()
    answering, template = map(int, pids.read_text().split())
    assert wait_until(lambda: has_ended(answering) and (mode == "plain" or has_ended(template)), 5.0)


def test_workers_end_with_a_parent_that_never_closes_its_pool(toy, tmp_path):
    pids = tmp_path / "pids"
    script = f"""
        import sys
        sys.path[:0] = {[str(tmp_path), *sys.path]!r}
        from strop.rewards.worker import WorkerPool
        pool = WorkerPool("toy_worker", timeout=9.0, num_workers=2, arguments=["respawn"])
        pool.map([{{"pids": {str(pids)!r}, "sleep": 0.1}}] * 4)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=20)
    assert len(pids.read_text().splitlines()) == 4
    assert wait_until(lambda: all(has_ended(int(pid)) for pid in pids.read_text().split()), 5.0)


def test_a_worker_starts_without_torch_and_from_a_folder_with_hostile_names(toy, tmp_path, monkeypatch):
    (tmp_path / "probe_worker.py").write_text(
        "import sys\nfrom strop.rewards.serve import serve\n"
        "def main(): serve(lambda: lambda request: 'torch' in sys.modules, respawn=True)\n"
    )
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "json.py").write_text("raise SystemExit('the wrong json')\n")
    monkeypatch.chdir(tmp_path / "here")
    assert toy(module="probe_worker").map([None])[0].value is False


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": -1.0}, {"timeout": 1.0, "num_workers": 0}])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        WorkerPool("toy_worker", **options)
