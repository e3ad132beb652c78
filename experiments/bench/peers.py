"""The ways to generate that are compared. A new one is one small class and one line in `all_peers`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.drafters import NgramDrafter
from specdec.experiments.bench.llamacpp import LlamaCpp
from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.bench.pair import Pair
from specdec.experiments.bench.peer import Generate, Output, Peer
from specdec.kv import UnsupportedArgumentError
from specdec.speculator import Speculator

PLAIN = "hf-plain"
ASSISTED = "hf-assisted"


class HFPlain(Peer):
    """`target.generate(...)`."""

    family = PLAIN
    name = PLAIN

    def bind(self, pair: Pair, options: BenchOptions) -> Generate:
        return _hf(pair, options)


@dataclass(frozen=True)
class HFAssisted(Peer):
    """`target.generate(..., assistant_model=draft)` with a constant number of assistant tokens."""

    k: int
    family = ASSISTED

    @property
    def name(self) -> str:
        return f"{ASSISTED}-k{self.k}"

    def refusal(self, options: BenchOptions) -> str | None:
        return None if options.batch == 1 else "transformers assists batch size 1 only"

    def bind(self, pair: Pair, options: BenchOptions) -> Generate:
        generate = _hf(pair, options, assistant_model=pair.draft)

        def assisted(ids: Tensor, seed: int) -> Output:
            # transformers reads these three from the assistant's own generation config and ignores them as
            # arguments of the target's generate (where 20 tokens and a threshold of 0.4 would stay in force).
            config = pair.draft.generation_config
            config.num_assistant_tokens = self.k
            config.num_assistant_tokens_schedule = "constant"
            config.assistant_confidence_threshold = 0.0
            return generate(ids, seed)

        return assisted


@dataclass(frozen=True)
class HFPromptLookup(Peer):
    """`target.generate(..., prompt_lookup_num_tokens=k, max_matching_ngram_size=ngram)`."""

    k: int
    ngram: int
    family = "hf-prompt-lookup"

    @property
    def name(self) -> str:
        return f"{self.family}-k{self.k}-n{self.ngram}"

    def refusal(self, options: BenchOptions) -> str | None:
        return None if options.batch == 1 else "transformers assists batch size 1 only"

    def bind(self, pair: Pair, options: BenchOptions) -> Generate:
        return _hf(pair, options, prompt_lookup_num_tokens=self.k, max_matching_ngram_size=self.ngram)


class SpecPeer(Peer):
    """specdec, drafting some way."""

    calls_modules = False

    @abstractmethod
    def speculator(self, pair: Pair) -> Speculator:
        """What generates, on this pair."""

    def bind(self, pair: Pair, options: BenchOptions) -> Generate:
        return _specdec(self.speculator(pair), options)


@dataclass(frozen=True)
class SpecModel(SpecPeer):
    """specdec with the pair's draft model, chains of k."""

    k: int
    family = "specdec-model"

    @property
    def name(self) -> str:
        return f"{self.family}-k{self.k}"

    def speculator(self, pair: Pair) -> Speculator:
        return Speculator(pair.target, pair.draft, k=self.k)


@dataclass(frozen=True)
class SpecNgram(SpecPeer):
    """specdec with prompt lookup, `branches` continuations of up to k tokens."""

    k: int
    branches: int
    family = "specdec-ngram"

    @property
    def name(self) -> str:
        return f"{self.family}-k{self.k}-b{self.branches}"

    def speculator(self, pair: Pair) -> Speculator:
        return Speculator(pair.target, NgramDrafter(k=self.k, branches=self.branches))


@dataclass(frozen=True)
class SpecPlanned(SpecPeer):
    """specdec as it is by default: which drafter, and how deep, is planned step by step."""

    ngram: bool
    family = "specdec-planned"

    @property
    def name(self) -> str:
        return f"{self.family}-{'model+ngram' if self.ngram else 'model'}"

    def speculator(self, pair: Pair) -> Speculator:
        return Speculator(pair.target, [pair.draft, "ngram"] if self.ngram else pair.draft)


def all_peers(quick: bool = False) -> list[Peer]:
    """Every setting of every peer, plain generation first."""
    if quick:
        return [HFPlain(), HFAssisted(4), HFPromptLookup(10, 2), SpecModel(4), SpecNgram(5, 1), LlamaCpp("f32")]
    return [
        HFPlain(),
        *(HFAssisted(k) for k in (2, 3, 4, 5, 8)),
        *(HFPromptLookup(k, ngram) for k, ngram in ((5, 2), (10, 2), (5, 3), (10, 3))),
        *(SpecModel(k) for k in (2, 3, 4, 5, 8)),
        *(SpecNgram(k, branches) for k in (5, 10) for branches in (1, 2)),
        *(SpecPlanned(ngram) for ngram in (False, True)),
        *(LlamaCpp(dtype, lookup) for dtype in ("f32", "f16") for lookup in (0, 2, 10)),
    ]


def select(peers: list[Peer], wanted: tuple[str, ...]) -> list[Peer]:
    """The peers whose name or family is wanted, and plain generation.

    Raises:
        UnsupportedArgumentError: a name that is neither.
    """
    known = {peer.name for peer in peers} | {peer.family for peer in peers}
    unknown = sorted(set(wanted) - known)
    if unknown:
        raise UnsupportedArgumentError(
            f"peers: unknown {', '.join(unknown)}; expected some of {', '.join(sorted(known))}"
        )
    return [peer for peer in peers if not wanted or peer.name == PLAIN or {peer.name, peer.family} & set(wanted)]


def _sampling(options: BenchOptions) -> dict[str, Any]:
    if not options.sampling:
        return {"do_sample": False}
    # top_k=0: transformers would otherwise cut every law to its default of 50 tokens.
    return {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}


def _hf(pair: Pair, options: BenchOptions, **kwargs: Any) -> Generate:
    settings = {**_sampling(options), **kwargs}
    target: Any = pair.target

    def generate(ids: Tensor, seed: int) -> Output:
        torch.manual_seed(seed)
        mask = torch.ones_like(ids)
        return Output(target.generate(ids, attention_mask=mask, max_new_tokens=options.new_tokens, **settings), None)

    return generate


def _specdec(spec: Speculator, options: BenchOptions) -> Generate:
    settings = _sampling(options)

    def generate(ids: Tensor, seed: int) -> Output:
        mask = torch.ones_like(ids)
        out = spec.generate(ids, attention_mask=mask, max_new_tokens=options.new_tokens, seed=seed, **settings)
        assert isinstance(out, Tensor)
        return Output(out, spec.report)

    return generate
