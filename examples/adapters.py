"""A PEFT adapter on the target: speculated with the adapter on, and switched off, always the text of that model.

pip install peft && python examples/adapters.py
"""

import torch
from peft import LoraConfig, get_peft_model

import specdec


def main() -> None:
    target, draft, tokenizer = specdec.load_pair("stdlib-python")
    torch.manual_seed(0)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)  # stands for a trained one
    model = get_peft_model(target, lora).eval()
    inputs = tokenizer("def parse_args(argv=None):", return_tensors="pt").to(target.device)
    spec = specdec.Speculator(model, draft)

    def compare(name: str) -> None:
        out = spec.generate(**inputs, max_new_tokens=48, do_sample=False)
        plain = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        kept = spec.report.tokens_per_step
        print(f"adapter {name}: equal to plain generate: {torch.equal(out, plain)}; {kept:.1f} tokens per pass")

    compare("on")
    with model.disable_adapter():
        compare("off")


if __name__ == "__main__":
    main()
