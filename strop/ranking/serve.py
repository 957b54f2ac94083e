"""The ranking page on a socket: loopback unless told otherwise, and never open to a network without a token."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Sequence

import uvicorn

from strop.ranking.app import build_app
from strop.ranking.security import LOOPBACK
from strop.ranking.store import PreferenceStore

MIN_TOKEN = 16


def serve(
    store: PreferenceStore,
    *,
    host: str = "127.0.0.1",
    port: int = 8417,
    allowed_hosts: Sequence[str] = (),
    token: str | None = None,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serve until SIGINT or SIGTERM; on_ready gets the page's URL once the socket listens. Port 0 takes a free one.

    Raises ValueError for a host that is not loopback without a token, a token short enough to guess, and a port that
    is taken.
    """
    if host not in LOOPBACK and token is None:
        raise ValueError(f"--host {host} opens the page to a network: give a --token-file too")
    if token is not None and len(token) < MIN_TOKEN:
        raise ValueError(f"the token has {len(token)} characters; it needs at least {MIN_TOKEN} that nobody can guess")
    app = build_app(store, allowed_hosts=(*LOOPBACK, *named_by(host), *allowed_hosts), token=token)
    with contextlib.closing(listen(host, port)) as listening:
        name = f"[{host}]" if ":" in host else host
        on_ready(f"http://{name}:{listening.getsockname()[1]}/")
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none"
        )
        uvicorn.Server(config).run(sockets=[listening])


def named_by(host: str) -> tuple[str, ...]:
    """Every address (0.0.0.0) is no name that a browser would ask for: those must be given as allowed hosts."""
    return () if host in ("0.0.0.0", "::") else (host,)


def listen(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except (OSError, OverflowError) as error:
        listening.close()
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        remedy = "it is taken; choose another --port, or 0 for any free one" if taken else str(error)
        raise ValueError(f"--port {port} of {host}: {remedy}") from error
    return listening
