"""Ray Serve: `serve run ray.yaml`, replicas of this library's own server (`specdec/serve/ray.py`).

Names: python/ray/serve/schema.py of ray-project/ray, class ServeDeploySchema, and class Arguments of that module.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from specdec.pairing.export.base import Export, lossy_note, refuse, shared_notes, yaml
from specdec.pairing.registry import pair_table
from specdec.pairing.runnable import refusal
from specdec.pairing.schema import Pair

CONFIG = "ray.yaml"


def export_ray(pair: Pair) -> Export:
    """The whole pair goes along, as its file has it, and carries over but for a rule that the server does not have."""
    if refusal(pair) is not None:
        why = "EAGLE heads yet" if pair.vocabulary == "shared" else "models with two tokenizers"
        raise refuse(pair, "ray", f"it is this library that runs there, and does not run {why}", "export to vllm")
    target, draft = replace(pair.target, facts=None), replace(pair.draft, facts=None)
    if target.path is not None:
        target = replace(target, path=pair.location(target))
    if draft.path is not None:
        draft = replace(draft, path=pair.location(draft))
    drafting = replace(pair.drafting, rule="auto") if pair.drafting.rule == "typical" else pair.drafting
    table = pair_table(replace(pair, target=target, draft=draft, drafting=drafting, published=()))
    arguments: dict[str, Any] = {"pair": table, "min_replicas": 1, "max_replicas": 2, "num_cpus": 1, "num_gpus": 0}
    application = {"name": "specdec", "route_prefix": "/", "import_path": "specdec.serve.ray:app"}
    first, *others = yaml(application, "  ").splitlines(keepends=True)
    text = f"applications:\n- {first[2:]}{''.join(others)}  args:\n{yaml(arguments, '    ')}"
    notes = shared_notes(pair, chooses=True) + lossy_note(pair, "specdec's server")
    notes.append("num_cpus and num_gpus are what one replica takes of the cluster, replicas come as they are needed.")
    return Export("ray", arguments, (("serve", "run", CONFIG),), {CONFIG: text}, tuple(notes))
