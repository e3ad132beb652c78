"""Servers as ways to serve: each a process of its own on the run's own models, asked over HTTP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from time import monotonic, sleep
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import torch

from specdec.experiments.pair import Models
from specdec.experiments.serving.http_load import serve_by_http
from specdec.experiments.serving.ways import Outcome, Serve, Workload
from specdec.experiments.ways import Way
from specdec.pairing.gguf import export_model
from specdec.shown_errors import ExperimentError

START_SECONDS = 300
_MIB = 256


def server_ways(k: int, llama_python: str) -> list[Way]:
    """`specdec serve`, planned and without drafts; `transformers serve`, with continuous batching and without; and
    llama.cpp's (by that Python, which may be another environment's).

    What no peer does by itself is asked of none: no end token ends a text, as in the other ways.
    """
    return [
        Way("specdec-serve", partial(_specdec, k, None), calls_modules=False),
        Way("specdec-serve-plain", partial(_specdec, None, "none"), calls_modules=False),
        Way("transformers-serve", partial(_transformers, ()), calls_modules=False),
        Way("transformers-serve-batch", partial(_transformers, ("--continuous-batching",)), calls_modules=False),
        Way("llama-cpp-server", partial(_llama, llama_python), calls_modules=False),
    ]


def _specdec(k: int | None, draft: str | None, models: Models, most: int, ending: ExitStack) -> Serve:
    folder = _saved(models, ending)
    drafted = ["--draft", "none"] if k is None else ["--k", str(k)]
    if k is not None and models.draft_model is None:
        drafted += ["--draft", "ngram"]
    port = _free_port()
    command = ["specdec", "serve", *_named(folder, models), *drafted, "--port", str(port), "--kv-mib", str(_MIB)]
    fields = {"model": "", "ignore_eos": True}
    return _served([sys.executable, "-m", *command, *_threads(), "--max-rows", str(most)], port, models, fields, ending)


def _named(folder: Path, models: Models) -> list[str]:
    return ["--target", str(folder / "target")] if models.draft_model is None else ["--pair", str(folder)]


def _transformers(batching: Sequence[str], models: Models, most: int, ending: ExitStack) -> Serve:
    target, port = _saved(models, ending) / "target", _free_port()
    code = "import os, sys, torch; torch.set_num_threads(int(sys.argv.pop(1))); "
    code += "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, _threads()[1], "serve", str(target), "--device", "cpu", *batching]
    command += ["--dtype", "float32", "--port", str(port), "--log-level", "error"]
    return _served(command, port, models, {"model": str(target)}, ending)


def _llama(other: str, models: Models, most: int, ending: ExitStack) -> Serve:
    python = other or sys.executable
    if subprocess.run([python, "-c", "import llama_cpp.server.app"], capture_output=True, check=False).returncode:
        raise ExperimentError(f"llama-cpp-server: {python} has no llama_cpp.server; see --llama-python, or --peers")
    folder, port = Path(ending.enter_context(TemporaryDirectory())), _free_port()
    path = export_model(models.target, models.tokenizer, folder / "target.gguf", "f32")
    command = [
        python,
        "-m",
        "llama_cpp.server",
        "--model",
        str(path),
        "--port",
        str(port),
        "--n_threads",
        _threads()[1],
    ]
    command += ["--verbose", "False", "--interrupt_requests", "False", "--type_k", "0", "--type_v", "0"]
    end = models.tokenizer.eos_token_id
    return _served(command, port, models, {"logit_bias": {str(end): -100}}, ending)


def _served(command: Sequence[str], port: int, models: Models, fields: Mapping[str, Any], ending: ExitStack) -> Serve:
    """The process, which ends with `ending`, as a way to serve."""
    errors = ending.enter_context(TemporaryFile())
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
    ending.callback(_end, process)
    address, deadline = f"http://127.0.0.1:{port}", monotonic() + START_SECONDS
    while not _answers(address):
        if process.poll() is not None or monotonic() > deadline:
            _end(process)
            errors.seek(0)
            told = errors.read().decode(errors="replace")[-500:]
            raise ExperimentError(f"{' '.join(command[:4])}: the server did not start: {told}")
        sleep(0.2)

    def body(work: Workload, seed: int) -> dict[str, Any]:
        return {**fields, "max_tokens": work.new_tokens, "temperature": work.temperature, "seed": seed}

    def serve(work: Workload, seed: int) -> Outcome:
        before = _cpu_seconds(process.pid)
        outcome = serve_by_http(address, models.tokenizer, body, work, seed)
        return replace(outcome, cpu_seconds=_cpu_seconds(process.pid) - before)

    return serve


def _cpu_seconds(pid: int) -> float:
    """Of a process, all its threads, by Linux; nan elsewhere."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def ending_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that servers it has started end with it. In the main thread only."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _answers(address: str) -> bool:
    try:
        with urlopen(f"{address}/health", timeout=5):
            return True
    except HTTPError:
        return True  # not everybody has this address
    except (URLError, OSError):
        return False


def _saved(models: Models, ending: ExitStack) -> Path:
    """A folder of the models as the run has them: without an end token."""
    folder = Path(ending.enter_context(TemporaryDirectory()))
    for role, model in (("target", models.target), ("draft", models.draft_model)):
        if model is not None:
            model.save_pretrained(folder / role)
            models.tokenizer.save_pretrained(folder / role)
    return folder


def _threads() -> list[str]:
    return ["--threads", str(torch.get_num_threads())]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
