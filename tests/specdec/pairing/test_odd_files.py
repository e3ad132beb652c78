"""Odd files end in one line and an exit code, never in a traceback: pairs, configurations, weights, tokenizers."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from specdec.cli import app
from specdec.kv import SpecdecError
from specdec.pairing import PairError, find_pair
from specdec.pairing.loading import load_model, load_tokenizer

CPU = torch.device("cpu")
PIECES = (
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\n",
    b'"',
    b"'''",
    b"[",
    b"[[",
    b"]",
    b"{",
    b"}",
    b"=",
    b",",
    b"nan",
    b"-inf",
    b"1e999",
    b"-1",
    b"9" * 5000,
    b"9" * 25,
    b"0x",
    b"true",
    b"1979-05-27",
    b"[" * 3000,
    b"\\u0000",
    b"\xf0\x9f\x98\x80",
    b"null",
    b"[]",
)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "500"})


def one_line_error(result: Any, what: object) -> None:
    """An exit code that is documented, and what the user is told."""
    assert result.exit_code in (0, 1, 2), (what, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), (what, result.exception)
    assert "Traceback" not in result.output, what


def mutated(content: bytes, rng: random.Random) -> bytes:
    """`content` with one to three changes of the kind that editors, disks and people make."""
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(content) + 1), rng.choice([0, 0, 1, 4, 40])
        kind = rng.randrange(5)
        if kind == 0:
            content = content[:at]
        elif kind == 1:
            content = content[:at] + content[at + 1 :]
        elif kind == 2 and content:
            at = min(at, len(content) - 1)
            content = content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        elif kind == 3:  # another value
            line = content.rfind(b"=", 0, at)
            end = content.find(b"\n", line)
            if line >= 0 and end >= 0:
                content = content[: line + 1] + b" " + rng.choice(PIECES) + content[end:]
        else:
            content = content[:at] + rng.choice(PIECES) + content[at + length :]
    return content


def test_mutated_pair_files(tmp_path: Path) -> None:
    """200 of them, and every command that reads a pair without loading it."""
    rng, codes = random.Random(0), set()
    good = invoke("pairs", "show", "llama-3.1-8b-1b").stdout.encode()
    commands = (("validate",), ("show",), ("export", "--to", "vllm"), ("export", "--to", "tensorrt-llm"), ("estimate",))
    for number in range(200):
        path = tmp_path / "pair.toml"
        path.write_bytes(mutated(good, rng))
        command, *options = commands[number % len(commands)]
        result = invoke("pairs", command, path, *options)
        one_line_error(result, path.read_bytes())
        codes.add(result.exit_code)
    assert codes == {0, 1, 2}  # control: some are still sound, and both kinds of errors occur
    assert invoke("pairs", "validate", tmp_path / "pair.toml").exit_code in (0, 1)


ODD_PAIRS = {
    "empty": b"",
    "a BOM and nothing": b"\xef\xbb\xbf",
    "no UTF-8": b"schema = 1\nname = '\xff'",
    "UTF-16": "schema = 1".encode("utf-16"),
    "tables for strings": b"schema = 1\nsummary = 'x'\n[[name]]\na = 1\n",
    "nan": b"schema = nan",
    "true": b"schema = true",
    "digits": b"schema = " + b"9" * 5000,
    "deep": b"schema = " + b"[" * 5000,
    "a date": b"schema = 1979-05-27",
    "a NUL": b'schema = 1\nname = "a"\nsummary = "s"\n[target]\npath = "a\\u0000b"\n[draft]\nkind = "ngram"\n',
    "nobody's home": b'schema = 1\nname = "a"\nsummary = "s"\n[target]\npath = "~nobody/x"\n[draft]\nkind = "ngram"\n',
    "a huge float": b'schema = 1\nname = "a"\nsummary = "s"\n[target]\nmodel = "a/b"\n[draft]\nkind = "ngram"\n'
    + b"[[published]]\nspeedup = "
    + b"9" * 400,
}


def test_odd_pair_files(tmp_path: Path) -> None:
    for name, content in ODD_PAIRS.items():
        path = tmp_path / "pair.toml"
        path.write_bytes(content)
        with pytest.raises(PairError) as error:
            find_pair(path)
        assert "\n" not in str(error.value), name
        assert len(str(error.value)) < 500, name
        for command in (("pairs", "show", path), ("generate", "-p", "x", "--pair", path)):
            result = invoke(*command)
            one_line_error(result, name)
            assert result.exit_code == 2, name


def test_pairs_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "pair.toml").mkdir()
    for pair in (tmp_path, tmp_path / "pair.toml", "x" * 5000, "~nobody/x", "", "\x1b[2J", tmp_path / "a\nb"):
        result = invoke("pairs", "show", pair)
        one_line_error(result, pair)
        assert result.exit_code == 2
    with pytest.raises(PairError, match="expected a shipped pair"):
        find_pair("a\0b")


def test_a_file_of_an_editor_that_writes_a_bom_is_read(tmp_path: Path) -> None:
    """Control."""
    path = tmp_path / "pair.toml"
    path.write_bytes(b"\xef\xbb\xbf" + invoke("pairs", "show", "llama-3.1-8b-1b").stdout.encode())
    assert find_pair(path).name == "llama-3.1-8b-1b"


@pytest.fixture
def model(tiny_pair: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_pair / "target", tmp_path / "target")
    return tmp_path / "target"


def test_mutated_weights_and_configurations_are_described_or_refused(model: Path) -> None:
    """What reads headers and configurations without loading anything."""
    rng, codes = random.Random(1), set()
    for number in range(60):
        name = "config.json" if number % 2 else "model.safetensors"
        good = (model / name).read_bytes()
        head = good[:3000]
        (model / name).write_bytes(mutated(head, rng) + good[3000 if rng.random() < 0.8 else 4000 :])
        result = invoke("pairs", "new", "--target", model, "--draft", "ngram")
        one_line_error(result, (model / name).read_bytes()[:3000])
        codes.add(result.exit_code)
        (model / name).write_bytes(good)
    assert codes == {0, 2}


CONFIGS: dict[str, Any] = {
    "a list": [],
    "a word": "llama",
    "null": None,
    "empty": {},
    "no type": {"model_type": None},
    "a number for a type": {"model_type": 5},
    "an unknown type": {"model_type": "nothing"},
    "another type": {"model_type": "t5"},
    "no heads": {"num_attention_heads": 0},
    "negative": {"hidden_size": -32},
    "a word for a size": {"hidden_size": "big"},
    "a float": {"num_hidden_layers": 2.5},
    "larger": {"intermediate_size": 96},
    "more layers": {"num_hidden_layers": 3},
    "a list for a size": {"vocab_size": [257]},
    "odd rope": {"rope_parameters": {"rope_type": "nothing"}},
    "odd activation": {"hidden_act": "nothing"},
    "control": {"not_an_entry_of_any_model": []},
    "an odd dtype": {"dtype": "float17"},
}


def test_odd_configurations_are_one_line(model: Path) -> None:
    good = json.loads((model / "config.json").read_text())
    for name, change in CONFIGS.items():
        config = {**good, **change} if isinstance(change, dict) and change else change
        (model / "config.json").write_text(json.dumps(config))
        if name in ("control", "an odd dtype"):  # the caller's own dtype goes before the file's
            load_model("target", str(model), torch.float32, CPU)
            continue
        with pytest.raises(SpecdecError) as error:
            load_model("target", str(model), torch.float32, CPU)
        assert str(error.value).startswith("target: could not load a causal language model from"), name
        assert "\n" not in str(error.value), name
    result = invoke("generate", "-p", "x", "--target", model, "--device", "cpu")
    one_line_error(result, "config")


def test_odd_weights_and_tokenizers_are_one_line(model: Path) -> None:
    load_model("target", str(model), torch.float32, CPU)  # control
    good = (model / "model.safetensors").read_bytes()
    size = int.from_bytes(good[:8], "little")
    odd = {
        "empty": b"",
        "short": good[:4],
        "half a header": good[: size // 2],
        "half": good[: len(good) // 2],
        "one byte": good[:-1],
        "a huge header": b"\xff" * 8 + good[8:],
        "no JSON": good[:8] + b"x" * size + good[8 + size :],
        "a weight of another name": good.replace(b"lm_head.weight", b"lm_hair.weight"),
        "another dtype": good.replace(b'"F32"', b'"F99"'),
    }
    for name, content in odd.items():
        (model / "model.safetensors").write_bytes(content)
        with pytest.raises(SpecdecError, match="could not load a causal language model") as error:
            load_model("target", str(model), torch.float32, CPU)
        assert "\n" not in str(error.value), name
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()
    with pytest.raises(SpecdecError, match="could not load"):
        load_model("target", str(model), torch.float32, CPU)
    for content in (b"", b"[]", b"{}", b'{"model": 1}', b"\xff", b"[" * 5000):
        (model / "tokenizer.json").write_bytes(content)
        with pytest.raises(SpecdecError, match="could not load a tokenizer") as error:
            load_tokenizer(str(model))
        assert "\n" not in str(error.value)
    result = invoke("generate", "-p", "x", "--target", model, "--device", "cpu")
    one_line_error(result, "tokenizer")
    assert result.exit_code == 1
