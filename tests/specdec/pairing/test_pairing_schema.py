"""The format of pairs: what a file may say, what the shipped ones say, and what is said about a wrong one."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st

from specdec.drafters import SuffixDrafter
from specdec.drafters.model import DEFAULT_K
from specdec.drafters.ngram import NgramDrafter
from specdec.pairing import Draft, Drafting, Facts, Pair, PairError, Published, Target, find_pair, pair_names
from specdec.pairing.checks import problems
from specdec.pairing.registry import pair_text, read_pair
from specdec.pairing.schema import DEFAULT_LENGTHS, KINDS, NGRAM_MAX, RULES
from specdec.verify.rules.registry import make_rule

SOUND = """
schema = 1
name = "mine"
summary = "two models"

[target]
model = "owner/big"

[draft]
kind = "model"
model = "owner/small"
"""
FACTS = """
[{role}.facts]
architecture = "llama"
num_parameters = 1000000
num_layers = 2
hidden_size = 64
intermediate_size = 128
num_heads = 4
num_kv_heads = 2
head_dim = 16
vocab_size = {vocab}
tied_embeddings = true
source = "made up"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_minimal_file_is_a_pair(tmp_path: Path) -> None:
    pair = find_pair(write(tmp_path, SOUND))
    assert (pair.target.model, pair.draft.model, pair.drafting.rule, pair.draft_length) == (
        "owner/big", "owner/small", "auto", 4,
    )  # fmt: skip
    assert pair.folder == tmp_path.resolve()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("schema = 1", "schema = 2", "expected schema = 1, got 2"),
        ("schema = 1\n", "", "expected schema = 1, got None"),
        ("schema = 1", "schema = ", "expected a TOML file"),
        ('summary = "two models"', 'sumary = "x"', "unknown key 'sumary', expected .* did you mean .summary"),
        ('summary = "two models"\n', "", "summary missing; add it"),
        ('name = "mine"', "name = 3", "name: expected a string, got int 3"),
        ('name = "mine"', 'name = "Mine!"', "name: expected lower-case"),
        ('model = "owner/big"', "model = true", r"\[target\]: model: expected a string"),
        ('model = "owner/big"', 'model = "big"', "expected a hub id such as owner/name, got 'big'"),
        ('model = "owner/big"', 'model = "owner/big"\npath = "x"', "expected model .* or package .*got model and path"),
        ('model = "owner/big"', "", r"\[target\]: expected model .* got none of them"),
        ('model = "owner/big"', 'path = "nowhere"', "expected a folder with a saved model, found no config.json"),
        ('model = "owner/big"', 'path = "x"\nrevision = "main"', "revision: a folder has none"),
        ('kind = "model"', 'kind = "telepathy"', "kind: expected one of model, ngram"),
        ('kind = "model"\n', "", r"\[draft\]: kind missing"),
        ('kind = "model"', 'kind = "ngram"', "an n-gram drafter has no draft model; leave out model"),
        ('summary = "two models"', 'summary = "x"\ndtype = "int4"', "dtype: expected one of"),
        ('summary = "two models"', 'summary = "x"\nvocabulary = "odd"', "vocabulary: expected one of shared"),
        ("[target]", '[drafting]\nrule = "wish"\n[target]', "rule: expected one of auto"),
        ("[target]", "[drafting]\nk = 0\n[target]", r"\[drafting\] k: expected at least 1, got 0"),
        ("[target]", "[drafting]\nk = 2.5\n[target]", "k: expected an integer, got float 2.5"),
        ("[target]", "[drafting]\nk = true\n[target]", "k: expected an integer, got bool True"),
        ("[target]", "[drafting]\nk = 2\ntree = [2]\n[target]", "expected k or tree, got both"),
        ("[target]", "[drafting]\ntree = [2, 0]\n[target]", "tree: expected children per level"),
        ("[target]", '[drafting]\ntree = "2,1"\n[target]', "tree: expected an array"),
        ("[target]", '[drafting]\ntree = [2, "1"]\n[target]', r"tree\[1\]: expected an integer, got str '1'"),
        ("[target]", "drafting = 3\n[target]", r"\[drafting\]: expected a table, got int 3"),
        ("[target]", "[[published]]\nspeedup = 2\n[target]", r"\[published\[0\]\]: source, what, .* missing; add them"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in SOUND
    with pytest.raises(PairError, match=said) as error:
        find_pair(write(tmp_path, SOUND.replace(old, new, 1)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layers": 0}, "num_layers: expected at least 1"),
        ({"num_kv_heads": 3}, "num_heads to be a multiple of num_kv_heads"),
        ({"num_step_parameters": 10**12}, "expected a pass to read between 1 and all"),
        ({"draft_vocab_size": 10**6}, "draft_vocab_size: expected 1 to vocab_size"),
    ],
)
def test_impossible_facts_are_pointed_out(change: dict[str, Any], said: str) -> None:
    pair = find_pair("qwen3-8b-0.6b")
    assert pair.target.facts is not None
    wrong = replace(pair, target=replace(pair.target, facts=replace(pair.target.facts, **change)))
    assert any(said in problem for problem in problems(wrong))
    assert not problems(pair)


def test_mismatched_vocabularies_are_an_error_unless_the_pair_says_so(tmp_path: Path) -> None:
    def text(vocab: int, extra: str = "") -> str:
        head, target, draft = SOUND.partition("[draft]")
        return extra + head + FACTS.format(role="target", vocab=32000) + target + draft + FACTS.format(
            role="draft", vocab=vocab
        )  # fmt: skip

    assert find_pair(write(tmp_path, text(32064)))  # padding
    with pytest.raises(PairError, match="mismatched vocabularies: the target has 32000 tokens, the draft 128256"):
        find_pair(write(tmp_path, text(128256)))
    assert find_pair(write(tmp_path, text(128256, 'vocabulary = "different"\n')))


def test_facts_must_agree_with_the_files(tmp_path: Path, tiny_pair: Path) -> None:
    text = SOUND.replace('model = "owner/big"', f'path = "{tiny_pair / "target"}"')
    with pytest.raises(PairError, match=r"num_parameters: the pair says 1000000, the model's files say \d+"):
        find_pair(write(tmp_path, text + FACTS.format(role="target", vocab=257)))


def test_what_is_not_found_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(PairError, match=r"got 'llama-3.1-8b'; did you mean llama-3.1-8b-1b"):
        find_pair("llama-3.1-8b")
    with pytest.raises(PairError, match=r"`specdec pairs list` shows all \d+ shipped pairs"):
        find_pair(tmp_path / "nothing.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(PairError, match=r"binary.toml: expected a TOML file"):
        find_pair(tmp_path / "binary.toml")


# --- the shipped pairs --------------------------------------------------------------------------------------------


def test_there_are_enough_pairs_of_every_kind() -> None:
    found = [find_pair(name) for name in pair_names()]
    assert len(found) >= 25
    assert {pair.draft.kind for pair in found} == set(KINDS) - {"eagle", "self", "suffix"}
    assert "stdlib-python" in pair_names()


@pytest.mark.parametrize("name", pair_names())
def test_every_shipped_pair_is_sound_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    pair = read_pair(name)
    assert not problems(pair)
    assert pair.name == name
    assert pair.target.facts is not None
    assert pair.draft.facts is not None or pair.draft.kind == "ngram"
    copy = tmp_path / f"{name}.toml"
    copy.write_text(pair_text(pair))
    assert replace(read_pair(copy), folder=pair.folder) == pair


def test_a_model_is_described_alike_wherever_it_appears() -> None:
    seen: dict[str, Any] = {}
    for name in pair_names():
        pair = read_pair(name)
        for part in (pair.target, pair.draft):
            if part.model is not None:
                described = (part.facts, part.licence, part.gated)
                assert seen.setdefault(part.model, described) == described, part.model


@lru_cache
def _count(config: Any, num_layers: int) -> int:
    """Parameters of a real model of that shape with so many layers; nothing is allocated."""
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(
            tf.AutoConfig.for_model(**dict(config), num_hidden_layers=num_layers)
        )
    model.tie_weights()
    return sum(parameter.numel() for parameter in set(model.parameters()))


def num_parameters(facts: Facts) -> int:
    """Of transformers' own model of these dimensions: layers are alike, so two small ones tell all."""
    config = {
        "model_type": facts.architecture, "hidden_size": facts.hidden_size, "vocab_size": facts.vocab_size,
        "num_attention_heads": facts.num_heads, "num_key_value_heads": facts.num_kv_heads,
        "head_dim": facts.head_dim, "tie_word_embeddings": facts.tied_embeddings, "pad_token_id": 0,
        "intermediate_size": facts.intermediate_size,
    }  # fmt: skip
    if facts.architecture == "gpt2":
        config = {key: config[key] for key in ("model_type", "vocab_size", "tie_word_embeddings")}
        config |= {"n_embd": facts.hidden_size, "n_head": facts.num_heads, "n_inner": facts.intermediate_size}
    if facts.architecture == "opt":
        config |= {"ffn_dim": facts.intermediate_size, "word_embed_proj_dim": facts.hidden_size}
    key = tuple(sorted(config.items()))
    one = _count(key, 1)
    return one + (facts.num_layers - 1) * (_count(key, 2) - one)


@pytest.mark.slow
def test_the_stated_parameters_are_those_of_the_stated_dimensions() -> None:
    """Two facts from different places (a card's total, config.json's dimensions) that a wrong one would set apart."""
    checked = set()
    for name in pair_names():
        pair = read_pair(name)
        for part in (pair.target, pair.draft):
            if part.facts is not None and getattr(part, "kind", "model") == "model" and part.facts not in checked:
                checked.add(part.facts)
                assert num_parameters(part.facts) == part.facts.num_parameters, part.model
    assert len(checked) >= 40
    wrong = replace(max(checked, key=lambda facts: facts.num_parameters), num_kv_heads=16)
    assert num_parameters(wrong) != wrong.num_parameters


# --- what other modules hold it to --------------------------------------------------------------------------------


def test_names_and_defaults_are_those_of_the_library() -> None:
    assert all(rule == "auto" or make_rule(rule) for rule in RULES)
    assert DEFAULT_LENGTHS["model"] == DEFAULT_K
    assert (DEFAULT_LENGTHS["ngram"], NGRAM_MAX) == (NgramDrafter().k, NgramDrafter().max_ngram)
    assert DEFAULT_LENGTHS["suffix"] == SuffixDrafter().nodes


words = st.text(max_size=20)
numbers = st.integers(1, 10**12)


@given(
    summary=words, source=words, licence=words, gated=st.booleans(), tree=st.lists(st.integers(1, 9), min_size=1),
    speedup=st.floats(0.01, 100), size=numbers,
)  # fmt: skip
def test_whatever_a_pair_holds_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, summary: str, source: str, licence: str, gated: bool, tree: list[int],
    speedup: float, size: int,
) -> None:  # fmt: skip
    facts = Facts("llama", size, 1, 1, 1, 1, 1, 1, 1, gated, source)
    pair = Pair(
        name="any", summary=summary, target=Target(model="a/b", licence=licence, gated=gated, facts=facts),
        draft=Draft("eagle3", model="a/c", facts=facts), drafting=Drafting(tree=tuple(tree)),
        published=(Published(speedup, source, summary, "h200", 1, 1, 1.5), Published(2.0, "", "", "l4", 0, 1)),
        folder=tmp_path_factory.getbasetemp(),
    )  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(pair_text(pair), encoding="utf-8")
    assert replace(read_pair(path), folder=pair.folder) == pair
