"""The logged run: one text per prompt and temperature, written by the target, with summaries of both laws along it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.experiments.accept.measure import generating, seed_of
from specdec.experiments.accept.options import AcceptOptions
from specdec.experiments.accept.store import Store
from specdec.experiments.accept.summary import summarise
from specdec.experiments.pair import Models
from specdec.experiments.ways import sampling
from specdec.experiments.workloads import Prompt
from specdec.lab.reference import processors_of
from specdec.speculator import Speculator


def log_unit(
    models: Models, speculator: Speculator, temperature: float, prompt: Prompt, options: AcceptOptions, store: Store
) -> dict[str, Any]:
    """Write the prompt's first turn, summarise it, and return the line that says where the summary lies.

    The text is decoded with a seed of its own, so that it is not the text of any cell it will be compared with.
    """
    ids = models.turn_ids(prompt, [], options.new_tokens, options.prompt_tokens)
    given = torch.tensor([ids], device=models.target.device)
    seed = seed_of(options, prompt, -1)
    out = generating(speculator, temperature, options)(given, seed).ids
    p, q = laws(models, out, len(ids), temperature, options)
    summary = summarise(p, q, out[0, len(ids) :], given[0], seed & 0x7FFFFFFF)
    name = hashlib.sha256(f"{temperature:g}/{prompt.id}".encode()).hexdigest()[:16] + ".npz"
    summary.save(store.folder / "logs" / name)
    return {"temperature": temperature, "prompt": prompt.id, "domain": prompt.domain, "file": name}


@torch.inference_mode()
def laws(
    models: Models, text: Tensor, prompt: int, temperature: float, options: AcceptOptions
) -> tuple[Tensor, Tensor]:
    """Both models' laws of every token of `text` (int64 `[1, tokens]`) from `prompt` on, float `[n, vocab]`."""
    found = []
    law = sampling(temperature, options.top_k, options.top_p)
    processors: Any = processors_of(models.target, text[:, :prompt], **law)  # none of them looks at the text
    pair: tuple[Any, Any] = models.target, models.draft
    for model in pair:
        known = text.clamp(max=model.get_input_embeddings().num_embeddings - 1)
        logits = model(known, use_cache=False, logits_to_keep=text.shape[1] - prompt + 1).logits[0, :-1].float()
        found.append(F.softmax(processors(text[:, :-1], logits), dim=-1))
    p, q = found
    if q.shape[1] < p.shape[1]:  # a narrower vocabulary never drafts what it does not have
        q = F.pad(q, (0, p.shape[1] - q.shape[1]))
    elif q.shape[1] > p.shape[1]:
        q = q[:, : p.shape[1]]
        q = q / q.sum(-1, keepdim=True)
    return p, q
