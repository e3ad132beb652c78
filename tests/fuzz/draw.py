"""Random calls: number `index` of seed `seed` is always the same one."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from fuzz import nonsense, pools
from fuzz.call import LOOKS, Call
from fuzz.subjects import DRAFTS, MODELS

FAMILIES = (
    "llama-gqa", "llama-gqa", "llama-mha", "mistral-window", "qwen2", "qwen2-mixed-window", "gpt2", "gemma", "gemma3",
    "gpt-neox", "qwen3", "llama-tied",
)  # fmt: skip
FORMS = ("speculator", "speculator", "speculator", "one-shot", "hook", "patch", "engine")
TREES = ((2,), (2, 2), (3, 2, 1), (1, 2, 2), [[0], [1], [0, 0], [0, 1], [0, 0, 0]])
SAMPLING_RULES = ("auto", "auto", "coupled", "naive", "rejection", "block", "budget_flow", "traversal")


def draw(seed: int, index: int) -> Call:
    """A sensible call in most cases, one with a piece of nonsense now and then."""
    rng = random.Random(f"{seed}/{index}")
    name = f"FUZZ_SEED={seed} FUZZ_ONLY={index}"
    kind = rng.random()
    if kind < 0.7:
        return sensible(rng, name)
    if kind < 0.94:
        return with_nonsense(rng, name)
    return of_nonsense(rng, name)


def sensible(rng: random.Random, name: str, **fixed: Any) -> Call:
    """`fixed`: fields that are not drawn."""
    form = fixed.get("form", rng.choice(FORMS))
    sampled = rng.random() < 0.35
    family = fixed.get("family", rng.choice(FAMILIES))
    draft, options = _drafting(rng, family, form, sampled)
    rows = 1 if form == "engine" or rng.random() < 0.5 else rng.randint(2, 4)
    lengths = tuple(rng.choice([1, 2, 3, 4, 5, 6, 8, 12, 20]) for _ in range(rows))
    arguments: dict[str, Any] = {}
    for pool in rng.sample(pools.SENSIBLE, rng.choice([0, 1, 2, 2, 3, 3, 4])):
        arguments.update(rng.choice(pool))
    if sampled:
        for _ in range(rng.choice([0, 1, 2])):
            arguments.update(rng.choice(pools.WARPERS))
    if planned(draft, options):
        lengths = lengths[:1]
    looks = [look for look in LOOKS if look != "no mask" or len(set(lengths)) == 1]
    cached = rng.choice([0, 1, min(lengths) - 1]) if rng.random() < 0.12 else None
    look = "keywords" if rng.random() < 0.6 else rng.choice(looks)
    if form == "engine":
        look, cached = "keywords", None
        arguments = {key: value for key, value in arguments.items() if key not in NOT_FOR_ENGINES}
    if form == "hook":  # transformers loses the tokenizer on the way (documented)
        arguments = {key: value for key, value in arguments.items() if key not in ("stop_strings", "tokenizer")}
    drawn = dict(
        name=name, family=family, form=form, draft=draft, options=options, lengths=lengths,
        prompt_seed=rng.randrange(10**6), period=rng.choice([0, 2]), look=look,
        cached=cached if cached is None else min(cached, max(lengths) - 1), cached_by_us=rng.random() < 0.5,
        seed=rng.randrange(10**6) if sampled else None, arguments=arguments,
    )  # fmt: skip
    return Call(**{**drawn, **fixed})


PLANNED_FAMILY = "llama-gqa"
PLANNED = ("near or ngram",)
NOT_FOR_ENGINES = (
    "streamer", "num_return_sequences", "return_dict_in_generate", "output_scores", "output_logits", "stop_strings",
    "tokenizer",
)  # fmt: skip
"""Refused by name at submit; engines take their tokenizer when they are built."""


def planned(draft: str, options: dict[str, Any]) -> bool:
    """Every batch size and layout of a planned pair is measured once, which takes seconds: there are few of them."""
    return draft in PLANNED or (draft in (*MODELS, "ngram") and not {"k", "tree"} & options.keys())


def with_nonsense(rng: random.Random, name: str) -> Call:
    """One argument that makes no sense in a call that is simple otherwise."""
    call = sensible(rng, name, lengths=(4,), cached=None, look="keywords")
    strange = rng.choice(nonsense.ARGUMENTS)
    kept = dict(rng.sample(sorted(call.arguments.items(), key=str), min(len(call.arguments), rng.choice([0, 0, 1]))))
    seed = 2 if strange.get("do_sample") else call.seed
    # A hook does not hear of what transformers keeps to itself, and an engine takes prompts in more shapes.
    if {"assistant_model", "synced_gpus", "input_ids"} & strange.keys():
        call = replace(call, form="speculator")
    return replace(call, seed=seed, arguments={**kept, **strange})


def of_nonsense(rng: random.Random, name: str) -> Call:
    """An object that cannot be built, or only seems so."""
    call = sensible(rng, name, form="speculator", seed=None)
    strange = rng.choice(nonsense.OPTIONS)
    if ("k" in strange or "tree" in strange) and rng.random() < 0.8:
        call = replace(call, draft="near", options={})
    return replace(call, arguments={}, options={**call.options, **strange})


def _drafting(rng: random.Random, family: str, form: str, sampled: bool) -> tuple[str, dict[str, Any]]:
    plannable = family == PLANNED_FAMILY  # every pair of models is measured once, and that takes a second
    names = [*DRAFTS, "ngram", "near", "near", "near", "far", "far"]
    if not plannable or form == "engine":  # nor does an engine plan
        names = [name for name in names if name not in PLANNED]
    draft = rng.choice(names)
    options: dict[str, Any] = {}
    shape = rng.random()
    if draft in MODELS and (shape < 0.92 or draft != "near" or not plannable):
        options.update({"tree": rng.choice(TREES)} if shape < 0.4 else {"k": rng.choice([1, 2, 3, 4, 6, 9])})
    elif draft == "ngram" and (shape < 0.9 or not plannable):
        options["k"] = rng.choice([1, 3, 5, 10])
    if sampled:
        rule = rng.choice(SAMPLING_RULES)
        if rule != "auto":
            options["rule"] = rule
    elif rng.random() < 0.1:
        options["rule"] = rng.choice(["greedy", "coupled", "naive"])
    if form in ("speculator", "one-shot", "hook") and rng.random() < 0.12 and not planned(draft, options):
        options["exactness"] = "strict"
    if form in ("speculator", "hook") and rng.random() < 0.25 and not planned(draft, options):
        options.update(rng.choice([{"cache": "paged"}, {"cache": "paged", "page_size": 3}]))
    return draft, options
