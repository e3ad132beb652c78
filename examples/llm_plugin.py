"""A plugin of Simon Willison's `llm`: a speculating model that streams and remembers its conversation.

pip install llm && python examples/llm_plugin.py -m specdec "def read(path):"
python examples/llm_plugin.py -m specdec -o target FOLDER_OR_ID "Why is the sky blue?"    # n-gram drafts
"""

import functools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import llm
from transformers import TextIteratorStreamer

import specdec


@functools.cache
def load(target: str | None) -> specdec.Speculator:
    return specdec.Speculator(target, "ngram") if target else specdec.Speculator.from_pair("stdlib-python")


class Speculating(llm.Model):
    model_id, can_stream = "specdec", True

    class Options(llm.Options):
        target: str | None = None
        max_new_tokens: int = 200

    def execute(self, prompt, stream, response, conversation) -> Iterator[str]:
        spec = load(prompt.options.target)
        turns = [{"role": one.role, "content": "".join(p.text for p in one.parts)} for one in prompt.messages]
        chat = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        if spec.tokenizer.chat_template:
            inputs = spec.tokenizer.apply_chat_template(turns, **chat)
        else:
            inputs = spec.tokenizer("\n".join(turn["content"] for turn in turns), return_tensors="pt")
        text = TextIteratorStreamer(spec.tokenizer, skip_prompt=True, skip_special_tokens=True)
        call = {**inputs.to(spec.target.device), "max_new_tokens": prompt.options.max_new_tokens, "streamer": text}
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(spec.generate, **call)
            done.add_done_callback(lambda _: text.text_queue.put(text.stop_signal))  # after a fault, too
            yield from text
            done.result()


@llm.hookimpl
def register_models(register) -> None:
    register(Speculating())


if __name__ == "__main__":
    from llm.cli import cli
    from llm.plugins import pm

    pm.register(sys.modules[__name__])
    cli()
