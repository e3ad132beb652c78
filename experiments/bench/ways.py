"""The ways to generate that are compared. A new one is one line in `all_ways`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from specdec.drafters import NgramDrafter
from specdec.experiments.bench.llamacpp import llama_cpp, llama_cpp_file
from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.pair import Models
from specdec.experiments.ways import Generate, Way, assisted, speculating, transformers_own
from specdec.speculator import Speculator

PLAIN = "hf-plain"
UNDRAFTED = "specdec-none"
ASSISTED = "hf-assisted"


def hf_plain() -> Way:
    return Way(PLAIN, lambda models, options: transformers_own(models.target, *_lengths(options)))


def hf_assisted(k: int) -> Way:
    return Way(
        f"{ASSISTED}-k{k}", lambda models, options: assisted(models.target, models.draft, k, *_lengths(options)),
        ASSISTED, _one_row, needs_model=True,
    )  # fmt: skip


def early_exit(share: float) -> Way:
    """transformers' drafts by the target's own first layers, `share` of them; how many, and from which confidence on,
    as transformers has it by default."""

    def ready(models: Models, options: BenchOptions) -> Generate:
        layers = max(1, round(share * models.target.config.get_text_config().num_hidden_layers))
        return transformers_own(models.target, *_lengths(options), assistant_early_exit=layers)

    return Way(f"hf-early-exit-{share:.0%}".rstrip("%"), ready, "hf-early-exit", _one_row)


def prompt_lookup(k: int, ngram: int) -> Way:
    def ready(models: Models, options: BenchOptions) -> Generate:
        wanted = {"prompt_lookup_num_tokens": k, "max_matching_ngram_size": ngram}
        return transformers_own(models.target, *_lengths(options), **wanted)

    return Way(f"hf-prompt-lookup-k{k}-n{ngram}", ready, "hf-prompt-lookup", _one_row)


def specdec_none() -> Way:
    """specdec without a drafter: what its passes gain before anything is drafted."""
    return Way(
        UNDRAFTED, lambda models, options: speculating(Speculator(models.target, None), *_lengths(options)),
        calls_modules=False,
    )  # fmt: skip


def specdec_model(k: int) -> Way:
    """The pair's draft model, chains of k."""
    return _specdec("model", f"k{k}", lambda models: models.draft, needs_model=True, k=k)


def specdec_ngram(k: int, branches: int) -> Way:
    """Prompt lookup, `branches` continuations of up to k tokens."""
    return _specdec("ngram", f"k{k}-b{branches}", lambda models: NgramDrafter(k=k, branches=branches))


def specdec_self(form: str, k: int) -> Way:
    """The target drafts for itself, chains of k."""
    return _specdec("self", f"{form}-k{k}", lambda models: f"self:{form}", k=k)


def specdec_planned(drafts: str) -> Way:
    """As it is by default: which drafter, and how deep, is planned step by step. drafts: such as "model",
    "model+ngram" or "self:int8+ngram"."""

    def draft(models: Models) -> Any:
        found = [models.draft if name == "model" else name for name in drafts.split("+")]
        return found if len(found) > 1 else found[0]

    return _specdec("planned", drafts, draft, needs_model="model" in drafts)


def all_ways(quick: bool = False, lengths: Sequence[int] = ()) -> list[Way]:
    """Every setting of every way, plain generation first. lengths: of drafts, in place of each way's own."""
    if quick:
        return [
            hf_plain(),
            *(hf_assisted(k) for k in lengths or (4,)),
            *(prompt_lookup(k, 2) for k in lengths or (10,)),
            specdec_none(),
            *(specdec_model(k) for k in lengths or (4,)),
            *(specdec_ngram(k, 1) for k in lengths or (5,)),
            llama_cpp("f32"),
        ]
    return [
        hf_plain(),
        *(hf_assisted(k) for k in lengths or (2, 3, 4, 5, 8)),
        *(early_exit(share) for share in (0.25, 0.5)),
        *(prompt_lookup(k, ngram) for ngram in (2, 3) for k in lengths or (5, 10)),
        specdec_none(),
        *(specdec_model(k) for k in lengths or (2, 3, 4, 5, 8)),
        *(specdec_ngram(k, branches) for k in lengths or (5, 10) for branches in (1, 2)),
        *(specdec_self("int8", k) for k in (4, 8)),
        specdec_self("int4", 4),
        *(specdec_planned(drafts) for drafts in ("model", "model+ngram", "ngram", "self:int8", "self:int8+ngram")),
        *(llama_cpp(dtype, lookup) for dtype in ("f32", "f16") for lookup in (0, *(lengths or (2, 10)))),
        llama_cpp_file(),
    ]


def _specdec(
    family: str, setting: str, draft: Callable[[Models], Any], needs_model: bool = False, **arguments: Any
) -> Way:
    def ready(models: Models, options: BenchOptions) -> Generate:
        return speculating(Speculator(models.target, draft(models), **arguments), *_lengths(options))

    name = f"specdec-{family}"
    return Way(f"{name}-{setting}", ready, name, calls_modules=False, needs_model=needs_model)


def _lengths(options: BenchOptions) -> tuple[int, float]:
    return options.new_tokens, options.temperature


def _one_row(options: BenchOptions) -> str | None:
    return None if options.batch == 1 else "transformers assists batch size 1 only"
