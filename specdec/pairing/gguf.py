"""The models of a pair as GGUF files, which llama.cpp reads. Imports torch.

The file format is the `gguf` package's business (extra `llamacpp`). What is decided here: which models are taken, and
the order of rows in their query and key matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from specdec.kv import UnsupportedArgumentError
from specdec.pairing.gguf_tokenizer import add_tokenizer, byte_level_bpe

DTYPES = {"f32": torch.float32, "f16": torch.float16}
ROLES = ("target", "draft")


def refusal(folder: Path, gguf_file: str | None = None) -> str | None:
    """Why the model in `folder` cannot be exported, or None. Reads its config and tokenizer, no weights.

    Args:
        gguf_file: the file there that the model is read from, if it is in one.
    """
    form = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **form)
        _check_config(config)
        byte_level_bpe(_tokenizer(folder, **form), config.vocab_size)
        _gguf()
    except UnsupportedArgumentError as error:
        return str(error)
    return None


def export_pair(folder: Path, out: Path, dtype: str = "f32") -> tuple[Path, Path]:
    """Write `target-<dtype>.gguf` and `draft-<dtype>.gguf` of the pair in `folder` into `out`, and return their paths.

    Raises:
        UnsupportedArgumentError: see `export_model`.
    """
    paths = []
    for role in ROLES:
        model = AutoModelForCausalLM.from_pretrained(
            folder / role, dtype="auto", trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
        # A draft that shares the target's tokenizer need not bring a copy of it.
        home = folder / role if (folder / role / "tokenizer.json").is_file() else folder / "target"
        paths.append(export_model(model, _tokenizer(home), out / f"{role}-{dtype}.gguf", dtype))
    return paths[0], paths[1]


def export_model(model: Any, tokenizer: Any, path: Path, dtype: str = "f32") -> Path:
    """Write a `LlamaForCausalLM` and its byte-level BPE tokenizer to `path`; an unfinished file is never left there.

    Matrices are stored in `dtype`, vectors always in f32 (llama.cpp multiplies norms in f32). An f32 file of a float32,
    float16 or bfloat16 model has exactly its weights, and so has an f16 file of a float16 one.

    Args:
        dtype: "f32" or "f16".

    Raises:
        UnsupportedArgumentError: another dtype; not a plain Llama; a tokenizer that llama.cpp would not split texts
            like; weights beyond float16's range; the `gguf` package is missing.
    """
    if dtype not in DTYPES:
        raise UnsupportedArgumentError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    config = model.config
    _check_config(config)
    bpe = byte_level_bpe(tokenizer, config.vocab_size)
    gguf = _gguf()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    writer = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    try:
        _add_architecture(writer, config, path.stem, gguf.LlamaFileType[{"f32": "ALL_F32", "f16": "MOSTLY_F16"}[dtype]])
        add_tokenizer(writer, bpe, tokenizer, config.vocab_size, gguf.TokenType)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        for name, weight in _stored(model):
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise UnsupportedArgumentError(f"weights: expected a Llama's, got {name!r}, which GGUF has no name for")
            writer.add_tensor(known, _narrowed(name, weight, dtype).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except BaseException:
        writer.close()
        unfinished.unlink(missing_ok=True)
        raise
    writer.close()
    return unfinished.replace(path)


def interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key projection in the order llama.cpp's `llama` architecture expects.

    `transformers` rotates row i of a head together with row i + head_dim / 2, llama.cpp row 2 i with row 2 i + 1. Both
    give the same scores when each finds its pairs: with head_dim 6, rows 0 1 2 3 4 5 become 0 3 1 4 2 5.

    Args:
        weight: `[heads * head_dim, ...]`, a matrix or a bias.
    """
    halves = weight.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _stored(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(transformers' name, tensor on the CPU) of everything a file holds. A tied head is one tensor: the embedding."""
    config = model.config
    rotated = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():  # names a tied tensor once, by its first name
        weight = parameter.detach().cpu()
        heads = rotated.get(name.rsplit(".", 2)[-2])
        yield name, weight if heads is None else interleaved(weight, heads)


def _narrowed(name: str, weight: Tensor, dtype: str) -> Tensor:
    stored = weight.to(DTYPES[dtype] if weight.dim() > 1 else torch.float32).contiguous()
    if not bool(stored.isfinite().all()):
        raise UnsupportedArgumentError(
            f"dtype: expected weights that are finite in {dtype}, got {name!r} with others; use dtype='f32'"
        )
    return stored


def _check_config(config: Any) -> None:
    def check(name: str, expected: Any, got: Any) -> None:
        if got != expected:
            raise UnsupportedArgumentError(f"GGUF export: expected a plain Llama with {name} {expected!r}, got {got!r}")

    rope = config.rope_parameters if config.model_type == "llama" else {}
    check("model_type", "llama", config.model_type)
    check("hidden_act", "silu", config.hidden_act)
    check("rope_type", "default", rope.get("rope_type", "default"))
    check("partial_rotary_factor", 1.0, float(rope.get("partial_rotary_factor", 1.0)))


def _add_architecture(writer: Any, config: Any, name: str, file_type: Any) -> None:
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _tokenizer(folder: Path, **form: str) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **form)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        how = "GGUF export needs the gguf package: pip install 'specdec-lm[llamacpp]'"
        raise UnsupportedArgumentError(how) from error
    return gguf
