"""Loading the pair, and turning prompts into the ids a turn starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from specdec.experiments.accept.options import AcceptOptions
from specdec.experiments.workloads import Prompt
from specdec.kv.errors import SpecdecError
from specdec.pairing.loading import load_pair


@dataclass(frozen=True)
class Models:
    """target: what writes. draft: the pair's draft model. context: most tokens the target takes."""

    target: Any
    draft: Any
    tokenizer: Any
    device: torch.device
    context: int

    @staticmethod
    def load(options: AcceptOptions, device: torch.device) -> Models:
        """Raises SpecdecError: models that cannot be loaded, or whose vocabularies differ."""
        target, draft, tokenizer = load_pair(options.chosen_pair(), getattr(torch, options.dtype), device)
        if options.ignore_eos:
            target.generation_config = GenerationConfig(pad_token_id=0)
        context = int(getattr(target.config.get_text_config(), "max_position_embeddings", 1 << 20))
        return Models(target, draft, tokenizer, device, context)

    def turn_ids(self, prompt: Prompt, answers: list[str], options: AcceptOptions) -> list[int]:
        """The ids that turn `len(answers)` starts from, cut on the left to what fits."""
        if prompt.ids is not None and not answers:
            ids = list(prompt.ids)
        elif prompt.chat and getattr(self.tokenizer, "chat_template", None):
            messages = []
            for asked, said in zip(prompt.turns, [*answers, None], strict=False):
                messages.append({"role": "user", "content": asked})
                if said is not None:
                    messages.append({"role": "assistant", "content": said})
            ids = list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        else:
            pieces = [text for pair in zip(prompt.turns, [*answers, ""], strict=False) for text in pair]
            ids = list(self.tokenizer("\n\n".join(piece for piece in pieces if piece)).input_ids)
        room = min(options.prompt_tokens, self.context - options.new_tokens)
        if room < 1:
            raise SpecdecError(f"new_tokens={options.new_tokens} leaves no room in a context of {self.context} tokens")
        return ids[-room:]
