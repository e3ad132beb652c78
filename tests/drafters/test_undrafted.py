"""A step without a draft draws what every lossless rule would have drawn, to the very token."""

from __future__ import annotations

import pytest
import torch

from specdec.decision import undrafted
from specdec.verify import DraftTree, Noise
from specdec.verify.rules import RULES

SAMPLING = [name for name, rule in RULES.items() if rule.lossless and not rule.uses_race and name != "greedy"]


@pytest.mark.parametrize("name", SAMPLING)
def test_equals_the_rule_on_a_bare_root(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = 4000
    law = torch.randn(rows, 1, 7, generator=generator).mul(2).softmax(-1)
    uniforms = torch.rand(2, rows, generator=generator, dtype=torch.float64)
    noise = Noise(uniforms[0][:, None], uniforms[1])
    tree = DraftTree.root_only(torch.zeros(rows, dtype=torch.int64))
    expected, got = RULES[name]()(tree, law, noise), undrafted(law, noise)
    assert torch.equal(got.next_token, expected.next_token)
    assert torch.equal(got.num_accepted, expected.num_accepted)
    assert torch.equal(got.path[:, 0], expected.path[:, 0])
    assert not torch.equal(undrafted(law, Noise(noise.accept, 1 - noise.residual)).next_token, expected.next_token)
