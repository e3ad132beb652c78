"""Does strict mode keep its promise on this machine, and what does it cost? `python -m specdec.experiments.strict`.

Texts of all drafters are compared with those of draft=None, token by token and by the bits of every token's logits, in
strict mode and (the control) in the ordinary mode through the model's modules, since native passes have the same bits
anyway. Tokens differ only at near-ties, which a small model meets rarely; bits differ wherever passes of other sizes
computed them, so that the comparison cannot pass for want of cases. Then the shipped pair is timed in both modes.
Writes one JSON file with its provenance.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]
from transformers import PreTrainedModel

import specdec
from specdec.drafters import BestFirst, NgramDrafter
from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.bench.pair import Pair, prompt_batches
from specdec.experiments.provenance import provenance

VOCAB = 3000
RESULTS = Path(__file__).parent / "results"
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
    if exactness == "distribution":  # a hook: this model goes through its modules
        target.register_forward_hook(lambda *args: None)
    found: dict[str, Any] = {}
    plain: list[tuple[Tensor, Tensor]] = []
    for name, way in ways(near, junk).items():
        speculator = specdec.Speculator(target, **way, exactness=exactness, rule="auto" if rule == "greedy" else rule)
        texts: list[tuple[Tensor, Tensor]] = []
        emitted, steps = 0, 0
        start = time.perf_counter()
        for ids, mask in tqdm(list(prompts(num_prompts)), desc=f"{dtype} {rule} {exactness} {name}", leave=False):
            out: Any = speculator.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0,
                return_dict_in_generate=True, output_logits=True, **RULES[rule],
            )  # fmt: skip
            texts += zip(out.sequences[:, ids.shape[1] :], fingerprints(out.logits), strict=True)
            assert speculator.report is not None
            assert speculator.report.num_drafter_faults == 0, speculator.report.last_drafter_fault
            emitted += speculator.report.num_emitted_tokens
            steps += speculator.report.num_drafts
        plain = plain or texts
        pairs = list(zip(plain, texts, strict=True))
        found[name] = {
            "differing_texts": sum(not torch.equal(a, b) for (a, _), (b, _) in pairs),
            "differing_logits": sum(not torch.equal(a, b) for (_, a), (_, b) in pairs),
            "tokens_per_step": round(emitted / steps, 3),
            "seconds": round(time.perf_counter() - start, 1),
        }  # fmt: skip
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
    pair = Pair.load(options)
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
    for ids in prompt_batches(pair, options):
        texts = []
        for (name, exactness), speculator in speculators.items():
            out: Any = speculator.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False)
            assert speculator.report is not None
            speeds[name, exactness].append(speculator.report.tokens_per_second)
            texts += [out] if exactness == "strict" else []
        differing += sum(not torch.equal(texts[0], text) for text in texts[1:])
    report = speculators["none", "strict"].report
    assert report is not None
    found: dict[str, Any] = {f"{name}, {mode}": round(statistics.median(x), 1) for (name, mode), x in speeds.items()}
    passes = {"ms_strict_pass": round(report.ms_strict_pass, 2), "ms_plain_pass": round(report.ms_plain_pass, 2)}
    return {"tokens_per_second": found, **passes, "strict_calls_differing": differing}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m specdec.experiments.strict", description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pair-prompts", type=int, default=12, help="prompts of the shipped pair to time, 0 for none")
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"provenance": provenance(seed=0, threads=args.threads, prompts=args.prompts,
                                                       tokens=args.tokens), "identity": {}, "cost": {}}  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"strict-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    start = time.perf_counter()

    def keep() -> None:  # after every part: a long run that is interrupted has still found something
        result["seconds"] = round(time.perf_counter() - start)
        path.write_text(json.dumps(result, indent=1) + "\n")

    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for rule in args.rules:
            for exactness in ("strict", "distribution"):
                # The control needs to fail, not to fail often.
                count = args.prompts if exactness == "strict" else max(1, args.prompts // 4)
                found = identity(dtype, rule, exactness, count, args.tokens)
                result["identity"][f"{name} {rule} {exactness}, {count} prompts"] = found
                differing = {way: (own["differing_texts"], own["differing_logits"]) for way, own in found.items()}
                print(name, rule, exactness, "texts, logits that differ:", differing, flush=True)
                keep()
        result["identity"][f"{name} alone against batches"] = alone(dtype, max(1, args.prompts // 4), args.tokens)
        print(name, "alone against batches", result["identity"][f"{name} alone against batches"], flush=True)
        for batch in (1, 4) if args.pair_prompts else ():
            found = cost(name, batch, args.pair_prompts, 128)
            result["cost"][f"{name} batch {batch}"] = found
            print(name, "batch", batch, json.dumps(found), flush=True)
        keep()
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
