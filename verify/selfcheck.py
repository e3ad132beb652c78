"""Before a class nobody has held against plain `generate` is used for the first time, it is: on a few tokens."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from specdec.kv.errors import UnsupportedModelError
from specdec.kv.families import is_tested
from specdec.kv.shared import SharedKVCache
from specdec.kv.support import num_cache_layers, text_config
from specdec.kv.versions import cached
from specdec.verify.passes.forward import Forward
from specdec.verify.passes.linear import is_dense
from specdec.verify.topology import Topology
from specdec.verify.tree import DraftTree

_LENGTHS = (12, 7)
"""Tokens of the two prompts; the shorter one is padded on the left."""
_NEW = 4
_TREE = Topology((-1, 0, 0, 2, 1))
"""The root, a stray token, the text's next two, and one below the stray: what is kept stands in other slots than its
depth says."""
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest distance of logits, relative to their spread. Many models compute norms in float32 whatever their dtype."""
_COARSE = 0.1
"""The same in 16 bits and below, for quantised weights, and where products may be rounded (TF32)."""
_PASSING = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype")
"""Configuration entries that change no computation."""

_trusted: set[tuple[type, str, torch.dtype, str]] = set()
"""What has passed in this process."""


def check_text(model: PreTrainedModel, role: str) -> None:
    """Hold tree passes on the shared cache against the model's own `generate`, unless its class is a tested one.

    Plain greedy decoding of two prompts of 12 and 7 tokens in one left-padded batch gives four tokens and their logits;
    the passes of this library must give the same logits: after a prefill of rows of unequal length, for the nodes of a
    tree (a stray branch against one pass over that text alone), and after a commit that moves slots. So
    models are found whose tokens attend to later ones, are placed by cache slot or by column, depend on the rows or the
    siblings beside them, or keep more than K/V. A sliding window wider than these few tokens is not put to the test.

    Once per class, configuration, dtype and device in a process: some ten passes over a few tokens, milliseconds for a
    small model and about a second's decoding for a large one. Nothing stays on the model; no random number is drawn
    from a global generator.

    Raises:
        UnsupportedModelError: other logits, by how much and where; or a pass that fails.
    """
    kind = type(model)
    if is_tested(model):
        return
    config = {name: value for name, value in model.config.to_dict().items() if name not in _PASSING}
    shape = json.dumps(config, default=str, sort_keys=True)
    key = (kind, shape, model.dtype, str(model.device))
    if key in _trusted:
        return
    with _quiet(model):
        try:
            _Trial(model, role).run()
        except (UnsupportedModelError, torch.OutOfMemoryError):
            raise
        except Exception as fault:
            raise UnsupportedModelError(
                f"{role}: {kind.__name__} is none of the classes held against plain generate (docs/models.md), and a "
                f"trial of it over a few tokens ended in {type(fault).__name__}: {fault}. Use plain generate."
            ) from fault
    _trusted.add(key)


