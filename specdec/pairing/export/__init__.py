"""A pair in the words of other engines: the exact arguments they take, and what does not carry over."""

from __future__ import annotations

from collections.abc import Callable

from specdec.pairing.errors import PairError
from specdec.pairing.export.base import Export, refuse
from specdec.pairing.export.llama_cpp import export_llama_cpp
from specdec.pairing.export.ray import export_ray
from specdec.pairing.export.sglang import export_sglang
from specdec.pairing.export.tensorrt_llm import export_tensorrt_llm
from specdec.pairing.export.tgi import export_tgi
from specdec.pairing.export.transformers import export_transformers
from specdec.pairing.export.vllm import export_vllm
from specdec.pairing.schema import Pair

ENGINES: dict[str, Callable[[Pair], Export]] = {
    "vllm": export_vllm,
    "sglang": export_sglang,
    "tensorrt-llm": export_tensorrt_llm,
    "llama.cpp": export_llama_cpp,
    "tgi": export_tgi,
    "transformers": export_transformers,
    "ray": export_ray,
}
OWN = ("ray",)
"""Those that run this library."""


def export_pair(pair: Pair, engine: str) -> Export:
    """`pair` for `engine`, one of ENGINES.

    Raises:
        PairError: an unknown engine, or a pair that it cannot run at all.
    """
    if engine not in ENGINES:
        raise PairError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    if engine in OWN:
        return ENGINES[engine](pair)
    if pair.target.gguf_file or pair.draft.gguf_file:
        raise PairError(f"pair {pair.name!r}: GGUF files are not exported; engines that read them take the file itself")
    own = {"self": "no other engine lets the target draft for itself", "suffix": "suffixes are not exported"}
    if (why := own.get(pair.draft.kind)) is not None:
        raise refuse(pair, engine, why, 'use kind = "ngram" or a draft model')
    return ENGINES[engine](pair)


__all__ = ["ENGINES", "Export", "export_pair"]
