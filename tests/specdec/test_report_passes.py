"""What a call says of its passes: native or not, over weights of which form, in what precision sums were made."""

from __future__ import annotations

import copy
import json

import models
import packed_models

from specdec import Speculator
from specdec.verify.native.library import why_not
from specdec.verify.passes.account import PassesReport, WeightForm


def test_the_report_says_how_passes_were_computed() -> None:
    ids = models.prompts((5,), models.VOCAB, 4)[0]
    found: dict[str, PassesReport] = {}
    said: dict[str, str] = {}
    packed = packed_models.target("llama-gqa", "bf16", bits=8)
    hooked = copy.deepcopy(models.target("llama-gqa", "fp32"))
    hooked.register_forward_hook(lambda *_: None)
    subjects = {name: models.target("llama-gqa", name) for name in ("fp32", "bf16", "fp64")}
    for name, model in {**subjects, "packed": packed, "hooked": hooked}.items():
        spec = Speculator(model)
        spec.generate(ids, do_sample=False, max_new_tokens=6, eos_token_id=None)
        assert spec.report is not None
        found[name], said[name] = spec.report.passes, spec.report.passes.line()
        assert found[name].num_passes == 6, "one a token, the first one over the prompt"
        assert json.loads(json.dumps(spec.report.to_dict()))["passes"]["way"] == found[name].way
        assert said[name] in spec.report.summary()
    size = sum(weight.numel() for weight in subjects["fp32"].parameters() if weight.dim() == 2)
    native = why_not() is None
    for name, form, width in (("fp32", "float32", 4), ("bf16", "bfloat16", 2), ("fp64", "float64", 8)):
        assert found[name].weights == [WeightForm(form, width * size)]
    for name in ("fp32", "bf16", "packed"):
        assert (found[name].way, found[name].sums) == (("native", "float32") if native else ("direct", "torch"))
        assert found[name].num_native == 6 * native
    assert (found["fp64"].way, found["fp64"].sums, found["fp64"].num_native) == ("direct", "torch", 0)
    assert (found["hooked"].way, found["hooked"].weights) == ("modules", found["fp32"].weights)
    assert {own.form for own in found["packed"].weights} == {"8 bits", "bfloat16"}
    if native:
        assert said["fp32"] == f"6 natively; weights {4 * size / 2**20:.1f} MiB in float32; sums in float32"
        assert said["bf16"].endswith("sums in float32, states rounded to bfloat16 as by the modules")
    assert said["hooked"].startswith("6 through the model's modules; ")
    mixed = PassesReport("native", 7, 5, [], "float32", "float32")
    assert mixed.line().startswith("5 of 7 natively")
