"""Result files keep their form: keys, nesting and kinds of values of every file that an experiment writes.

`result_schemas.json` holds each file's form; written again by `python tests/experiments/test_result_schemas.py`, in a
diff that shows what changed. Committed results and whoever reads them depend on it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import test_llamacpp_tools as tools
from test_bench import make_pair
from typer.testing import CliRunner

from specdec.experiments import passes, strict
from specdec.experiments.accept.__main__ import main as accept
from specdec.experiments.accept.options import AcceptOptions
from specdec.experiments.accept.runner import run as run_accept
from specdec.experiments.accept.setting import Setting
from specdec.experiments.bench import runner
from specdec.experiments.bench.memory import Memory
from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.gpu.options import SECTIONS, GpuOptions
from specdec.experiments.gpu.sections import run as run_gpu
from specdec.experiments.laws.__main__ import main as laws
from specdec.experiments.pair import Models
from specdec.experiments.planner.__main__ import main as planner
from specdec.experiments.planner.calls import Call
from specdec.experiments.planner.processes import Batch
from specdec.experiments.rules import pair as rules_pair
from specdec.experiments.rules.__main__ import main as rules
from specdec.experiments.serving.__main__ import main as serving
from specdec.experiments.train_pair import card, evaluate
from specdec.shipped import pair_folder

PINNED = Path(__file__).with_name("result_schemas.json")
MACHINE = {"cpu", "git_commit", "git_dirty", "gpu", "load_average", "num_cpus", "versions"}
"""What provenance says of the machine may be missing on another one."""
Schema = Any
Patch = pytest.MonkeyPatch


def form(values: list[Any]) -> Schema:
    """What all of `values` look like: a kind ("text", "number", "none|number"), a list of one form, a form by key (with
    "?" behind keys that some lack), or several of these beside each other under "|"."""
    names = {type(None): "none", bool: "bool", int: "number", float: "number", str: "text"}
    found: list[Schema] = []
    if kinds := sorted({names[type(value)] for value in values if not isinstance(value, (dict, list))}):
        found.append("|".join(kinds))
    if lists := [value for value in values if isinstance(value, list)]:
        found.append([form([one for value in lists for one in value])])
    if dicts := [value for value in values if isinstance(value, dict)]:
        keys = {key: [one[key] for one in dicts if key in one] for one in dicts for key in one}
        found.append({
            key + "?" * (len(own) < len(dicts)): "machine" if key in MACHINE else form(own)
            for key, own in sorted(keys.items())
        })  # fmt: skip
    return found[0] if len(found) == 1 else {"|": found} if found else "nothing"


def whole(path: Path) -> Schema:
    """The form of a JSON file."""
    return form([json.loads(path.read_text())])


def lines(path: Path) -> Schema:
    """The form of each kind of line of a JSONL file."""
    found: dict[str, list[Any]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["kind"], []).append(entry)
    return {kind: form(entries) for kind, entries in sorted(found.items())}


def bench(out: Path, patch: Patch) -> Schema:
    patch.setattr(runner, "measure_memory", lambda names, options, advance: [Memory(names[0], 1.0, 2.0)])
    options = BenchOptions(
        pair=make_pair(out / "pair"), num_prompts=1, prompt_tokens=12, new_tokens=8, threads=1, rounds=1,
        peers=("hf-assisted-k2", "specdec-model-k3", "specdec-planned-model"), out=out, dtype="float64",
    )  # fmt: skip
    assert runner.run(options) == 0
    runner.run(replace(options, out=out / "batch", batch=2, num_prompts=2, peers=("hf-assisted-k2",)))
    (path,), (skipped,) = out.glob("bench-*.jsonl"), (out / "batch").glob("bench-*.jsonl")
    return {"run": lines(path), "with a peer that cannot run": lines(skipped)["summary"]}


def llamacpp(out: Path, patch: Patch) -> Schema:
    programs = out / "bin"
    programs.mkdir()
    patch.setenv("PATH", str(programs))
    tools.install(programs, tools.BENCH, f"print({json.dumps([tools.TEST])!r})")
    tools.install(programs, tools.SPECULATIVE, f"print({tools.SAID!r})")
    for role in ("target", "draft"):
        tools.tiny_llama().save_pretrained(out / role)
        tools.merging_tokenizer().save_pretrained(out / role)
    done = CliRunner().invoke(tools.main.app, ["--pair", str(out), "--out", str(out), *tools.COMMAND])
    assert done.exit_code == 0, done.output
    return lines(next(out.glob("llamacpp-*.jsonl")))


def served(out: Path, patch: Patch) -> Schema:
    asked = ["--pair", str(make_pair(out / "pair")), "--concurrency", "2", "--requests", "2", "--prompt-tokens", "8"]
    asked += ["--new-tokens", "6", "--rounds", "1", "--peers", "engine-plain,engine-k2,hf-generate", "--k", "2"]
    done = CliRunner().invoke(serving.app, [*asked, "--threads", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    return whole(next(out.glob("serving-*.json")))


def timed_passes(out: Path, patch: Patch) -> Schema:
    few = ["--widths", "1", "3", "--repeats", "2", "--slots", "9", "--rows", "2", "--threads", "1"]
    passes.main(["--pair", str(make_pair(out / "pair")), *few, "--out", str(out)])
    return whole(next(out.glob("passes-*.json")))


def strict_mode(out: Path, patch: Patch) -> Schema:
    strict.main(["--prompts", "1", "--tokens", "2", "--pair-prompts", "0", "--rules", "greedy", "--out", str(out)])
    return {
        "file": whole(next(out.glob("strict-*.json"))),
        "cost": form([strict.cost("float32", batch=1, num_prompts=1, tokens=2)]),
    }


def planned(what: str) -> Callable[[Path, Patch], Schema]:
    """With calls that were never made: real ones take minutes."""
    plan = {"steps": 3, "predicted_tokens_per_second": 1.0, "realised_tokens_per_second": 2.0}
    ways = {"sweep": ("none", "model k=2", "planned model"),
            "never-slower": ("hf plain", "none", "none again", "planned")}[what]  # fmt: skip
    part = {"sweep": "sweep", "never-slower": "long outputs, both"}[what]

    def write(out: Path, patch: Patch) -> Schema:
        def measured(options: Any) -> Iterator[Batch]:
            for prompt in (1, 2):
                steps = ((1.0, False), (2.0, True))
                calls = [Call(way, prompt, 1.0, 2.0, 1.5, plan if "planned" in way else None, steps) for way in ways]
                yield Batch("T=0.0 batch 1", part, calls)

        patch.setattr("specdec.experiments.planner.processes.measured", measured)
        planner([what, "--prompts", "2", "--out", str(out)])
        return whole(next(out.glob(f"planner-{what}-*.json")))

    return write


def gpu(out: Path, patch: Patch) -> Schema:
    assert run_gpu(GpuOptions.dry_run(out), [name for name in SECTIONS if name != "tests"]) == 0
    return whole(out / "gpu.json")


def which_rule(out: Path, patch: Patch) -> Schema:
    few = [("model:k=2", "rejection"), ("model:tree=2,1:children=mixed", "budget_flow")]
    patch.setattr(rules_pair, "rivals", lambda: [(Setting.parse(setting), rule) for setting, rule in few])
    models = Models.load(make_pair(out / "pair"), "float64")
    size = rules_pair.Size(prompts=2, prompt_tokens=8, tokens=6, timed=1)
    assert rules(["--overhead", "--vocab", "100", "--repeats", "3", "--out", str(out)]) == 0
    assert rules(["--only", "instances", "--num-instances", "1", "--out", str(out)]) == 0
    return {
        "overhead": whole(next(out.glob("rules-overhead-*.json"))),
        "instances": whole(next(out.glob("rules-table-*.json"))),
        "pair": form(rules_pair.table(models, 1.0, size)),
    }


def sampling_laws(out: Path, patch: Patch) -> Schema:
    asked = ["--samples", "400", "--chunk", "200", "--small-samples", "17", "--small-seconds", "0", "--rules", "block"]
    patch.setattr("specdec.experiments.laws.run.controls", _one_control)
    laws([*asked, "coupled", "--drafters", "chain", "--control-samples", "2000", "--out", str(out)])
    return whole(next(out.glob("laws-*.json")))


def _one_control() -> Iterator[Any]:
    from specdec.experiments.laws.controls import controls

    yield next(controls())


def acceptance(out: Path, patch: Patch) -> Schema:
    prompts = out / "prompts.jsonl"
    prompts.write_text(json.dumps({"question_id": 1, "category": "a", "turns": ["abc abc", "go on"]}))
    options = AcceptOptions(
        pair=make_pair(out / "pair"), settings=("model:k=2", "model:tree=2,1:children=sampled"), max_rules=1,
        temperatures=(0.0, 1.0), prompts=(f"jsonl:{prompts}",), new_tokens=8, threads=1, device="cpu", report=False,
        out=out / "run",
    )  # fmt: skip
    assert run_accept(options) == 0
    done = CliRunner().invoke(
        accept.app, ["score", str(out / "run"), "-s", "model:k=2", "--json", str(out / "scores.json")]
    )
    assert done.exit_code == 0, done.output
    found = lines(out / "run" / "runs-0.jsonl")
    del found["forms"]  # by the sizes of what this process has not yet measured
    asked = form([json.loads((out / "run" / "run.json").read_text())])
    return {"run.json": asked, "runs": found, "scores": whole(out / "scores.json")}


def trained(out: Path, patch: Patch) -> Schema:
    patch.setattr(evaluate, "held_out_loss", lambda model, tokenizer: 1.0)
    report = evaluate.evaluate_pair(pair_folder(), num_prompts=1, prompt_tokens=8, new_tokens=4, rows=1)
    return form([json.loads(json.dumps(asdict(report)))])


WRITERS: dict[str, Callable[[Path, Patch], Schema]] = {
    "bench": bench, "llamacpp": llamacpp, "serving": served, "passes": timed_passes, "strict": strict_mode,
    "planner sweep": planned("sweep"), "planner never-slower": planned("never-slower"), "gpu command": gpu,
    "rules": which_rule, "laws": sampling_laws, "accept": acceptance, "train_pair evaluate": trained,
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_result_files_keep_their_form(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    assert WRITERS[name](tmp_path, monkeypatch) == json.loads(PINNED.read_text())[name]


def test_a_changed_form_is_seen() -> None:
    assert form([{"a": 1, "b": None}, {"a": 2.0}]) == {"a": "number", "b?": "none"}
    assert form([{"a": [1, None]}]) == {"a": ["none|number"]}
    assert form([{"a": None}, {"a": {"x": "y"}}]) == {"a": {"|": ["none", {"x": "text"}]}}
    assert form([[]]) != form([[1]])


def test_model_cards_are_what_they_were(tmp_path: Path) -> None:
    """The cards of the shipped pair, written again from the numbers beside them."""
    shipped = pair_folder()
    names = ["training.json", "evaluation.json"]
    for name in names:
        (tmp_path / name).write_text((shipped / name).read_text())
    for role in ("target", "draft"):
        (tmp_path / role).mkdir()
    card.write_cards(tmp_path)
    for name in ("README.md", "target/README.md", "draft/README.md"):
        assert (tmp_path / name).read_text() == (shipped / name).read_text(), name


if __name__ == "__main__":
    import tempfile

    found = {}
    for name in sys.argv[1:] or WRITERS:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as context:
            print(name, file=sys.stderr)
            found[name] = WRITERS[name](Path(folder), context)
    known = json.loads(PINNED.read_text()) if PINNED.exists() else {}
    PINNED.write_text(json.dumps({**known, **found}, indent=1, sort_keys=True) + os.linesep)
