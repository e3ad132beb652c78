"""`specdec serve` as a process of its own, and a client that can misbehave as no library does."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any

START_SECONDS = 100


class LiveServer:
    """Serves a pair until the end of the block; `options` are the command's.

    Attributes:
        address: "http://127.0.0.1:PORT". greeting: what it said at its start.
    """

    def __init__(self, pair: Path | str, *options: str):
        command = [sys.executable, "-m", "specdec", "serve", "--pair", str(pair), "--port", "0", "--threads", "1"]
        self._command = [*command, *options]
        self.greeting: list[str] = []

    def __enter__(self) -> LiveServer:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert self.process.stdout is not None
            while not self.greeting or "Ctrl-C" not in self.greeting[-1]:
                line = self.process.stdout.readline()
                assert line, self.end()[1]
                self.greeting.append(line)
            (self.address,) = set(re.findall(r"http://[\d.:]+", "".join(self.greeting)))
            self.port = int(self.address.rsplit(":", 1)[1])
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.end()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise

    def end(self) -> tuple[int, str]:
        """Wait for its end: exit code and what it wrote to stderr."""
        _, errors = self.process.communicate(timeout=START_SECONDS)
        return self.process.returncode, errors

    @property
    def resident_mib(self) -> float:
        """Its memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (kib,) = re.findall(r"VmRSS:\s+(\d+) kB", status)
        return int(kib) / 1024

    def metrics(self) -> dict[str, float]:
        """Samples by name and labels, the model's name left out."""
        with urllib.request.urlopen(f"{self.address}/metrics") as answer:
            text = answer.read().decode()
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {re.sub(r',?model_name="[^"]*"', "", name).replace("{}", ""): float(value) for name, value in lines}


class Connection:
    """One request over a connection of its own, written and read by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer
        self.status = 0
        self.headers: dict[str, str] = {}

    @classmethod
    async def post(cls, port: int, path: str, body: Any) -> Connection:
        """Sends a body, JSON of whatever is not bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        return await cls.raw(port, f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    @classmethod
    async def raw(cls, port: int, data: bytes) -> Connection:
        """Sends anything."""
        made = cls(*await asyncio.open_connection("127.0.0.1", port))
        made._writer.write(data)
        await made._writer.drain()
        return made

    async def begun(self) -> int:
        """Reads the head of the answer; its status, 0 where the connection was closed without one."""
        try:
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        except (asyncio.IncompleteReadError, ConnectionError):
            return 0
        first, *rest = head.strip().split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in rest)}
        return self.status

    async def whole(self) -> Any:
        """The answer's body of JSON."""
        parts = [part async for part in self._parts()]
        return json.loads(b"".join(parts))

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Of a stream, up to its [DONE], which must be there."""
        rest, done = b"", False
        async for part in self._parts():
            *whole, rest = (rest + part).split(b"\n\n")
            for event in whole:
                assert not done, "an event behind [DONE]"
                assert event.startswith(b"data: "), event
                done = event == b"data: [DONE]"
                if not done:
                    yield json.loads(event[6:].decode("utf-8"))
        assert done, "a stream without [DONE]"
        assert not rest

    async def _parts(self) -> AsyncIterator[bytes]:
        if "content-length" in self.headers:
            yield await self._reader.readexactly(int(self.headers["content-length"]))
            return
        while size := int(await self._reader.readline(), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readexactly(2)

    async def close(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            pass

    def abort(self) -> None:
        """As a client that is killed: without a goodbye."""
        self._writer.transport.abort()
