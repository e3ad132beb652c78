"""Many requests at once: each with its own arguments, tokens as they come, and the engine's metrics.

python examples/serving.py
"""

import asyncio

import specdec

PROMPTS = ["def read(path):", "class Node:", "import os\n", "for line in"]


async def main() -> None:
    target, draft, tokenizer = specdec.load_pair("stdlib-python")

    with specdec.Engine(target, draft, k=4) as engine:

        async def ask(number: int, prompt: str) -> str:
            handle = engine.submit(tokenizer(prompt).input_ids, max_new_tokens=32, do_sample=True, seed=number)
            return tokenizer.decode([token async for token in handle])

        texts = await asyncio.gather(*(ask(number, prompt) for number, prompt in enumerate(PROMPTS)))
        for prompt, text in zip(PROMPTS, texts, strict=True):
            print(f"--- {prompt}{text}")
        metrics = engine.metrics()
    print(f"{metrics.num_accepted_tokens} of {metrics.num_draft_tokens} drafted tokens were accepted")


if __name__ == "__main__":
    asyncio.run(main())
