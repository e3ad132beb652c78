"""Exports say what engines themselves understand: names from their sources, whole commands, and what is left out."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from specdec.pairing import Drafting, Pair, PairError, find_pair, pair_names
from specdec.pairing.export import ENGINES, OWN, Export, export_pair
from specdec.pairing.registry import pair_of, pair_table

# Every name below was read in the file that is named with it.
VLLM = {
    # vllm-project/vllm, vllm/config/speculative.py, class SpeculativeConfig: fields, and Literal SpeculativeMethod
    "method", "model", "num_speculative_tokens", "revision", "prompt_lookup_max", "prompt_lookup_min",
    "use_heterogeneous_vocab", "rejection_sample_method", "draft_sample_method",
}  # fmt: skip
VLLM_METHODS = {"ngram", "draft_model", "eagle", "eagle3"}
# vllm-project/vllm, docs/features/speculative_decoding/draft_model.md: `vllm serve MODEL --speculative-config '{...}'`
VLLM_OPTIONS = {"--speculative-config", "--dtype", "--revision"}
SGLANG = {
    # sgl-project/sglang, python/sglang/srt/arg_groups/fields/spec.py, class Spec (options are its fields with dashes)
    "--speculative-algorithm", "--speculative-draft-model-path", "--speculative-draft-model-revision",
    "--speculative-num-steps", "--speculative-eagle-topk", "--speculative-num-draft-tokens",
    "--speculative-use-rejection-sampling", "--speculative-use-block-verification",
}  # fmt: skip
SGLANG_ALGORITHMS = {"EAGLE", "EAGLE3", "NEXTN", "STANDALONE", "NGRAM", "DFLASH", "DSPARK", "UNO"}  # the same field
# NVIDIA/TensorRT-LLM, tensorrt_llm/llmapi/llm_args.py: decoding_type literals and fields of DraftTargetDecodingConfig,
# NGramDecodingConfig, Eagle3DecodingConfig and their base; `--config` in docs/source/features/speculative-decoding.md
TENSORRT = {
    "Draft_Target": {"max_draft_len", "speculative_model", "use_rejection_sampling"},
    "NGram": {"max_draft_len", "max_matching_ngram_size"},
    "Eagle3": {
        "max_draft_len", "speculative_model", "use_rejection_sampling", "use_dynamic_tree", "dynamic_tree_max_topK",
        "max_total_draft_tokens",
    },
}  # fmt: skip
LLAMA_CPP = {
    # ggml-org/llama.cpp, tools/server/README.md, the generated table of arguments
    "--model", "--spec-draft-model", "--spec-type", "--spec-draft-n-max", "--spec-draft-sampling",
    "--spec-ngram-simple-size-n", "--spec-ngram-simple-size-m",
}  # fmt: skip
LLAMA_CPP_TYPES = {"none", "draft-simple", "draft-eagle3", "draft-mtp", "draft-dflash", "draft-dspark", "ngram-simple"}
# huggingface/text-generation-inference, docs/source/reference/launcher.md
TGI = {"--model-id", "--revision", "--dtype", "--speculate"}

CANNOT = {"eagle3": {"transformers", "ray"}, "eagle": {"transformers", "tensorrt-llm", "llama.cpp", "ray"}}
ONE_VOCABULARY = {"sglang", "tensorrt-llm", "llama.cpp", "ray"}


def options(export: Export, program: str) -> dict[str, str]:
    """Long options of the command that starts with `program`, with their values."""
    (command,) = (command for command in export.commands if command[: len(program.split())] == tuple(program.split()))
    pairs = zip(command, [*command[1:], ""], strict=True)
    return {name: value for name, value in pairs if name.startswith("--")}


def check_names(export: Export) -> None:
    """Only names that the engine has."""
    arguments = export.arguments
    if export.engine == "vllm":
        assert set(arguments) <= VLLM
        assert arguments["method"] in VLLM_METHODS
        assert set(options(export, "vllm serve")) <= VLLM_OPTIONS
        assert json.loads(options(export, "vllm serve")["--speculative-config"]) == arguments
    elif export.engine == "sglang":
        assert set(arguments) <= SGLANG
        assert arguments["--speculative-algorithm"] in SGLANG_ALGORITHMS
        given = set(options(export, "python -m sglang.launch_server"))
        assert given == set(arguments) | {"--model-path", "--dtype"} | (given & {"--revision"})
    elif export.engine == "tensorrt-llm":
        assert set(arguments) - {"decoding_type"} <= TENSORRT[arguments["decoding_type"]]
        assert options(export, "trtllm-serve") == {"--config": "speculative.yaml"}
    elif export.engine == "llama.cpp":
        assert set(options(export, "llama-server")) <= LLAMA_CPP
        assert arguments["--spec-type"] in LLAMA_CPP_TYPES
    elif export.engine == "tgi":
        assert set(options(export, "text-generation-launcher")) <= TGI
    elif export.engine == "ray":
        assert export.commands == (("serve", "run", "ray.yaml"),)
    else:
        config = tf.GenerationConfig()
        assert all(hasattr(config, name) for name in arguments)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_pair_is_exported_in_the_engines_own_names_or_refused(engine: str) -> None:
    refused = 0
    for name in pair_names():
        pair = find_pair(name)
        if pair.target.gguf_file is not None and engine not in OWN:
            with pytest.raises(PairError, match="GGUF files are not exported"):
                export_pair(pair, engine)
            refused += 1
            continue
        if engine in CANNOT.get(pair.draft.kind, ()) or (pair.vocabulary == "different" and engine in ONE_VOCABULARY):
            with pytest.raises(PairError, match=rf"cannot be exported to {engine}: .*; (use|export to) "):
                export_pair(pair, engine)
            refused += 1
            continue
        export = export_pair(pair, engine)
        check_names(export)
        assert json.loads(json.dumps(export.to_dict())) == export.to_dict()
    assert refused < len(pair_names()) / 4


def test_the_check_of_names_sees_a_wrong_one() -> None:
    export = export_pair(find_pair("qwen3-8b-0.6b"), "vllm")
    wrong = {**export.arguments, "speculative_model": "x"}  # what old versions of vLLM called it
    with pytest.raises(AssertionError):
        check_names(replace(export, arguments=wrong))


def exported(name: str, engine: str, **drafting: Any) -> Export:
    return export_pair(replace(find_pair(name), drafting=Drafting(**drafting)), engine)


def test_vllm() -> None:
    model = exported("qwen3-8b-0.6b", "vllm", k=5)
    assert model.commands == (
        (
            "vllm", "serve", "Qwen/Qwen3-8B", "--dtype", "bfloat16", "--speculative-config",
            '{"method": "draft_model", "num_speculative_tokens": 5, "model": "Qwen/Qwen3-0.6B"}',
        ),
    )  # fmt: skip
    assert exported("llama-3.1-8b-ngram", "vllm", k=6).arguments == {
        "method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 3, "prompt_lookup_min": 1,
    }  # fmt: skip
    block = exported("qwen3-8b-0.6b", "vllm", k=2, rule="block").arguments
    assert (block["rejection_sample_method"], block["draft_sample_method"]) == ("block", "probabilistic")
    assert exported("gemma-2-9b-vicuna-68m", "vllm").arguments["use_heterogeneous_vocab"] is True


def test_sglang_counts_the_root_among_its_draft_tokens() -> None:
    chain = exported("qwen3-8b-0.6b", "sglang", k=5).arguments
    assert [chain[f"--speculative-{name}"] for name in ("num-steps", "eagle-topk", "num-draft-tokens")] == [5, 1, 6]
    tree = exported("llama-3.1-8b-eagle3", "sglang", tree=(4, 2, 1)).arguments
    assert [tree[f"--speculative-{name}"] for name in ("num-steps", "eagle-topk", "num-draft-tokens")] == [3, 4, 21]
    block = exported("llama-3.1-8b-eagle3", "sglang", k=3, rule="block")
    assert "--speculative-use-block-verification" in block.commands[0]
    assert exported("llama-3.1-8b-ngram", "sglang").arguments["--speculative-algorithm"] == "NGRAM"


def test_tensorrt_llm_reads_a_yaml_file() -> None:
    yaml = pytest.importorskip("yaml")
    export = exported("llama-3.1-8b-eagle3", "tensorrt-llm", tree=(10, 1, 1, 1, 1, 1))
    settings = yaml.safe_load(export.files["speculative.yaml"])
    # Fields of BaseLlmArgs in llm_args.py: dtype, revision (test_revisions_arrive), speculative_config.
    assert settings == {"dtype": "float16", "speculative_config": export.arguments}
    assert export.arguments["max_draft_len"] == 6
    # llm_args.py: max_draft_len <= max_total_draft_tokens <= dynamic_tree_max_topK * max_draft_len
    assert 6 <= export.arguments["max_total_draft_tokens"] <= 60


@pytest.mark.parametrize("name", ["qwen3-8b-0.6b", "llama-3.1-8b-ngram", "smollm2-135m", "stdlib-python"])
def test_ray_gets_the_whole_pair(name: str) -> None:
    """What the arguments hold is the pair again, folders with their whole path."""
    yaml = pytest.importorskip("yaml")
    pair = replace(find_pair(name), drafting=Drafting(tree=(2, 1), rule="traversal"))
    export = export_pair(pair, "ray")
    (application,) = yaml.safe_load(export.files["ray.yaml"])["applications"]
    assert application["args"] == export.arguments
    again = pair_of(application["args"]["pair"], "pair")
    assert (again.target.revision, again.drafting, again.dtype) == (pair.target.revision, pair.drafting, pair.dtype)
    assert [again.location(part) for part in (again.target, again.draft)] == [
        pair.location(part) for part in (pair.target, pair.draft)
    ]
    assert pair_of(pair_table(again), "pair") == again


@pytest.mark.filterwarnings("ignore")  # of ray: pydantic's old ways
def test_ray_takes_the_file() -> None:
    yaml, schema = pytest.importorskip("yaml"), pytest.importorskip("ray.serve.schema")
    export = export_pair(find_pair("qwen3-8b-0.6b"), "ray")
    read = schema.ServeDeploySchema(**yaml.safe_load(export.files["ray.yaml"]))
    assert read.applications[0].args == export.arguments


@pytest.mark.parametrize("engine", ENGINES)
def test_first_generation_eagle_heads(engine: str) -> None:
    pair = find_pair("llama-3.1-8b-eagle3")
    pair = replace(pair, draft=replace(pair.draft, kind="eagle"))
    if engine in CANNOT["eagle"]:
        with pytest.raises(PairError, match="EAGLE"):
            export_pair(pair, engine)
    else:
        check_names(export_pair(pair, engine))


def test_llama_cpp_converts_first() -> None:
    export = exported("llama-3.1-8b-eagle3", "llama.cpp", k=4)
    programs = [" ".join(command[:2]) for command in export.commands]
    assert programs == ["hf download"] * 2 + ["python convert_hf_to_gguf.py"] * 2 + ["llama-server --model"]
    assert ("--target-model-dir", "target") == export.commands[3][3:5]
    local = export_pair(find_pair("stdlib-python"), "llama.cpp")
    assert [command[0] for command in local.commands] == ["python", "python", "llama-server"]


def test_revisions_arrive() -> None:
    pair = find_pair("qwen3-8b-0.6b")
    pair = replace(
        pair, target=replace(pair.target, revision="abc"), draft=replace(pair.draft, revision="def")
    )  # fmt: skip
    for engine in ENGINES:
        text = export_pair(pair, engine).text()
        assert "abc" in text, engine
        assert "def" in text or engine == "tgi", engine


@pytest.mark.parametrize("engine", ENGINES)
def test_what_does_not_carry_over_is_said(engine: str) -> None:
    assert "gated" in " ".join(exported("llama-3.1-70b-8b", engine).notes)
    assert "141 GB" in " ".join(exported("llama-3.1-70b-8b", engine).notes)
    notes = " ".join(exported("qwen3-8b-0.6b", engine, tree=(3, 2), rule="typical").notes)
    if engine in OWN:
        assert notes.count("does not carry over") == notes.count("rule = typical (lossy) does not carry over") == 1
        return
    assert "tree = [3, 2]" in notes
    assert "rule = typical (lossy) does not carry over" in notes
    assert "rule = coupled does not carry over" in " ".join(exported("qwen3-8b-0.6b", engine, rule="coupled").notes)
    if engine == "tgi":
        assert "The draft Qwen/Qwen3-0.6B does not carry over" in notes


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(PairError, match=r"expected one of vllm, sglang, .* got 'gpt'"):
        export_pair(find_pair("stdlib-python"), "gpt")


@pytest.mark.parametrize("name", ["qwen3-8b-0.6b", "llama-3.1-8b-ngram", "llama-3.1-8b-eagle3"])
def test_the_text_is_a_shell_script(name: str) -> None:
    for engine in ENGINES:
        if engine in ("transformers", "ray") and "eagle" in name:
            continue
        export = export_pair(find_pair(name), engine)
        text = export.text()
        subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=60)
        tail = text[text.rindex("END\n") + 4 :] if "<<'END'" in text else text
        lines = "\n".join(line for line in tail.splitlines() if not line.startswith("#")).replace(" \\\n", " ")
        assert [tuple(shlex.split(line)) for line in lines.splitlines()] == list(export.commands)


@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_the_transformers_program_runs_and_writes_what_plain_generate_writes(
    kind: str, tiny_pair: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair: Pair = find_pair(tiny_pair)
    if kind == "ngram":
        pair = replace(pair, draft=type(pair.draft)("ngram"))
    (program,) = export_pair(pair, "transformers").files.values()
    exec(compile(program, "generate.py", "exec"), {})
    target: Any = tf.AutoModelForCausalLM.from_pretrained(tiny_pair / "target")
    tokenizer: Any = tf.AutoTokenizer.from_pretrained(tiny_pair / "target")
    ids = target.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=64)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) in capsys.readouterr().out
