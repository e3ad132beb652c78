"""`specdec pairs` and `--pair`: what is printed, exit codes, round trips, and no torch where none is needed."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from specdec.cli import app
from specdec.cli.options import ModelChoice
from specdec.experiments.accept.setting import Cell
from specdec.experiments.accept.setting import Setting as Drafting
from specdec.experiments.accept.store import Store
from specdec.pairing import find_pair, pair_names
from specdec.pairing.export import ENGINES
from specdec.pairing.roofline import Setting, step_cost

ROOT = Path(__file__).resolve().parents[3]
PROMPT = "def parse(argv):\n    "


def invoke(*arguments: object, **fields: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "500"}, **fields)


def ok(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def test_list_has_every_pair() -> None:
    head, *lines = ok("pairs", "list").splitlines()
    assert head.split() == ["pair", "draft", "parameters", "summary"]
    assert [line.split()[0] for line in lines] == pair_names()
    assert "8.0B + 1.2B" in next(line for line in lines if line.startswith("llama-3.1-8b-1b "))
    assert [table["name"] for table in json.loads(ok("pairs", "list", "--json"))] == pair_names()


def test_show_prints_the_file_and_what_follows(tmp_path: Path) -> None:
    text = ok("pairs", "show", "llama-3.1-8b-1b")
    copy = tmp_path / "copy.toml"
    copy.write_text(text)
    assert find_pair(copy).target == find_pair("llama-3.1-8b-1b").target
    assert "131,072 bytes of K/V per token" in text
    shown = json.loads(ok("pairs", "show", "llama-3.1-8b-1b", "--json"))
    assert shown["derived"]["target"]["kv_bytes_per_token"] == 131072
    assert shown["draft"]["model"] == "meta-llama/Llama-3.2-1B-Instruct"


def test_validate(tmp_path: Path) -> None:
    assert ok("pairs", "validate").count("ok ") == len(pair_names())
    bad, broken = tmp_path / "bad.toml", tmp_path / "broken.toml"
    text = ok("pairs", "show", "qwen3-8b-0.6b")
    bad.write_text(text.replace("summary", 'dtype = "int3"\nsummary').replace("num_layers = 36", "num_layers = 0"))
    broken.write_text("schema = [")
    result = invoke("pairs", "validate", bad, "qwen3-8b-0.6b", broken)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    assert "dtype: expected one of auto" in lines[0]
    assert "num_layers: expected at least 1, got 0" in lines[1]
    assert lines[2] == "ok     qwen3-8b-0.6b"
    assert "broken.toml: expected a TOML file" in lines[3]
    assert "2 of 3 pairs are not sound" in result.stderr


def test_new_validate_export_estimate(tiny_pair: Path, tmp_path: Path) -> None:
    """The round trip of a user's own pair."""
    path = tmp_path / "my" / "tiny.toml"
    result = invoke("pairs", "new", "--target", tiny_pair / "target", "--draft", tiny_pair / "draft", "--name", "tiny",
                    "--k", 3, "-o", path)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert ok("pairs", "validate", path).startswith("ok ")
    pair = find_pair(path)
    assert pair.target.facts is not None
    assert (pair.target.facts.num_layers, pair.target.facts.vocab_size, pair.draft_length) == (2, 257, 3)
    for engine in ENGINES:
        assert str(tiny_pair / "target") in ok("pairs", "export", path, "--to", engine)
    assert json.loads(ok("pairs", "export", path, "--to", "vllm", "--json"))["arguments"]["num_speculative_tokens"] == 3
    assert "ESTIMATE" in ok("pairs", "estimate", path)
    again = invoke("pairs", "new", "--target", tiny_pair / "target", "--draft", "ngram", "-o", path)
    assert again.exit_code == 2
    assert "exists; remove it or choose another name" in again.stderr


def test_new_writes_paths_that_move_with_the_file(tiny_pair: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_pair, tmp_path / "a" / "models")
    ok(
        "pairs",
        "new",
        "--target",
        tmp_path / "a" / "models" / "target",
        "--draft",
        "ngram",
        "-o",
        tmp_path / "a/x.toml",
    )
    (tmp_path / "a").rename(tmp_path / "b")
    pair = find_pair(tmp_path / "b" / "x.toml")
    assert pair.target.path == "models/target"
    assert pair.location(pair.target) == str(tmp_path / "b" / "models" / "target")


def test_new_says_what_it_does_not_know() -> None:
    result = invoke("pairs", "new", "--target", "owner/big", "--draft", "owner/small")
    assert result.exit_code == 0
    assert 'name = "big-small"' in result.stdout
    assert "no facts about the target" in result.stderr
    assert "no facts about the draft" in result.stderr


