"""Near-tie audit: where greedy text leaves plain `generate`'s, was it rounding or a bug?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv.versions import cache_of, cached
from specdec.lab.findings import Finding
from specdec.lab.reference import processors_of
from specdec.lab.rounding import nudged_logits
from specdec.speculator import Speculator

MARGIN = 8.0
"""Two tokens tie when their scores are closer than so many times what rounding moves them by (a root mean square:
honest passes were found within 4 of them, with few passes measured now and then within 7)."""
SHOWN = 3
"""Divergences that are told one by one."""


@dataclass(frozen=True)
class Divergence:
    """The first token at which a greedy text leaves plain generation's.

    gap: processed score of plain generation's token minus ours, in a one-token pass over the common text; noise: by how
    much rounding moves it (see `gap_noise`). near_tie: the gap is within MARGIN times the noise.
    """

    prompt: int
    position: int
    plain_token: int
    our_token: int
    gap: float
    noise: float
    near_tie: bool


@torch.no_grad()
def last_logits(target: PreTrainedModel, ids: Tensor, width: int) -> Tensor:
    """Raw logits `[vocab]` after `ids` `[1, tokens]`, whose last `width` tokens run as one pass on a plain cache."""
    model: Any = target
    width = min(width, ids.shape[1])
    past = None
    if width < ids.shape[1]:
        past = cache_of(model(input_ids=ids[:, :-width], use_cache=True))
    logits: Tensor = model(input_ids=ids[:, -width:], **cached(model, past)).logits[0, -1]
    return logits


def kernel_noise(target: PreTrainedModel, ids: Tensor, width: int) -> float:
    """Largest difference between the logits of a one-token and a `width`-token pass at the end of `ids`.

    Never below a few units in the last place of the largest logit: one sample may agree by luck.
    """
    one = last_logits(target, ids, 1)
    several = last_logits(target, ids, width)
    floor = 4 * torch.finfo(one.dtype).eps * float(one.abs().max())
    return max(floor, float((one - several).abs().max()))


def gap_noise(target: PreTrainedModel, text: Tensor, pair: Sequence[int], width: int, processors: Any) -> float:
    """By how much rounding moves the difference of two tokens' processed scores after `text` `[1, tokens]`.

    The root mean square over passes that are rounded otherwise (`nudged`), or what a one-token and a `width`-token pass
    differ by, where that is more; at least the step between neighbouring scores of that size in the model's dtype.
    """
    one, several = last_logits(target, text, 1), last_logits(target, text, width)
    whole = last_logits(target, text, text.shape[1])
    logits = torch.cat([one[None], several[None], whole[None], nudged_logits(target, text, 1)[:, 0, 0]])
    scores = processors(text.expand(len(logits), -1), logits.to(torch.float32, copy=True)).double()
    gaps = scores[:, pair[0]] - scores[:, pair[1]]
    step = torch.finfo(one.dtype).eps * float(scores[0, list(pair)].abs().max())
    return max(step, float((gaps[0] - gaps[1]).abs()), float((gaps[3:] - gaps[2]).square().mean().sqrt()))


class GreedyAudit:
    """Compares greedy texts prompt by prompt. `width`: nodes of a verification pass."""

    def __init__(self, spec: Speculator, width: int, new_tokens: int):
        self.spec, self.width, self.new_tokens = spec, max(2, width), new_tokens
        self.noise = 0.0
        self.compared = 0
        self.num_prompts = 0
        self.divergences: list[Divergence] = []

    def add(self, number: int, prompt: Tensor) -> None:
        """Generate both ways after `prompt` (int64 `[1, tokens]`) and compare."""
        target: Any = self.spec.target
        arguments: dict[str, Any] = {
            "attention_mask": torch.ones_like(prompt), "max_new_tokens": self.new_tokens, "do_sample": False,
        }  # fmt: skip
        plain = type(target).generate(target, prompt, **arguments)
        ours = self.spec.generate(prompt, **arguments)
        assert isinstance(ours, Tensor)
        self.num_prompts += 1
        self.noise = max(self.noise, kernel_noise(target, plain, self.width))
        width = min(plain.shape[1], ours.shape[1])
        apart = (plain[0, :width] != ours[0, :width]).nonzero()
        column = int(apart[0]) if len(apart) else width
        self.compared += column - prompt.shape[1]
        if len(apart) or plain.shape != ours.shape:
            self.divergences.append(self._judge(number, prompt, plain[0].tolist(), ours[0].tolist(), column))

    def _judge(self, number: int, prompt: Tensor, plain: Sequence[int], ours: Sequence[int], column: int) -> Divergence:
        position = column - prompt.shape[1]
        if column >= min(len(plain), len(ours)):  # one text goes on where the other ended on the same token
            return Divergence(number, position, -1, -1, float("inf"), self.noise, False)
        target: Any = self.spec.target
        text = torch.tensor([plain[:column]], device=prompt.device)
        self.noise = max(self.noise, kernel_noise(target, text, self.width))
        processors: Any = processors_of(target, prompt, do_sample=False)
        noise = gap_noise(target, text, (plain[column], ours[column]), self.width, processors)
        scores = processors(text, last_logits(target, text, 1)[None].to(torch.float32, copy=True))[0]
        gap = float(scores[plain[column]] - scores[ours[column]])
        return Divergence(number, position, plain[column], ours[column], gap, noise, abs(gap) <= MARGIN * noise)

    def finding(self) -> Finding:
        bugs = [d for d in self.divergences if not d.near_tie]
        texts = f"{self.num_prompts} texts, {self.compared} equal tokens, kernel noise {self.noise:.1e}"
        ties = [d for d in self.divergences if d.near_tie]
        for d in (bugs + ties)[:SHOWN]:
            texts += f"; prompt {d.prompt} leaves plain generate at new token {d.position}, "
            texts += f"scores {d.gap:.1e} apart, which rounding moves by {d.noise:.1e}: "
            texts += "near-tie" if d.near_tie else "BUG"
        if len(self.divergences) > SHOWN:
            texts += f"; in all {len(ties)} at near-ties, {len(bugs)} by bugs"
        figures = {
            "compared_tokens": self.compared, "kernel_noise": self.noise,
            "divergences": [asdict(d) for d in self.divergences],
        }  # fmt: skip
        return Finding("greedy text", "FAIL" if bugs else "pass", texts, figures)
