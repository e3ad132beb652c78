"""Servers that an experiment starts end with it, and what they send is read as it came."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from specdec.experiments.serving.http_load import _Answer
from specdec.experiments.serving.servers import _end, ending_by_sigterm


def run(children: list[subprocess.Popen[bytes]]) -> None:
    with ending_by_sigterm(), ExitStack() as ending:
        child = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        children.append(child)
        assert child.stdin is not None
        ending.callback(child.stdin.close)
        ending.callback(_end, child)
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_ends_the_servers_of_a_run() -> None:
    before = signal.getsignal(signal.SIGTERM)
    children: list[subprocess.Popen[bytes]] = []
    with pytest.raises(SystemExit) as ended:
        run(children)
    (child,) = children
    assert ended.value.code == 143
    assert child.returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_lines_have_the_time_their_end_came_at(size: int) -> None:
    chunks = [b"data: {1}\n\nda", b"ta: {22}\n", b"\n"]
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw += b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in [*chunks, b""])
    parts = [raw[at : at + size] for at in range(0, len(raw), size)]
    answer = _Answer(0.0, [(float(i), part) for i, part in enumerate(parts)])
    found = list(answer.lines())
    assert [line for _, line in found] == [b"data: {1}", b"", b"data: {22}", b""]
    for time, line in found:
        if line:  # the chunk that its end is in was whole by then
            assert (int(time) + 1) * size >= raw.index(line[6:] + b"\n") + len(line[6:])
    if size == 1000:
        assert {time for time, _ in found} == {0.0}
