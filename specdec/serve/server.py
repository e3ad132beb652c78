"""The process: uvicorn, and an end in which every stream is finished."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from specdec.engine import Engine, EngineClosedError
from specdec.serve.app import create_app
from specdec.serve.lifecycle import Lifecycle
from specdec.serve.options import ServeOptions

_LEFT_OVER_SECONDS = 5
"""What connections without a generation have left in the end."""


def run(
    engine: Engine,
    tokenizer: Any,
    name: str,
    options: ServeOptions | None = None,
    rule: str = "auto",
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what has begun; a second signal ends everything at once.

    Args:
        tokenizer, name, rule: see `create_app`. ready: called with the address as soon as requests are taken.

    Raises:
        OSError: the address cannot be had. UnsupportedArgumentError: as `create_app`.
    """
    options = options or ServeOptions()
    with _bound(options) as bound:
        _server(engine, tokenizer, name, options, rule, bound, ready).run(sockets=[bound])


@contextmanager
def running(
    engine: Engine, tokenizer: Any, name: str, options: ServeOptions | None = None, rule: str = "auto"
) -> Iterator[str]:
    """The address of a server in a thread of this process, which ends with the block: for notebooks and tests.

    Arguments and errors are those of `run`. The engine is closed in the end.
    """
    options = options or ServeOptions()
    started, address = threading.Event(), ""

    def ready(at: str) -> None:
        nonlocal address
        address = at
        started.set()

    with _bound(options) as bound:
        server = _server(engine, tokenizer, name, options, rule, bound, ready)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="specdec-serve")
        thread.start()
        try:
            while thread.is_alive() and not started.wait(0.05):
                continue
            if not address:
                raise EngineClosedError("the server did not start: its log says why")
            yield address
        finally:
            server.lifecycle.drain()
            thread.join()


def _server(
    engine: Engine,
    tokenizer: Any,
    name: str,
    options: ServeOptions,
    rule: str,
    bound: socket.socket,
    ready: Callable[[str], None],
) -> _Server:
    app = create_app(engine, tokenizer, name, options, rule)
    config = uvicorn.Config(
        app, log_config=None, log_level="error", access_log=False, server_header=False,
        limit_concurrency=options.max_connections, timeout_graceful_shutdown=_LEFT_OVER_SECONDS,
    )  # fmt: skip
    host, port = bound.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return _Server(config, app.state.lifecycle, lambda: ready(address))


def _bound(options: ServeOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((options.host, options.port))
    except OSError as error:
        bound.close()
        taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
        instead = "give another --port (0 takes a free one)" if taken else "give an address of this machine as --host"
        raise OSError(f"cannot listen at {options.host}, port {options.port}: {error.strerror}; {instead}") from error
    return bound


class _Server(uvicorn.Server):
    """Drains before it shuts down: uvicorn alone would not let anybody hear why he is turned away."""

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, ready: Callable[[], None]):
        super().__init__(config)
        self.lifecycle, self._ready = lifecycle, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.lifecycle.draining:
            self.should_exit = self.force_exit = True
        self.lifecycle.drain()

    async def on_tick(self, counter: int) -> bool:
        if self.lifecycle.drained():
            self.should_exit = True
        return await super().on_tick(counter)