def test_estimate() -> None:
    text = ok("pairs", "estimate", "llama-3.3-70b-1b", "--device", "h200", "--weight-bits", 8)
    assert text.startswith("ESTIMATE from bytes and operations")
    assert "not a measurement" in text
    assert "fits" in text
    assert "no acceptance published; at these costs it takes 4." in text
    assert "assumed: " in text
    assert "no estimate can know" not in text
    lookup = ok("pairs", "estimate", "llama-3.1-8b-ngram")
    assert "How often n-grams find anything depends on your texts: no estimate can know it." in lookup
    assert json.loads(ok("pairs", "estimate", "llama-3.1-8b-ngram", "--json"))["hit_rate"].startswith("unknown")


def test_estimate_with_a_measured_acceptance(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    store.open({})
    measured = {("ngram:k=6", "naive"): ([6, 0, 6, 0], [3, 0, 1, 0]), ("model:k=3", "block"): ([3, 2], [3, 0])}
    for (drafter, rule), (drafted, accepted) in measured.items():
        turn = {"token_ids": list(range(sum(accepted) + len(accepted))), "drafted": drafted, "accepted": accepted}
        store.append(
            "run",
            {"cell": str(Cell(Drafting.parse(drafter), rule, 1.0)), "prompt": "a", "domain": "a", "turns": [turn]},
        )
    common = ("--measured", tmp_path / "run", "--json")
    (lookup,) = json.loads(ok("pairs", "estimate", "llama-3.1-8b-ngram", *common))["measured"]
    assert (lookup["drafter"], lookup["rule"], lookup["temperature"]) == ("ngram:k=6", "naive", 1.0)
    assert (lookup["drafting"], lookup["tokens_per_pass"]) == (0.5, 2.0)
    pair, setting = find_pair("llama-3.1-8b-1b"), Setting()
    (model,) = json.loads(ok("pairs", "estimate", "llama-3.1-8b-1b", *common))["measured"]
    cost = step_cost(pair, setting, 3, 3) + step_cost(pair, setting, 2, 2)
    assert model["speedup"] == pytest.approx(5 / cost)
    assert step_cost(pair, setting, 0, 0) == 1.0
    said = ok("pairs", "estimate", "llama-3.1-8b-ngram", "--measured", tmp_path / "run")
    assert re.search(r"ngram:k=6 +naive +1 +50% +2\.00 +\d\.\d\dx", said)
    none = invoke("pairs", "estimate", "llama-3.1-8b-ngram", "--measured", tmp_path)
    assert (none.exit_code, "expected the folder of a run" in none.stderr) == (2, True)
    assert "DOES NOT FIT" in ok("pairs", "estimate", "llama-3.3-70b-1b", "--device", "rtx4090")
    table = json.loads(ok("pairs", "estimate", "llama-3.1-8b-eagle3", "--json"))
    assert table["label"].startswith("ESTIMATE")
    assert table["published"][0]["estimate"] == pytest.approx(4.44, rel=0.25)
    assert [gain["alpha"] for gain in table["gains"]] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "nothing-like-it"], "a shipped pair"),
        (["export", "stdlib-python", "--to", "gpt"], "engine: expected one of vllm"),
        (["export", "llama-3.1-8b-eagle3", "--to", "transformers"], "cannot be exported to transformers"),
        (["export", "stdlib-python"], "Missing option '--to'"),
        (["estimate", "stdlib-python", "--device", "abacus"], "device: expected one of"),
        (["estimate", "stdlib-python", "--weight-bits", "0"], "weight_bits: expected 1 to 64"),
        (["new", "--target", "./nowhere", "--draft", "ngram"], "expected a folder with a saved model or a hub id"),
        (["new", "--target", "a/b", "--draft", "a b"], "expected a hub id such as owner/name"),
        (["new", "--target", "a/b", "--draft", "ngram", "--tree", "2"], "an n-gram drafter has no static tree"),
        (["new", "--target", "a/b", "--draft", "a/c", "--rule", "wish"], "rule: expected one of auto"),
        (["new", "--target", "a/b", "--draft", "ngram", "--name", "A!"], "name: expected lower-case"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_exits_with_2_and_one_message(arguments: list[str], said: str) -> None:
    result = invoke("pairs", *arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


# --- --pair of the other commands ---------------------------------------------------------------------------------


def toml(folder: Path, tiny_pair: Path, *extra: object, draft: object = None) -> Path:
    path = folder / "own.toml"
    ok("pairs", "new", "--target", tiny_pair / "target", "--draft", draft or tiny_pair / "draft", "-o", path, *extra)
    return path


def generate(*arguments: object) -> Any:
    return invoke("generate", "-p", PROMPT, "-n", 24, "--device", "cpu", "--json", *arguments)


def test_generate_takes_files_with_their_settings(tiny_pair: Path, tmp_path: Path) -> None:
    plain = json.loads(generate("--pair", tiny_pair, "--draft", "none").stdout)["token_ids"]
    own = json.loads(generate("--pair", toml(tmp_path, tiny_pair, "--tree", "2,1")).stdout)
    (tmp_path / "own.toml").unlink()
    lookup = json.loads(generate("--pair", toml(tmp_path, tiny_pair, "-k", 5, draft="ngram")).stdout)
    assert own["token_ids"] == lookup["token_ids"] == plain
    assert (own["report"]["drafter"], lookup["report"]["drafter"]) == ("model", "ngram")


def test_the_choice_is_the_pairs_unless_options_say_otherwise(tiny_pair: Path, tmp_path: Path) -> None:
    def choice(pair: object, draft: str | None = None, k: object = None, rule: str = "auto") -> ModelChoice:
        return ModelChoice.of(
            None, draft, str(pair), None, None if k is None else str(k), None, rule, "auto", "cpu", None
        )

    path = toml(tmp_path, tiny_pair, "--tree", "2,1", "--rule", "traversal")
    found = choice(path)
    assert (found.k, found.tree, found.rule, found.pair.dtype) == (None, (2, 1), "traversal", "bfloat16")
    assert (choice(path, k=2).k, choice(path, k=2).tree) == (2, None)
    assert (choice(path, k="auto").k, choice(path, k="auto").tree) == (None, None)  # planned, in place of its tree
    assert choice(path, rule="naive").rule == "naive"
    other = choice(path, draft="ngram")
    assert (other.draft, other.tree, other.rule) == ("ngram", None, "auto")
    hub = choice("qwen3-8b-0.6b")
    assert (hub.target, hub.draft, hub.pair.dtype) == ("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B", "bfloat16")
    # Another draft on the target of a pair whose own is not run here.
    assert choice("llama-3.1-8b-eagle3", draft="ngram").target == "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize(
    ("pair", "code", "said"),
    [
        ("llama-3.1-8b-eagle3", 2, "does not run eagle3 heads"),
        ("gemma-2-9b-vicuna-68m", 2, "mismatched vocabularies"),
        ("llama-3.1-8b", 2, "did you mean llama-3.1-8b-1b"),
        ("smollm2-1.7b-135m", 1, "it is not on this machine and the hub cannot be reached"),
    ],
)
def test_a_pair_that_cannot_run_is_one_clear_error(pair: str, code: int, said: str) -> None:
    result = generate("--pair", pair)
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_pair_of_two_vocabularies_is_an_error_an_own_draft_a_warning(tiny_pair: Path, tmp_path: Path) -> None:
    """Any --draft may be tried, it can cost speed only; a pair that cannot work is a mistake in the pair."""
    import shutil

    from other_tokenizers import reversed_tokenizer

    shutil.copytree(tiny_pair, tmp_path / "pair")
    reversed_tokenizer().save_pretrained(tmp_path / "pair" / "draft")
    refused = generate("--pair", tmp_path / "pair")
    assert refused.exit_code == 1
    assert "mismatched vocabularies: target and draft agree on 0%" in refused.stderr
    tried = generate("--pair", tiny_pair, "--draft", tmp_path / "pair" / "draft")
    assert tried.exit_code == 0
    assert "different vocabularies" in tried.stderr


def test_no_torch_where_nothing_is_loaded() -> None:
    """All that `specdec pairs` calls, in a fresh process; what the whole command line imports is test_layout's."""
    code = """
import sys
from specdec.pairing import find_pair, pair_names
from specdec.pairing.create import new_pair
from specdec.pairing.export import ENGINES, export_pair
from specdec.pairing.registry import pair_text
from specdec.pairing.roofline import Setting, estimate
from specdec.pairing.runnable import refusal
for name in pair_names():
    pair_text(find_pair(name)), refusal(find_pair(name)), estimate(find_pair(name), Setting())
new_pair("a/b", "ngram"), [export_pair(find_pair("stdlib-python"), engine) for engine in ENGINES]
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600, check=True
    )
    assert done.stdout.strip() == "[]"
    for module in ("pairs", "pairs_text"):
        tree = ast.parse((ROOT / "specdec" / "cli" / f"{module}.py").read_text())
        froms = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        ours = {name for name in froms if name.startswith("specdec")}
        assert all(name.startswith(("specdec.pairing", "specdec.cli")) for name in ours)
        assert "specdec.pairing.loading" not in ours
