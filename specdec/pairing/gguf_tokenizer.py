"""A byte-level BPE tokenizer as GGUF metadata."""

from __future__ import annotations

import json
from typing import Any

from specdec.kv import UnsupportedArgumentError

LIKE_GPT2 = {
    "model": "BPE",
    "ignore_merges": False,
    "has merges": True,
    "normalizer": None,
    "pre_tokenizer": "ByteLevel",
    "use_regex": True,
    "add_prefix_space": False,
}
"""What a tokenizer must say of itself for llama.cpp's "gpt-2" splits to be its splits."""


def byte_level_bpe(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """The tokenizer's own description (the content of its tokenizer.json), if it is `LIKE_GPT2`.

    GPT-2's regular expression is what `ByteLevel` with `use_regex` splits by, so that texts become the same ids there
    and here. (The benchmark feeds ids; `llama-speculative-simple` takes text.)

    Raises:
        UnsupportedArgumentError: any other tokenizer, or one with ids beyond the model's `vocab_size`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    model, splits = facts.get("model") or {}, facts.get("pre_tokenizer") or {}
    found = {
        "model": model.get("type"),
        "ignore_merges": model.get("ignore_merges", False),
        "has merges": bool(model.get("merges")),
        "normalizer": facts.get("normalizer"),
        "pre_tokenizer": splits.get("type"),
        "use_regex": splits.get("use_regex"),
        "add_prefix_space": splits.get("add_prefix_space"),
    }
    wrong = {name: value for name, value in found.items() if value != LIKE_GPT2[name]}
    if wrong:
        raise UnsupportedArgumentError(
            f"GGUF export: expected a byte-level BPE tokenizer that splits like GPT-2's "
            f"({', '.join(f'{name} {LIKE_GPT2[name]!r}' for name in wrong)}), got "
            f"{', '.join(f'{name} {value!r}' for name, value in wrong.items())}; llama.cpp's own convert_hf_to_gguf.py "
            f"knows more tokenizers"
        )
    if (largest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise UnsupportedArgumentError(
            f"GGUF export: expected token ids below the model's vocab_size {vocab_size}, got {largest}"
        )
    return facts


def add_tokenizer(writer: Any, bpe: dict[str, Any], tokenizer: Any, vocab_size: int, kinds: Any) -> None:
    """Write the tokenizer into a GGUF file's metadata.

    Args:
        bpe: of `byte_level_bpe`. vocab_size: the model's; rows of its embedding that no token has become unused ones.
        kinds: `gguf.TokenType`.
    """
    ids: dict[str, int] = tokenizer.get_vocab()
    # Rows of the embedding that no token has: models are padded to round sizes.
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [kinds.UNUSED] * vocab_size
    for token, i in ids.items():
        tokens[i], types[i] = token, kinds.NORMAL
    for added in bpe["added_tokens"]:
        types[added["id"]] = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # Files of older versions of `tokenizers` have "a b" where newer ones have ["a", "b"].
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["model"]["merges"]])
    for role in ("bos", "eos", "pad"):
        if (token_id := getattr(tokenizer, f"{role}_token_id")) is not None:
            getattr(writer, f"add_{role}_token_id")(token_id)
    framed = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    writer.add_add_bos_token(framed[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(framed[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