class _Trial:
    """One text, decoded by the model's `generate` and by tree passes."""

    def __init__(self, model: PreTrainedModel, role: str):
        self.model, self.role = model, role
        self.device = _device(model)
        self.barred = _special_ids(model)
        self.vocab = int(text_config(model).vocab_size)
        pad = getattr(text_config(model), "pad_token_id", None)
        self.pad = pad if isinstance(pad, int) and 0 <= pad < self.vocab else 0
        self.prompts = [self._text(length, first) for first, length in enumerate(_LENGTHS)]
        self.tolerance = _tolerance(model, self.device)

    def run(self) -> None:
        self._require_hand_over()
        texts, wanted = self._plain()
        rows = range(len(texts))
        strays = [self._text(2, row + 5) for row in rows]
        cache = SharedKVCache({"target": num_cache_layers(self.model)}, len(texts), max(_LENGTHS) + 4 * _NEW)
        forward = Forward(self.model, "target")
        with forward.prepared():
            lengths = [length - 1 for length in _LENGTHS]
            forward.prefill(cache, self._padded(texts, left=False), [0] * len(texts), lengths)
            for row, length in enumerate(lengths):
                cache.set_length(row, length)
            tokens = [
                [text[at], stray[0], text[at + 1], text[at + 2], stray[1]]
                for text, stray, at in zip(texts, strays, lengths, strict=True)
            ]
            tree = forward.tree(cache, DraftTree.build(_TREE, torch.tensor(tokens, device=self.device))).logits
            cache.commit([[0, 2]] * len(texts))
            rest = [text[at + 2 : at + 4] for text, at in zip(texts, lengths, strict=True)]
            chain = forward.tree(
                cache, DraftTree.build(Topology.chain(1), torch.tensor(rest, device=self.device))
            ).logits
        for row in rows:
            for node, step in ((0, 0), (2, 1), (3, 2)):
                self._require(
                    tree[row, node], wanted[row][step], f"in a draft tree, {step + 1} tokens after the prompt"
                )
            for node, step in ((0, 2), (1, 3)):
                self._require(chain[row, node], wanted[row][step], "after a draft was kept in part")
            alone = self._at_once([*texts[row][: _LENGTHS[row]], *strays[row]])
            self._require(tree[row, 1], alone[-2], "beside a sibling in a draft tree")
            self._require(tree[row, 4], alone[-1], "below a sibling in a draft tree")

    def _require_hand_over(self) -> None:
        """`generate` must hand a prompt through to a decoding function, as it is."""
        prompt = torch.tensor(self.prompts[:1], device=self.device)
        given: list[Tensor] = []

        def decode(model: PreTrainedModel, input_ids: Tensor, **rest: Any) -> Tensor:
            given.append(input_ids)
            return input_ids

        plain: Any = type(self.model)
        plain.generate(self.model, prompt, max_new_tokens=1, do_sample=False, custom_generate=decode)
        if len(given) != 1 or not torch.equal(given[0], prompt):
            raise UnsupportedModelError(
                f"{self.role}: {type(self.model).__name__} has a generate of its own that does not hand its prompt on "
                "as text; use it as it is."
            )

    def _plain(self) -> tuple[list[list[int]], list[list[Tensor]]]:
        """Per row: prompt and greedy continuation, and the logits of each new token, of one left-padded batch.

        Of each prompt alone where the batch gives NaN: eager float64 models spoil padded rows themselves.
        """
        texts, logits = self._generated(self.prompts)
        if any(step.isnan().any() for steps in logits for step in steps):
            alone = [self._generated([prompt]) for prompt in self.prompts]
            texts, logits = [row[0][0] for row in alone], [row[1][0] for row in alone]
        return texts, logits

    def _generated(self, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[Tensor]]]:
        ids = self._padded(prompts, left=True)
        width = ids.shape[1]
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        config = GenerationConfig(
            max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False, num_beams=1, use_cache=True,
            pad_token_id=self.pad, suppress_tokens=sorted(self.barred) or None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        plain: Any = type(self.model)
        try:
            out = plain.generate(self.model, ids, attention_mask=mask, generation_config=config)
        except torch.OutOfMemoryError:
            raise
        except Exception as fault:
            raise UnsupportedModelError(
                f"{self.role}: {type(self.model).__name__} is none of the classes held against plain generate "
                f"(docs/models.md), and its own generate, tried on {len(prompts)} short texts without images or sound, "
                f"ended in {type(fault).__name__}: {fault}"
            ) from fault
        texts = [row[width - len(prompt) :].tolist() for row, prompt in zip(out.sequences, prompts, strict=True)]
        return texts, [[step[row] for step in out.logits] for row in range(len(texts))]

    def _at_once(self, text: list[int]) -> Tensor:
        """Logits `[tokens, vocab]` of one pass over the whole text, with nothing in its cache before."""
        with torch.no_grad():
            ids = torch.tensor([text], device=self.device)
            places = torch.arange(len(text), device=self.device)[None]
            fresh: Any = DynamicCache()
            out = self.model(input_ids=ids, position_ids=places, return_dict=True, **cached(self.model, fresh))
        logits: Tensor = out.logits[0]
        return logits

    def _require(self, found: Tensor, wanted: Tensor, where: str) -> None:
        found, wanted = (logits[: self.vocab].double().cpu() for logits in (found, wanted))
        spread = float((wanted - wanted.mean()).norm())
        apart = float((found - wanted).norm()) / max(spread, 1e-12)
        if not apart <= self.tolerance:  # NaN is no agreement
            raise UnsupportedModelError(
                f"{self.role}: {type(self.model).__name__} is none of the classes held against plain generate "
                f"(docs/models.md), and a trial over a few tokens gives other logits than its own generate {where}: "
                f"they differ by {apart:.1e} of their spread, expected at most {self.tolerance:.0e} in "
                f"{self.model.dtype}. Use plain generate."
            )

    def _text(self, length: int, first: int) -> list[int]:
        """A fixed scattering over the vocabulary, without special tokens."""
        usual = [token for token in range(min(self.vocab, 50_000)) if token not in self.barred] or [0]
        return [usual[(97 * first + 7919 * i + 11) % len(usual)] for i in range(length)]

    def _padded(self, texts: list[list[int]], left: bool) -> Tensor:
        width = max(map(len, texts))
        fill = [[self.pad] * (width - len(text)) for text in texts]
        return torch.tensor(
            [[*gap, *text] if left else [*text, *gap] for gap, text in zip(fill, texts, strict=True)],
            device=self.device,
        )


def _device(model: PreTrainedModel) -> torch.device:
    """Where its input goes. Offloaded weights are on "meta" between passes."""
    embeddings: Any = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    return torch.device("cpu") if device.type == "meta" else device


def _tolerance(model: PreTrainedModel, device: torch.device) -> float:
    quantised = getattr(model, "is_quantized", False) or not all(is_dense(weight) for weight in model.parameters())
    if quantised or (device.type != "cpu" and model.dtype == torch.float32):
        return _COARSE
    return _TOLERANCES.get(model.dtype, _COARSE)


def _special_ids(model: PreTrainedModel) -> set[int]:
    """Ids with a meaning of their own: ends, pads, places of images."""
    found: set[int] = set()
    for config in (model.config, text_config(model), model.generation_config):
        for name, value in vars(config).items() if config is not None else ():
            if "token" in name and name.split("_")[-1] in ("id", "ids", "index"):
                values = value if isinstance(value, (list, tuple)) else [value]
                found.update(token for token in values if isinstance(token, int) and token >= 0)
    return found


@contextmanager
def _quiet(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and the global generators as they were, and no warnings about a text nobody sees."""
    training = [(part, part.training) for part in model.modules() if part.training]
    devices = sorted({weight.device for weight in model.parameters() if weight.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part, _ in training:
            part.training = False
        try:
            yield
        finally:
            for part, flag in training:
                part.training = flag
