"""Code that you do not own: inside `specdec.patch` a transformers pipeline speculates, and writes the same text.

python examples/pipeline.py
"""

import time

from transformers import pipeline

import specdec

PROMPTS = ["def read(path):", "class Node:", "import os\n"]


def main() -> None:
    target, draft, tokenizer = specdec.load_pair("stdlib-python")
    write = pipeline("text-generation", model=target, tokenizer=tokenizer)

    def texts() -> tuple[list[str], float]:
        start = time.perf_counter()
        found = [write(prompt, max_new_tokens=48, do_sample=False)[0]["generated_text"] for prompt in PROMPTS]
        return found, time.perf_counter() - start

    plain, seconds = texts()
    with specdec.patch(target, draft):
        texts()  # the first call measures what steps cost on this machine
        ours, faster = texts()
    print(ours[0])
    print(f"same texts: {ours == plain}; {seconds:.2f} s before, {faster:.2f} s inside patch")


if __name__ == "__main__":
    main()
