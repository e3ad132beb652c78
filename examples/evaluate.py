"""EleutherAI's lm-evaluation-harness inside `specdec.patch`: the same answers and scores, in less time.

pip install lm-eval && python examples/evaluate.py [FOLDER_OR_ID]    # your model is drafted for by n-grams
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import specdec

STARTS = ["def read(path):\n", "class Stack:\n", "import os\n\ndef size(path):\n", "def main(argv=None):\n"]
TASK = {
    "task": "code", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
    "doc_to_text": "{{start}}", "doc_to_target": "return",
    "generation_kwargs": {"until": ["\nclass "], "max_gen_toks": 96, "do_sample": False},
    "process_results": lambda doc, answers: {"returns": float("return" in answers[0])},
    "metric_list": [{"metric": "returns", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


def main() -> None:
    target, draft, tokenizer = specdec.load_pair("stdlib-python")
    if len(sys.argv) == 2:
        own = specdec.Speculator(sys.argv[1])
        target, draft, tokenizer = own.target, "ngram", own.tokenizer
    data = Path(tempfile.mkdtemp()) / "starts.json"
    data.write_text(json.dumps([{"start": start} for start in STARTS]))
    tasks = [{**TASK, "dataset_kwargs": {"data_files": {"test": str(data)}}}]
    model, manager = HFLM(pretrained=target, tokenizer=tokenizer, batch_size=1), TaskManager(include_defaults=False)

    def evaluate() -> tuple[float, list, float]:
        start = time.perf_counter()
        found = lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0)
        answers = [sample["resps"] for sample in found["samples"]["code"]]
        return float(found["results"]["code"]["returns,none"]), answers, time.perf_counter() - start

    *plain, slow = evaluate()
    with specdec.patch(target, draft):
        evaluate()  # the first call measures what steps cost on this machine
        *ours, fast = evaluate()
    print(f"same answers and score: {ours == plain} ({plain[0]:.2f}); {slow:.1f} s before, {fast:.1f} s inside patch")


if __name__ == "__main__":
    main()
