"""Does strict mode keep its promise on this machine, and what does it cost? `python -m specdec.experiments.strict`.

Texts of all drafters are compared with those of draft=None, token by token and by the bits of every token's logits, in
strict mode and (the control) in the ordinary mode through the model's modules, since native passes have the same bits
anyway. Tokens differ only at near-ties, which a small model meets rarely; bits differ wherever passes of other sizes
computed them, so that the comparison cannot pass for want of cases. Then the shipped pair is timed in both modes.
Writes one JSON file with its provenance.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Annotated, Any

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.drafters import BestFirst, NgramDrafter
from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.display import tracked
from specdec.experiments.frame import Command, ResultFile, RunOptions, option, started

VOCAB = 3000
RULES: dict[str, dict[str, Any]] = {
    "greedy": dict(do_sample=False),
    "coupled": dict(do_sample=True, temperature=1.0, top_k=0, seed=5),
}


def random_llama(layers: int, hidden: int, seed: int, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A Llama of random weights, drawn in float64."""
    config = tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=3 * hidden // 2, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=1024,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = tf.LlamaForCausalLM._from_config(config, dtype=torch.float64)
    made: PreTrainedModel = model.eval().to(dtype)
    return made


def models(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel]:
    """The target, a draft whose weights are the target's off by 2 % of their spread, and an unrelated draft."""
    draft: Any = random_llama(2, 64, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            if weight.dim() > 1:
                noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                weight.add_(0.02 * weight.std() * noise)
    return random_llama(2, 64, 0, dtype), draft.to(dtype), random_llama(1, 32, 9, dtype)


def through_modules(model: PreTrainedModel) -> None:
    """Make passes of `model` go through its modules: a hook must be heard."""
    model.register_forward_hook(lambda *args: None)


def ways(near: PreTrainedModel, junk: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Arguments of the Speculators that must all write the same texts."""
    return {
        "none": {},
        "chain k=4": dict(draft=near, k=4),
        "chain k=8": dict(draft=near, k=8),
        "tree (3,2,1)": dict(draft=near, tree=(3, 2, 1)),
        "best-first": dict(draft=near, tree=BestFirst(depth=4, top_k=3, num_nodes=10)),
        "ngram x2": dict(draft=NgramDrafter(k=5, branches=2)),
        "junk k=2": dict(draft=junk, k=2),
    }


def prompts(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Left-padded batches of ragged prompts, of 1, 4, 7 and 40 rows by turns: int64 ids and mask."""
    generator = torch.Generator().manual_seed(2)
    sizes = (1, 4, 7, 40)
    turn = 0
    while count:
        rows = min(count, sizes[turn % 4])
        lengths = torch.randint(2, 90, (rows,), generator=generator)
        width = int(lengths.max())
        ids = torch.randint(1, VOCAB, (rows, width), generator=generator)
        mask = (torch.arange(width) >= width - lengths[:, None]).long()
        yield ids * mask, mask
        count, turn = count - rows, turn + 1


def fingerprints(logits: Sequence[Tensor]) -> Tensor:
    """One int64 per row that depends on every bit of its logits (`[rows, VOCAB]` per token)."""
    weights = torch.randint(-(2**62), 2**62, (VOCAB,), generator=torch.Generator().manual_seed(3)) * 2 + 1
    found = torch.zeros(logits[0].shape[0], dtype=torch.int64)
    for step in logits:
        found = found * 6364136223846793005 + (step.float().view(torch.int32).long() * weights).sum(1)  # modulo 2^64
    return found


def identity(dtype: torch.dtype, rule: str, exactness: str, num_prompts: int, tokens: int) -> dict[str, Any]:
    """How many of `num_prompts` texts, and of their logits, are unlike those of draft=None, and how fast they came."""
    target, near, junk = models(dtype)
    if exactness == "distribution":
        through_modules(target)
    found: dict[str, Any] = {}
    plain: list[tuple[Tensor, Tensor]] = []
    for name, way in ways(near, junk).items():
        speculator = specdec.Speculator(target, **way, exactness=exactness, rule="auto" if rule == "greedy" else rule)
        texts: list[tuple[Tensor, Tensor]] = []
        emitted, steps = 0, 0
        start = perf_counter()
        for ids, mask in tracked(list(prompts(num_prompts)), f"{dtype} {rule} {exactness} {name}"):
            out: Any = speculator.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0,
                return_dict_in_generate=True, output_logits=True, **RULES[rule],
            )  # fmt: skip
            texts += zip(out.sequences[:, ids.shape[1] :], fingerprints(out.logits), strict=True)
            assert speculator.report is not None
            assert speculator.report.num_drafter_faults == 0, speculator.report.last_drafter_fault
            emitted += speculator.report.num_emitted_tokens
            steps += speculator.report.num_row_steps
        plain = plain or texts
        pairs = list(zip(plain, texts, strict=True))
        found[name] = {
            "differing_texts": sum(not torch.equal(a, b) for (a, _), (b, _) in pairs),
            "differing_logits": sum(not torch.equal(a, b) for (_, a), (_, b) in pairs),
            "tokens_per_step": round(emitted / steps, 3),
            "seconds": round(perf_counter() - start, 1),
        }
    return found


def alone(dtype: torch.dtype, num_prompts: int, tokens: int) -> int:
    """Strict texts that a row writes differently alone (draft=None) and in its batch (chain k=4); greedy."""
    target, near, _ = models(dtype)
    single = specdec.Speculator(target, exactness="strict")
    batched = specdec.Speculator(target, near, k=4, exactness="strict")
    options: dict[str, Any] = dict(max_new_tokens=tokens, eos_token_id=None, pad_token_id=0, do_sample=False)
    differing = 0
    for ids, mask in prompts(num_prompts):
        together: Any = batched.generate(input_ids=ids, attention_mask=mask, **options)
        for row in range(ids.shape[0]):
            length = int(mask[row].sum())
            text: Any = single.generate(input_ids=ids[row : row + 1, -length:], **options)
            differing += not torch.equal(text[0, length:], together[row, ids.shape[1] :])
    return differing


def cost(dtype: str, batch: int, num_prompts: int, tokens: int) -> dict[str, Any]:
    """Tokens per second of the shipped pair, greedy, both modes alternating; medians over calls."""
    options = BenchOptions(dtype=dtype, batch=batch, num_prompts=num_prompts)
    pair = options.load()
    drafts: dict[str, dict[str, Any]] = {
        "none": {},
        "chain k=4": dict(draft=pair.draft, k=4),
        "ngram": dict(draft=NgramDrafter()),
    }
    speculators = {
        (name, exactness): specdec.Speculator(pair.target, exactness=exactness, **way)
        for name, way in drafts.items()
        for exactness in ("distribution", "strict")
    }
    speeds: dict[tuple[str, str], list[float]] = {key: [] for key in speculators}
    differing = 0
    for asked in options.prompts(pair):
        texts = []
        for (name, exactness), speculator in speculators.items():
            out: Any = speculator.generate(input_ids=asked.ids, max_new_tokens=tokens, do_sample=False)
            assert speculator.report is not None
            speeds[name, exactness].append(speculator.report.tokens_per_second)
            texts += [out] if exactness == "strict" else []
        differing += sum(not torch.equal(texts[0], text) for text in texts[1:])
    report = speculators["none", "strict"].report
    assert report is not None
    found: dict[str, Any] = {f"{name}, {mode}": round(statistics.median(x), 1) for (name, mode), x in speeds.items()}
    passes = {"ms_strict_pass": round(report.ms_strict_pass, 2), "ms_plain_pass": round(report.ms_plain_pass, 2)}
    return {"tokens_per_second": found, **passes, "strict_calls_differing": differing}


@dataclass(frozen=True, kw_only=True)
class StrictOptions(RunOptions):
    """How much is compared."""

    prompts: Annotated[int, option("Texts of each way.")] = 200
    tokens: Annotated[int, option("New tokens of each text.")] = 200
    pair_prompts: Annotated[int, option("Prompts of the shipped pair to time, 0 for none.")] = 12
    rules: Annotated[tuple[str, ...], option(f"Some of {', '.join(RULES)}.")] = tuple(RULES)

    def __post_init__(self) -> None:
        self.one_of(RULES, "rules")


def run(options: StrictOptions) -> None:
    """Does strict mode keep its promise on this machine, and what does it cost?"""
    count, tokens, start = options.prompts, options.tokens, perf_counter()
    source = started(options, prompts=count, tokens=tokens)
    result = ResultFile(options.out, "strict", source, identity={}, cost={})

    def keep(part: str, name: str, found: Any) -> None:  # a long run that is interrupted has still found something
        result.content[part][name] = found
        result.content["seconds"] = round(perf_counter() - start)
        result.write()

    fewer = max(1, count // 4)  # the control needs to fail, not to fail often
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for rule in options.rules:
            for exactness, some in (("strict", count), ("distribution", fewer)):
                found = identity(dtype, rule, exactness, some, tokens)
                keep("identity", f"{name} {rule} {exactness}, {some} prompts", found)
                differing = {way: (own["differing_texts"], own["differing_logits"]) for way, own in found.items()}
                print(name, rule, exactness, "texts, logits that differ:", differing, flush=True)
        differing_alone = alone(dtype, fewer, tokens)
        keep("identity", f"{name} alone against batches", differing_alone)
        print(name, "alone against batches", differing_alone, flush=True)
        for batch in (1, 4) if options.pair_prompts else ():
            spent = cost(name, batch, options.pair_prompts, 128)
            keep("cost", f"{name} batch {batch}", spent)
            print(name, "batch", batch, json.dumps(spent), flush=True)
    result.finish()


main = Command(StrictOptions, run)

if __name__ == "__main__":
    sys.exit(main())
