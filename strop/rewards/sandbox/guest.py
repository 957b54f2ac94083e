"""What runs inside a box, and the wire format that both sides speak.

The text of this file is handed to the box's python with -c, so it imports nothing but built-in modules: every import
would be paid for at each start. Nothing in here protects anything. The solution shares a process with the second half
of this file and may rewrite all of it; what it can then send is still only data, and the other side decides.
"""

import posix
import sys

TYPE_CHECKING = False  # typing itself would have to be imported
if TYPE_CHECKING:
    from typing import Any

MAX_MESSAGE_BYTES = 1 << 20
MAX_DEPTH = 60
ID_BYTES = 8
HEADER_BYTES = 4 + ID_BYTES


class WireError(ValueError):
    """Bytes that are no message, or a value that cannot be sent."""


def encode(value: "Any", depth: int = 0) -> bytes:
    """Bytes of a plain value: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict.

    Of exactly these types: a subclass may carry an __eq__ of its own, and is refused with WireError like anything else.
    """
    if depth > MAX_DEPTH:
        raise WireError(f"nested more than {MAX_DEPTH} deep")
    kind = type(value)
    if value is None or kind is bool:
        return {None: b"N", True: b"T", False: b"F"}[value]
    if kind in (list, tuple, set, frozenset):
        parts = [encode(item, depth + 1) for item in value]
        tag = {list: b"l", tuple: b"t", set: b"e", frozenset: b"z"}[kind]
        return tag + len(parts).to_bytes(4, "big") + b"".join(parts)
    if kind is dict:
        parts = [encode(item, depth + 1) for pair in value.items() for item in pair]
        return b"d" + (len(parts) // 2).to_bytes(4, "big") + b"".join(parts)
    if kind is int:
        tag, data = b"i", value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)
    elif kind is str:
        tag, data = b"s", value.encode("utf-8", "surrogatepass")
    elif kind is float:
        tag, data = b"f", value.hex().encode()
    elif kind is bytes:
        tag, data = b"b", value
    elif kind is complex:
        tag, data = b"c", f"{value.real.hex()} {value.imag.hex()}".encode()
    else:
        raise WireError(f"a value of type {kind.__name__}: only plain data crosses between solution and tests")
    return tag + len(data).to_bytes(4, "big") + data


def decode(data: bytes) -> "Any":
    """The plain value of one message. Raises WireError for anything but a whole one, whoever wrote it."""
    try:
        value, end = _decode(data, 0, 0)
    except WireError:
        raise
    except (TypeError, OverflowError, ValueError) as error:  # TypeError: a list as a key
        raise WireError(f"no message: {error}") from None
    if end != len(data):
        raise WireError("bytes behind the message")
    return value


def _decode(data: bytes, start: int, depth: int) -> "tuple[Any, int]":
    if depth > MAX_DEPTH:
        raise WireError(f"nested more than {MAX_DEPTH} deep")
    tag = data[start : start + 1]
    start += 1
    if tag in _CONSTANTS:
        return _CONSTANTS[tag], start
    size = int.from_bytes(data[start : start + 4], "big")
    start += 4
    if start + size > len(data):  # every item takes a byte or more
        raise WireError("cut short")
    if tag in _CONTAINERS:
        items = []
        for _ in range(2 * size if tag == b"d" else size):
            item, start = _decode(data, start, depth + 1)
            items.append(item)
        return (dict(zip(items[::2], items[1::2])) if tag == b"d" else _CONTAINERS[tag](items)), start  # noqa: B905
    raw, start = data[start : start + size], start + size
    if tag == b"i":
        return int.from_bytes(raw, "big", signed=True), start
    if tag == b"s":
        return raw.decode("utf-8", "surrogatepass"), start
    if tag == b"f":
        return float.fromhex(raw.decode()), start
    if tag == b"b":
        return bytes(raw), start
    if tag == b"c":
        real, _, imaginary = raw.decode().partition(" ")
        return complex(float.fromhex(real), float.fromhex(imaginary)), start
    raise WireError("unknown tag")


_CONSTANTS = {b"N": None, b"T": True, b"F": False}
_CONTAINERS = {b"l": list, b"t": tuple, b"e": set, b"z": frozenset, b"d": dict}


def frame(message_id: bytes, payload: bytes) -> bytes:
    """Length, id, payload: what goes through the pipe."""
    return len(payload).to_bytes(4, "big") + message_id + payload


# ------------------------------------------------------------------------------------------- inside the box from here


def read_exactly(fd, count):
    data = b""
    while len(data) < count:
        chunk = posix.read(fd, count - len(data))
        if not chunk:
            posix._exit(0)
        data += chunk
    return data


