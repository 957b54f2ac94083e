"""The process of the command starts again with an allocator that suits it, and with nothing else changed."""

import os
import subprocess
import sys

import pytest

from strop.cli.main import main
from strop.native import malloc
from strop.native.malloc import for_large_blocks

SETTING = ":".join(f"{name}={value}" for name, value in malloc._SETTINGS.items())
PROGRAM = """
import os, sys
from strop.native.malloc import restart_for_large_blocks

print(os.getpid(), os.environ.get("GLIBC_TUNABLES", "-"), *sys.argv[1:], flush=True)
restart_for_large_blocks()
"""

glibc_only = pytest.mark.skipif(for_large_blocks({}) == {}, reason="another C library has another allocator")


def printed(tunables: str | None) -> list[list[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if tunables is not None:
        environment["GLIBC_TUNABLES"] = tunables
    command = [sys.executable, "-c", PROGRAM, "one", "two words"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return [line.split(" ", 2) for line in done.stdout.splitlines()]


@glibc_only
def test_the_process_starts_again_once() -> None:
    first, second = printed(None)
    assert first[1:] == ["-", "one two words"]
    assert second == [first[0], SETTING, "one two words"]


@glibc_only
def test_other_settings_are_kept_and_these_are_respected() -> None:
    assert [line[1] for line in printed("glibc.malloc.arena_max=2")] == [
        "glibc.malloc.arena_max=2",
        f"glibc.malloc.arena_max=2:{SETTING}",
    ]
    names, values = zip(*malloc._SETTINGS.items(), strict=True)
    settled = f"{names[0]}=7"
    missing = ":".join(f"{name}={value}" for name, value in zip(names[1:], values[1:], strict=True))
    assert [line[1] for line in printed(settled)] == [settled, f"{settled}:{missing}"]
    settled = ":".join(f"{name}=0" for name in names)
    assert [line[1] for line in printed(settled)] == [settled]


@glibc_only
def test_the_setting_reaches_malloc() -> None:
    """Blocks that were freed beside each other become one at once: a large one then fits into where they were."""
    program = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)
blocks = [libc.malloc(500) for _ in range(64)]
run = [one for one, other in zip(blocks, blocks[1:]) if other - one == 512][-6:]
assert len(run) == 6 and run == sorted(run), "no neighbours"
for block in run:
    libc.free(block)
print(libc.malloc(2000) in run)
"""
    for environment, is_joined in ((os.environ | {"GLIBC_TUNABLES": ""}, False), (for_large_blocks({}), True)):
        command = [sys.executable, "-I", "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.strip() == str(is_joined)


@glibc_only
def test_a_large_block_comes_from_a_heap_that_keeps_its_end() -> None:
    program = """
import ctypes
libc = ctypes.CDLL(None)
for function in (libc.malloc, libc.sbrk):
    function.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = (ctypes.c_size_t,), (ctypes.c_void_p,)
libc.sbrk.argtypes = (ctypes.c_ssize_t,)
before = libc.sbrk(0)
block = libc.malloc(1 << 26)
is_inside = before <= block + (1 << 26) <= libc.sbrk(0)
libc.free(block)
print(is_inside and libc.sbrk(0) >= block + (1 << 26))
"""
    for environment, is_kept in ((os.environ | {"GLIBC_TUNABLES": ""}, False), (for_large_blocks({}), True)):
        command = [sys.executable, "-I", "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.strip() == str(is_kept)


@pytest.mark.parametrize(("arguments", "is_restarted"), [(["grpo", "none.toml"], True), (["--help"], False)])
def test_commands_restart_and_help_does_not(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], is_restarted: bool
) -> None:
    restarts: list[bool] = []
    monkeypatch.setattr(malloc, "restart_for_large_blocks", lambda: restarts.append(True))
    monkeypatch.setattr(sys, "argv", ["strop", *arguments])
    main()
    assert restarts == [True] * is_restarted
    main(arguments)  # called from Python it must not
    assert restarts == [True] * is_restarted
