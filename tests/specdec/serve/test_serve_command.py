"""`specdec serve` and its siblings in Python: what they say before there is a server, and how they end."""

from __future__ import annotations

import socket
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from in_process_server import InProcess
from typer.testing import CliRunner

from specdec import serve
from specdec.cli import app
from specdec.cli.serve import _name
from specdec.engine import EngineClosedError
from specdec.pairing.chosen import chosen_pair
from specdec.serve.server import _bound


def command(*words: object) -> Any:
    return CliRunner().invoke(app, ["serve", *map(str, words)])


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "specdec.serve.server", None)
    found = command()
    assert found.exit_code == 1
    assert "pip install 'specdec-lm[serve]'" in found.output


def test_bad_options_are_usage_errors(tmp_path: Path) -> None:
    for words in (["--api-key-file", tmp_path / "none"], ["--port", "70000"], ["--max-rows", "0"], ["--rule", "best"]):
        assert command(*words).exit_code == 2


def test_a_taken_port_is_one_line(tiny_pair: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = command("--pair", tiny_pair, "--port", taken.getsockname()[1])
    assert found.exit_code == 1
    assert found.output.strip().splitlines()[-1].startswith("error: ")
    assert "in use" in found.output
    assert "--port" in found.output


def test_an_address_of_another_machine_is_one_line_too() -> None:
    with (
        pytest.raises(OSError, match=r"cannot listen at 192\.0\.2\.1, port 0: .*--host"),
        _bound(serve.ServeOptions(host="192.0.2.1", port=0)),
    ):
        pass


def test_the_name_of_a_target_is_its_own() -> None:
    assert _name(chosen_pair(target="owner/Model-1B", draft="self:int8"), True) == "owner/Model-1B"
    assert _name(chosen_pair(), False) == "stdlib-python"


def test_it_listens_to_this_machine_only() -> None:
    with _bound(serve.ServeOptions(port=0)) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"


def test_a_server_in_a_thread_ends_with_its_block(tiny_pair: Path) -> None:
    made = InProcess(tiny_pair)
    with serve.running(made.engine, made.tokenizer, "tiny", serve.ServeOptions(port=0)) as address:
        with urllib.request.urlopen(f"{address}/health") as answer:
            assert answer.status == 200
    assert not made.engine.threaded
    assert not [one for one in threading.enumerate() if one.name.startswith("specdec")]
    with pytest.raises(EngineClosedError):
        made.engine.submit([1])
