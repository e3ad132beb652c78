"""Which models strict mode takes, and the probe that holds its promise against this machine."""

from __future__ import annotations

from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv.errors import UnsupportedModelError
from specdec.kv.limits import MOST_NODES, checked_count
from specdec.kv.shared import SharedKVCache
from specdec.kv.support import num_cache_layers, text_config
from specdec.verify.attention.blocks import BLOCK
from specdec.verify.attention.register import attention_of
from specdec.verify.passes.choose import strict_runners_for
from specdec.verify.passes.forward import Forward
from specdec.verify.passes.linear import own_linears
from specdec.verify.topology import Topology
from specdec.verify.tree import DraftTree

DEFAULT_WIDTH = 16
"""Nodes per strict pass: a chain of 15, or most static trees."""

_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CLOSE = 0.1
"""Strict and ordinary logits may be so far apart, relative to their spread: rounding, not another formula."""


class StrictCost(NamedTuple):
    """Milliseconds of one row's strict pass, and of an ordinary pass over one token, on the probe's text."""

    ms_strict: float
    ms_plain: float


class StrictMode:
    """What `exactness="strict"` means for one target.

    The promise rests on the kernels of the machine: a matrix product of fixed size must give a row the same bits
    wherever it stands. No library documents that, so `cost` tries it on the model itself before the first use.

    Args:
        width: nodes of every pass after the prefill, the root included.

    Raises:
        UnsupportedArgumentError: a width below 2 or above `MOST_NODES` + 1.
        UnsupportedModelError: a model in training mode, with hooks of accelerate, or with routed experts.
    """

    def __init__(self, model: PreTrainedModel, width: int = DEFAULT_WIDTH):
        self.width = checked_count(
            "strict_width",
            width,
            2,
            MOST_NODES + 1,
            f"a pass has at least 2 nodes, the root and one draft; the default is {DEFAULT_WIDTH}",
        )
        _check_model(model)
        self.model = model
        self._costs: dict[tuple[str, int, torch.dtype, torch.device], StrictCost] = {}

    def forward(self, name: str) -> Forward:
        """See `strict_runners_for`."""
        return Forward(self.model, name, strict_runners_for(self.model, self.width))

    def cost(self, device: torch.device) -> StrictCost:
        """Probe once per number of threads, dtype and device.

        Raises:
            UnsupportedModelError: a token's bits depend on its slot here, or the strict attention is not this model's.
        """
        forward = self.forward("target")
        key = (forward.runners[0].name, torch.get_num_threads(), self.model.dtype, device)
        if key not in self._costs:
            with forward.prepared():
                self._costs[key] = _Probe(forward, self.width, device).run()
        return self._costs[key]


def _check_model(model: PreTrainedModel) -> None:
    name, config = type(model).__name__, text_config(model)

    def refuse(what: str, instead: str) -> None:
        raise UnsupportedModelError(f"exactness='strict': {name} {what}; {instead}, or use exactness='distribution'")

    if model.training:
        refuse("is in training mode, where dropout makes every pass different", "call model.eval()")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        refuse("was placed by accelerate (device_map, offloading), which is not verified", "load it on one device")
    experts = next((field for field in _EXPERT_FIELDS if getattr(config, field, None)), None)
    if experts is not None:
        refuse(
            f"routes tokens to experts ({experts}={getattr(config, experts)}): the size of an expert's product depends "
            "on the other nodes", "use a dense model",
        )  # fmt: skip


class _Probe:
    """One text, run through strict passes of different trees: the logits of a token must be the same bits in all."""

    def __init__(self, forward: Forward, width: int, device: torch.device):
        self.forward, self.model, self.width = forward, forward.model, width
        model = self.model
        # The drafted tokens lie across a border of blocks where the model has that many positions.
        room = self.forward.num_positions or BLOCK + 2 * width
        self.length = max(1, min(BLOCK - width // 2, room - width))
        self.kept = max(1, min(width // 2, room - self.length - 1))
        vocab = int(text_config(model).vocab_size)
        count = self.length + width + 1
        # A fixed scattering over the vocabulary: the global generator is the caller's.
        self.text = (torch.arange(count, device=device) * 7919 + 11) % vocab
        self.cache = SharedKVCache({"target": num_cache_layers(model)}, 1, count + width)
        self.ms: list[float] = []

    def run(self) -> StrictCost:
        self.forward.prefill(self.cache, self.text[None], [0], [self.length])
        self.cache.set_length(0, self.length)
        drafted = self.text[self.length : self.length + self.width]
        star = self._pass(torch.cat([drafted[:1], drafted[1:2].expand(self.width - 1)]), (-1, *[0] * (self.width - 1)))
        ordinary, ms_plain = self._ordinary(drafted)
        chain = self._pass(drafted, tuple(range(-1, self.width - 1)))
        self._require(star[0], chain[0], "under other drafts")
        for node in range(1, self.width):
            self._require(star[node], chain[1], f"in slot {node} of {self.width}")
        if float((chain - ordinary).norm()) > _CLOSE * float((ordinary - ordinary.mean(-1, keepdim=True)).norm()):
            raise UnsupportedModelError(
                f"exactness='strict': the strict attention does not reproduce {type(self.model).__name__}'s own logits "
                "(terms it does not know?); use exactness='distribution'"
            )
        kept = self.kept
        self.cache.commit([list(range(kept))])
        rest = self.width - kept
        # Every second node is a stray sibling, so that the text's nodes stand in other slots than their depth.
        parents, places, tokens = [-1], [0], [drafted[kept]]
        while len(parents) + 2 <= self.width and len(places) < rest:
            parents += [places[-1]] * 2
            tokens += [drafted[0], drafted[kept + len(places)]]
            places.append(len(parents) - 1)
        stray = self._pass(torch.stack(tokens), tuple(parents))
        alone = self._pass(drafted[kept : kept + 1], (-1,))
        self._require(alone[0], chain[kept], "decoded alone and drafted")
        for depth, node in enumerate(places):
            self._require(stray[node], chain[kept + depth], "in another tree")
        return StrictCost(min(self.ms), ms_plain)

    def _pass(self, tokens: Tensor, parents: tuple[int, ...]) -> Tensor:
        tree = DraftTree.build(Topology(parents), tokens[None])
        start = perf_counter()
        logits = self.forward.tree(self.cache, tree).logits[0].float().cpu()
        self.ms.append(1e3 * (perf_counter() - start))
        return logits

    def _ordinary(self, drafted: Tensor) -> tuple[Tensor, float]:
        """Logits of the chain from the model's modules, and the milliseconds of an ordinary one-token pass."""
        ms = []
        ordinary = Forward(self.model, "target")
        with ordinary.prepared():
            for _ in range(3):
                start = perf_counter()
                ordinary.causal(self.cache, drafted[None, :1], [self.length], None, keep=0).logits.cpu()
                ms.append(1e3 * (perf_counter() - start))
        with attention_of(self.model), own_linears():
            logits = ordinary.causal(self.cache, drafted[None], [self.length], None, keep=0).logits[0]
        self.cache.rollback()
        return logits.float().cpu(), min(ms)

    def _require(self, one: Tensor, other: Tensor, where: str) -> None:
        if not torch.equal(one, other):
            raise UnsupportedModelError(
                f"exactness='strict' cannot be promised for {type(self.model).__name__} in {self.model.dtype} with "
                f"{torch.get_num_threads()} threads here: the same token has other logits {where} (largest difference "
                f"{float((one - other).abs().max()):.1e}). Try torch.set_num_threads(1), a strict_width that is a "
                "multiple of 16, or use exactness='distribution'"
            )
