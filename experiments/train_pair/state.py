"""Everything a run remembers between steps, and its one checkpoint file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from specdec.experiments.corpus import corpus_record, training_texts
from specdec.experiments.train_pair.data import WindowStream, encode_files
from specdec.experiments.train_pair.models import build_models, load_tokenizer, train_tokenizer
from specdec.experiments.train_pair.optim import PairOptimizer
from specdec.experiments.train_pair.recipe import Recipe
from specdec.shown_errors import ExperimentError

CHECKPOINT = "checkpoint.safetensors"
JOINT, ON_POLICY, DONE = "joint", "on_policy", "done"


def pair_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> PairOptimizer:
    return PairOptimizer(model, recipe.optimizer, recipe.hidden_lr, recipe.other_lr, recipe.weight_decay)


@dataclass
class TrainingState:
    """Models, optimizers and the position in the plan. `phase` and `step` name the next step to take."""

    recipe: Recipe
    out: Path
    device: torch.device
    tokenizer: PreTrainedTokenizerFast
    stream: WindowStream
    target: LlamaForCausalLM
    draft: LlamaForCausalLM
    target_optimizer: PairOptimizer
    draft_optimizer: PairOptimizer
    corpus_sha256: str
    phase: str = JOINT
    step: int = 0

    @classmethod
    def create(cls, recipe: Recipe, out: Path, device: torch.device | str, *, resume: bool) -> TrainingState:
        """A fresh run in `out`, or the one whose checkpoint is there.

        Raises:
            FileExistsError: if there is a checkpoint and `resume` is False.
            ValueError: if the checkpoint is of another recipe or another corpus.
        """
        device, checkpoint = torch.device(device), out / CHECKPOINT
        if checkpoint.exists() and not resume:
            raise FileExistsError(f"{checkpoint} exists: pass --resume to go on with it, or another --out")
        out.mkdir(parents=True, exist_ok=True)
        texts = training_texts()
        if (out / "tokenizer.json").exists() and checkpoint.exists():
            tokenizer = load_tokenizer(out)
        else:
            tokenizer = train_tokenizer(texts, recipe.vocab_size, recipe.max_positions)
            tokenizer.save_pretrained(out)
        stream = WindowStream(encode_files(tokenizer, texts), recipe.long_length, recipe.seed)
        target, draft = build_models(recipe, tokenizer.eos_token_id)
        torch.nn.Module.to(target, device)
        torch.nn.Module.to(draft, device)
        optimizers = pair_optimizer(target, recipe), pair_optimizer(draft, recipe)
        state = cls(recipe, out, device, tokenizer, stream, target, draft, *optimizers, corpus_record().sha256)
        if checkpoint.exists():
            state._load(checkpoint)
        return state

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for role, model, optimizer in self._parts():
            tensors |= {f"{role}.{name}": value.detach() for name, value in model.named_parameters()}
            tensors |= {f"{role}_optimizer.{label}": value for label, value in optimizer.state_tensors().items()}
        return {name: value.to("cpu").contiguous() for name, value in tensors.items()}

    def _parts(self) -> list[tuple[str, LlamaForCausalLM, PairOptimizer]]:
        return [("target", self.target, self.target_optimizer), ("draft", self.draft, self.draft_optimizer)]

    def save(self) -> None:
        """Write the checkpoint beside the old one, then put it in its place: a crash leaves one of the two."""
        metadata = {
            "recipe": json.dumps(asdict(self.recipe)),
            "phase": self.phase,
            "step": str(self.step),
            "corpus_sha256": self.corpus_sha256,
        }
        partial = self.out / f"{CHECKPOINT}.partial"
        save_file(self._tensors(), partial, metadata=metadata)
        os.replace(partial, self.out / CHECKPOINT)

    def _load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        saved, phase, step = Recipe.from_dict(json.loads(metadata["recipe"])), metadata["phase"], int(metadata["step"])
        if not (saved == self.recipe or (phase == JOINT and saved.same_until(self.recipe, step))):
            raise ExperimentError(
                f"expected the recipe of {path} ({saved}), got {self.recipe}, which differs before step {step}; use "
                "the flags the run was started with (--tokens may change as long as the steps taken stay the same, see "
                "--cooldown-step), or name another --out"
            )
        if metadata["corpus_sha256"] != self.corpus_sha256:
            raise ExperimentError(
                f"expected the corpus with sha256 {metadata['corpus_sha256']}, got {self.corpus_sha256}; "
                "resume with the Python release that started the run, or use another --out"
            )
        for role, model, optimizer in self._parts():
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(tensors[f"{role}.{name}"])
            prefix = f"{role}_optimizer."
            optimizer.load_state_tensors(
                {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            )
        self.phase, self.step = phase, step

    def log(self, **values: float | int | str) -> None:
        """Append one line to `log.jsonl`."""
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps({"phase": self.phase, "step": self.step, **values}) + "\n")