def read_frame(fd):
    header = read_exactly(fd, HEADER_BYTES)
    return header[4:], read_exactly(fd, int.from_bytes(header[:4], "big"))


def write_frame(fd, message_id, payload):
    data = frame(message_id, payload)
    while data:
        data = data[posix.write(fd, data) :]


def describe(error):
    return [type(error).__name__, str(error)[:300]]


def new_module(name):
    module = type(sys)(name)
    sys.modules[name] = module
    return module.__dict__


def serve_solution(requests, replies, message_id, job):
    """Runs the solution's source, then answers calls of its entry point."""
    namespace = new_module("solution")
    try:
        for source in (job["prelude"], job["code"]):
            exec(compile(source, "solution.py", "exec"), namespace)
        function = namespace[job["entry_point"]]
        outcome = encode(["ok"])
    except BaseException as error:  # also SystemExit
        outcome = encode(["raised", *describe(error)])
    while True:
        write_frame(replies, message_id, outcome)
        message_id, payload = read_frame(requests)
        try:
            args, kwargs = decode(payload)
            outcome = encode(["value", function(*args, **kwargs)])
            if len(outcome) > MAX_MESSAGE_BYTES:
                raise WireError(f"a value of more than {MAX_MESSAGE_BYTES} bytes")
        except BaseException as error:
            outcome = encode(["raised", *describe(error)])


def run_tests(requests, replies, message_id, job):
    """Runs the tests; calls of the candidate go out and come back as messages."""
    state = {"calls": 0, "bad": ""}

    def candidate(*args, **kwargs):
        try:
            payload = encode([list(args), kwargs])
            if len(payload) > MAX_MESSAGE_BYTES:
                raise WireError(f"a value of more than {MAX_MESSAGE_BYTES} bytes")
        except WireError as error:
            state["bad"] = f"the tests pass {error}"
            raise
        state["calls"] += 1
        write_frame(replies, message_id, b"C" + payload)
        reply = decode(read_frame(requests)[1])
        if type(reply) is list and len(reply) == 2 and reply[0] == "value":
            return reply[1]
        name, text = "RuntimeError", "broken reply"
        if type(reply) is list and len(reply) == 3 and all(type(part) is str for part in reply):
            name, text = reply[1:]
        kind = builtins.get(name)
        # StopIteration would end a loop over map(candidate, ...) early, and with it the tests.
        if isinstance(kind, type) and issubclass(kind, Exception) and "Iteration" not in name:
            try:
                error = kind(text)
            except TypeError:  # UnicodeDecodeError wants five arguments
                error = RuntimeError(f"{name}: {text}")
        else:
            error = RuntimeError(f"{name}: {text}")
        raise error

    builtins = dict(sys.modules["builtins"].__dict__)
    namespace = new_module("tests")
    candidate.__name__ = job["entry_point"]
    try:
        exec(compile(job["prelude"], "prelude.py", "exec"), namespace)
        namespace["candidate"] = namespace[job["entry_point"]] = candidate
        exec(compile(job["tests"], "tests.py", "exec"), namespace)
        if "check" in namespace:
            namespace["check"](candidate)
        outcome = ["passed", "", ""]
    except BaseException as error:
        outcome = ["failed", *describe(error)]
    write_frame(replies, message_id, b"E" + encode([*outcome, state["calls"], state["bad"]]))


def run_program(job):
    """The solution as a script: what is left in the pipe is its standard input."""
    try:  # noqa: SIM105 - contextlib would have to be imported
        posix.dup2(posix.open("/dev/null", posix.O_RDWR), 2)
    except (AttributeError, OSError):
        pass
    namespace = new_module("__main__")
    for source in (job["prelude"], job["code"]):
        exec(compile(source, "solution.py", "exec"), namespace)


def main():
    sys.path[:] = [place for place in sys.path if place]
    builtins = sys.modules["builtins"].__dict__
    builtins["exit"] = builtins["quit"] = sys.exit  # what site would have added
    write_frame(1, bytes(ID_BYTES), b"ready")
    message_id, payload = read_frame(0)
    job = decode(payload)
    if job["role"] == "program":
        return run_program(job)
    try:
        requests, replies, null = posix.dup(0), posix.dup(1), posix.open("/dev/null", posix.O_RDWR)
        for fd in (0, 1, 2):
            posix.dup2(null, fd)
    except (AttributeError, OSError):  # WebAssembly has no dup; its stderr leads nowhere
        requests, replies, sys.stdout = 0, 1, sys.stderr
    run = serve_solution if job["role"] == "solution" else run_tests
    run(requests, replies, message_id, job)


if __name__ == "__main__":
    main()
