"""Hidden states of an engine's passes: plain ones, also behind a prefix whose K/V was there already."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch

from specdec import Engine
from specdec.verify.passes.forward import Forward


@pytest.mark.parametrize("draft", [None, "near"])
def test_they_are_those_of_plain_passes(draft: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    target: Any = models.target("llama-gqa")
    with torch.no_grad():  # leaves hooks on the model, which the engine would take for a change of it
        target(torch.tensor([[5]]), output_hidden_states=True)
    engine = Engine(target, models.draft("near", "llama-gqa"), k=3) if draft else Engine(target)
    forward = engine._stepping._passes.target.forward
    forward.features = range(target.config.num_hidden_layers + 1)
    ran: list[tuple[Any, Any]] = []
    own = Forward._run

    def noting(self: Forward, *parts: Any) -> Any:
        outputs = own(self, *parts)
        if self is forward:
            ran.extend(zip(parts, outputs, strict=True))
        return outputs

    monkeypatch.setattr(Forward, "_run", noting)
    prompt = models.prompts((40,), models.VOCAB - 9, 3)[0][0].tolist()
    cached = []
    with engine:
        for asked in (prompt, [*prompt, 5, 6, 7]):  # the second one finds the first one's pages
            ran.clear()
            result = engine.submit(asked, max_new_tokens=8, do_sample=False).result()
            cached.append(result.num_cached_tokens)
            text = [*asked, *result.token_ids]
            with torch.no_grad():
                wanted = target(torch.tensor([text]), output_hidden_states=True).hidden_states
            compared: set[int] = set()
            for part, output in ran:
                (start,), tokens = part.write.starts, part.tokens[0].tolist()
                assert part.nodes is None  # chains
                for column, token in enumerate(tokens):
                    place = start + column
                    if place >= len(text) or text[place] != token:
                        break  # a draft that was not kept
                    compared.add(place)
                    for found, plain in zip(output.features, wanted, strict=True):
                        torch.testing.assert_close(found[0, column], plain[0, place], rtol=1e-9, atol=1e-9)
            assert compared == set(range(result.num_cached_tokens, len(text) - 1))
    assert cached[0] == 0
    assert cached[1] >= 32
