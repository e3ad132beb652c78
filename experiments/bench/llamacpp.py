"""llama.cpp as a way to generate, through llama-cpp-python (extra `llamacpp`): the pair's target written as a GGUF
file, or the GGUF file that it is in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.pair import Models
from specdec.experiments.ways import Generate, Output, Passes, Way
from specdec.hardware import has_feature
from specdec.pairing.gguf import export_model, refusal
from specdec.pairing.loading import found_at
from specdec.pairing.packaged import packaged_file

FILE = "file"
COMPARABLE = {"f32": ("float32",), "f16": ("float32", "float16"), FILE: ("float32",)}
"""Dtypes of a run in which a way with such weights says something about the same target."""
MIN_BATCH = 512


def llama_cpp(dtype: str, lookup: int = 0) -> Way:
    """llama.cpp with weights and K/V in `dtype` ("f32" or "f16"), plain (`lookup` = 0) or with llama-cpp-python's
    prompt lookup of up to `lookup` tokens.

    It gets and returns token ids, so its tokenizer plays no part. Its products of f16 matrices round the activations to
    f16, too: an f16 way's greedy text may leave plain generation's by more than a near tie.
    """

    def ready(models: Models, options: BenchOptions) -> Generate:
        with TemporaryDirectory() as folder:
            path = export_model(models.target, models.tokenizer, Path(folder) / "target.gguf", dtype)
            return _generate(load(path, dtype, lookup, options), options)

    family = f"llama-cpp-{dtype}" + ("-lookup" if lookup else "")
    name = f"{family}-k{lookup}" if lookup else family
    return Way(name, ready, family, partial(_refusal, dtype), calls_modules=False, optional=True)


def llama_cpp_file() -> Way:
    """llama.cpp with the GGUF file that the target is in, its weights as they are there, K/V in f16.

    The other ways compute with the same weights widened to float32; llama.cpp's products of quantised ones round the
    activations to 8 bits, so its greedy text may leave theirs by more than a near tie.
    """

    def ready(models: Models, options: BenchOptions) -> Generate:
        path = _own_file(options)
        assert path is not None
        return _generate(load(path, FILE, 0, options), options)

    name = f"llama-cpp-{FILE}"
    return Way(name, ready, name, partial(_refusal, FILE), calls_modules=False, optional=True)


def _own_file(options: BenchOptions) -> Path | None:
    """The GGUF file on this machine that the target is in, None where it is in none."""
    pair = options.chosen_pair()
    if pair.target.package is not None:
        return packaged_file(pair.target)
    if pair.target.gguf_file is None or pair.target.path is None:
        return None
    return Path(pair.location(pair.target)) / pair.target.gguf_file


def _refusal(dtype: str, options: BenchOptions) -> str | None:
    if options.batch != 1:
        return f"llama-cpp-python generates one text at a time; use batch 1, not {options.batch}"
    if options.device != "cpu":
        return f"compared on the CPU only, not on {options.device}"
    if options.dtype not in COMPARABLE[dtype]:
        return f"compared with {' and '.join(COMPARABLE[dtype])}, not with {options.dtype}"
    try:
        import llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # the last two: its shared library does not load
        return f"llama-cpp-python cannot be imported ({error}); pip install 'specdec-lm[llamacpp]'"
    if dtype == FILE:
        return None if _own_file(options) is not None else "the target is in no GGUF file on this machine"
    place = found_at(options.chosen_pair(), "target")
    folder = Path(place.name)
    if not folder.is_dir():
        return f"{folder.as_posix()} is not a folder on this machine"
    return refusal(folder, place.gguf_file)


def _generate(llama: Any, options: BenchOptions) -> Generate:
    clock = _timed_passes(llama)
    # 0, 1.0 and 0.0 switch each filter off: the unfiltered law, as for the other ways.
    settings = {"temp": options.temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}

    def generate(ids: Tensor, seed: int, on_step: object = None) -> Output:
        llama.reset()  # or the next call would take over whatever prompt it has in common with the last
        llama.set_seed(seed)
        clock.clear()
        new = list(islice(llama.generate(ids[0].tolist(), **settings), options.new_tokens))
        return Output(torch.cat((ids, torch.tensor([new])), dim=1), None, Passes(len(clock), sum(clock)))

    return generate


def load(path: Path, dtype: str, lookup: int, options: BenchOptions) -> Any:
    """A `llama_cpp.Llama` of the GGUF file, read whole into memory, for calls of `options`' lengths."""
    import llama_cpp
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    kv = llama_cpp.GGML_TYPE_F32 if dtype == "f32" else llama_cpp.GGML_TYPE_F16
    batch = max(MIN_BATCH, options.prompt_tokens)
    # Where llama-cpp-python 0.3.36 multiplies quantised weights by AMX it crashes on prompts, but not token by token.
    crashes = dtype == FILE and has_feature("amx_int8")
    return llama_cpp.Llama(
        str(path),
        n_ctx=options.prompt_tokens + options.new_tokens + lookup,  # its last draft may reach beyond the end
        n_batch=batch,
        n_ubatch=1 if crashes else batch,  # the prompt in one pass
        n_threads=options.threads,
        n_threads_batch=options.threads,
        type_k=kv,  # f16 unless told, whatever the weights are
        type_v=kv,
        use_mmap=False,  # the file is deleted
        draft_model=LlamaPromptLookupDecoding(num_pred_tokens=lookup) if lookup else None,
        verbose=False,
    )


def _timed_passes(llama: Any) -> list[float]:
    """A list to which every pass of `llama` from now on adds its seconds."""
    seconds: list[float] = []
    evaluate: Callable[[Sequence[int]], None] = llama.eval

    def timed(tokens: Sequence[int]) -> None:
        start = perf_counter()
        evaluate(tokens)
        seconds.append(perf_counter() - start)

    llama.eval = timed
    return seconds
