"""TRL's GRPO with rollouts inside `specdec.patch`: the same completions, rewards and losses with a draft as without.

pip install trl && python examples/train_grpo.py [FOLDER_OR_ID]    # your model is drafted for by n-grams
"""

import sys
import tempfile

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import specdec

STARTS = ["def read(path):\n", "class Node:\n", "import os\n", "def parse_args(argv=None):\n"]


def reward(completions: list[str], **_) -> list[float]:
    return [text.count("return") - 0.01 * len(text) for text in completions]


def train(drafted: bool) -> tuple[list, float]:
    target, draft, tokenizer = specdec.load_pair("stdlib-python", device="cpu")
    if len(sys.argv) == 2:
        own = specdec.Speculator(sys.argv[1])
        target, draft, tokenizer = own.target, "ngram", own.tokenizer
    config = GRPOConfig(
        tempfile.mkdtemp(), max_steps=3, num_generations=4, per_device_train_batch_size=4, max_completion_length=48,
        learning_rate=1e-4, seed=0, bf16=False, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": STARTS})
    trainer = GRPOTrainer(target, reward, args=config, train_dataset=data, processing_class=tokenizer)
    # With rule "coupled" a text is a function of weights and seed alone: drafts change nothing but the time.
    with specdec.patch(trainer.model, draft if drafted else None, rule="coupled"):
        seconds = trainer.train().metrics["train_runtime"]
    return [(step["reward"], step["loss"]) for step in trainer.state.log_history if "reward" in step], seconds


def main() -> None:
    (plain, slow), (drafted, fast) = train(False), train(True)
    print(*(f"reward {reward:.3f} loss {loss:.6f}" for reward, loss in drafted), sep="\n")
    print(f"same rewards and losses: {drafted == plain}; {slow:.1f} s without drafts, {fast:.1f} s with")


if __name__ == "__main__":
    main()
