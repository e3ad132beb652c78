"""Text while its tokens come: joined it is the whole decoding, and no character is ever shown in half."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_pair import byte_tokenizer
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from specdec.detokenizer import Detokenizer

TEXTS = [
    "plain words, and more  words",
    "naïve café",
    "日本語の文章と漢字",
    "🙂👍🏽👨‍👩‍👧 emoji",
    "\n\n\ttabs",
    "한국어 문장",
    "a\u0301 e\u0301",
]


def byte_pairs() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges that cut characters anywhere."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(TEXTS, BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<end>"]))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama 2's: words begin with a mark, what is not known falls back to bytes, a leading space is stripped."""
    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "w",
        "o",
        "r",
        "d",
        "▁w",
        "or",
    ]
    merges = [("▁", "w"), ("o", "r")]
    core = Tokenizer(
        BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"bytes": byte_tokenizer(), "byte pairs": byte_pairs(), "sentence piece": sentence_piece()}
ANY = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd▁"), max_size=12),
    st.lists(st.sampled_from([*"".join(TEXTS), " ", "word", "👨‍👩‍👧"]), max_size=12).map("".join),
)


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def whole(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(ANY)
def test_texts_come_whole_and_without_half_characters(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found = pieces(tokenizer, ids)
    assert "".join(found) == whole(tokenizer, ids)
    assert "\ufffd" not in "".join(found)
    assert not found[-1], "nothing of a complete text is held back"


@pytest.mark.parametrize("name", ["bytes", "byte pairs"])
@given(st.data())
def test_any_tokens_come_as_they_are_decoded(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=60))
    assert "".join(pieces(tokenizer, ids)) == whole(tokenizer, ids)


@pytest.mark.parametrize("byte", [0x80, 0xE4, 0xF0, 0xFF])
def test_nonsense_is_given_out_and_costs_no_more_the_longer_it_is(byte: int) -> None:
    tokenizer = TOKENIZERS["bytes"]
    (token,) = [i for name, i in tokenizer.get_vocab().items() if name in _NAMES and _NAMES[name] == byte]
    detokenizer = Detokenizer(tokenizer)
    out = ""
    for _ in range(100):
        out += detokenizer.push(token)
        assert len(detokenizer._window) <= 20
    assert out + detokenizer.flush() == whole(tokenizer, [token] * 100)


def test_a_sentence_piece_window_keeps_spaces_behind_special_tokens() -> None:
    tokenizer = TOKENIZERS["sentence piece"]
    word, end = tokenizer("word", add_special_tokens=False).input_ids, tokenizer.eos_token_id
    ids = [*word, end, *word, *word, end, end, *word]
    assert "".join(pieces(tokenizer, ids)) == whole(tokenizer, ids) == "word word word word"


def _names() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {name: byte for byte, name in bytes_to_unicode().items()}


_NAMES = _names()
