"""Smoke: what pip installed is whole, its command works, and README's first example runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import specdec

CHECKOUT = Path(__file__).parents[2]
PROMPT = "def main(argv):"


def command(*arguments: object) -> str:
    """What `specdec ...` prints: the installed command in the smoke environment, else the checkout's."""
    if os.environ.get("SPECDEC_SMOKE_WHEEL"):
        start, home = [str(Path(sys.executable).with_name("specdec"))], None
    else:
        start, home = [sys.executable, "-m", "specdec"], CHECKOUT
    done = subprocess.run([*start, *map(str, arguments)], cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_help_names_the_commands() -> None:
    shown = command("--help")
    assert all(name in shown for name in ("generate", "doctor", "chat", "bench", "pairs"))


def test_the_doctor_finds_everything_in_order() -> None:
    shown = command("doctor")
    assert "everything works" in shown
    assert f"installed is {tf.__version__}" in shown


def test_the_command_writes_plains_text(saved_pair: Path) -> None:
    shown = command(
        "generate", "--target", saved_pair / "target", "--draft", saved_pair / "draft", "--prompt", PROMPT,
        "--max-new-tokens", 12, "--dtype", "float32",
    )  # fmt: skip
    model: Any = tf.AutoModelForCausalLM.from_pretrained(saved_pair / "target", dtype=torch.float32)
    tokenizer: Any = tf.AutoTokenizer.from_pretrained(saved_pair / "target")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
    assert text.encode("utf-8", "replace").decode() in shown


def test_readmes_first_example() -> None:
    code = re.search(r"^```python\n(.*?)^```$", (CHECKOUT / "README.md").read_text(), re.M | re.S)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code.group(1), names)
    assert names["out"].shape[1] > names["inputs"]["input_ids"].shape[1]


@pytest.mark.skipif(not os.environ.get("SPECDEC_SMOKE_WHEEL"), reason="about the installed wheel; see `make smoke`")
def test_the_wheel_says_what_it_needs_and_carries_its_files() -> None:
    required = {re.sub(r"\s", "", line) for line in metadata.requires("specdec-lm") or [] if "extra" not in line}
    assert {"torch>=2.11", "transformers<6,>=5.17"} <= required
    home = Path(specdec.__file__).parent
    carried = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    assert {"py.typed", "kv/versions.py", "verify/native/llama.c", "verify/native/model.h"} <= carried
    assert {"experiments/accept/report/report.html", "experiments/train_pair/pair_card.md"} <= carried
    assert {"experiments/workloads/prompts.jsonl", "pairs/stdlib-python/target/config.json"} <= carried
