"""The server on a socket: loopback unless told otherwise, and never open to a network without a key."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Sequence

import uvicorn

from strop.ranking.security import LOOPBACK
from strop.ranking.serve import listen, named_by
from strop.serving.app import build_app
from strop.serving.limits import Limits
from strop.serving.models import ServedModel
from strop.serving.preferences import Preferences
from strop.serving.worker import Worker

MIN_KEY = 16


def serve(
    models: Sequence[ServedModel],
    *,
    limits: Limits,
    host: str = "127.0.0.1",
    port: int = 8000,
    allowed_hosts: Sequence[str] = (),
    key: str | None = None,
    preferences: Preferences | None = None,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serve until SIGINT or SIGTERM, then finish what is under way (a second signal does not wait) and return.

    on_ready gets the URL once the socket listens. Raises ValueError for a host that is not loopback without a key, a
    key short enough to guess, and a port that is taken.
    """
    if host not in LOOPBACK and key is None:
        raise ValueError(f"--host {host} opens the server to a network: give an --api-key-file too")
    if key is not None and (len(key) < MIN_KEY or not key.isascii()):
        raise ValueError(f"the API key has {len(key)} characters; it needs at least {MIN_KEY}, in ASCII")
    hosts = (*LOOPBACK, *named_by(host), *allowed_hosts)
    with contextlib.closing(listen(host, port)) as listening, Worker(models, max_queue=limits.max_queue) as worker:
        app = build_app(models, worker, limits=limits, allowed_hosts=hosts, key=key, preferences=preferences)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            http="h11",
            h11_max_incomplete_event_size=64 * 1024,
            timeout_graceful_shutdown=round(limits.request_seconds),
        )
        name = f"[{host}]" if ":" in host else host
        on_ready(f"http://{name}:{listening.getsockname()[1]}/")
        with _signals_ignored():
            uvicorn.Server(config).run(sockets=[listening])


@contextlib.contextmanager
def _signals_ignored():
    """uvicorn takes the signals for itself, and raises them again once it has stopped: that is then no surprise."""
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
