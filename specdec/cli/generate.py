"""`specdec generate`: one prompt, streamed, with a report."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from specdec.cli import options as cli
from specdec.cli.text import Screen, Writer
from specdec.cli.values import file_text
from specdec.detokenizer import Detokenizer
from specdec.prompt_files import has_template, how_asked


def generate(
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to continue (default: standard input, unchanged).")
    ] = None,
    prompt_file: cli.PromptFile = None,
    chat: cli.Chat = False,
    target: cli.Target = None,
    draft: cli.Draft = None,
    pair: cli.PairName = None,
    gguf_file: cli.GgufFile = None,
    k: cli.ChainLength = None,
    tree: cli.TreeWidths = None,
    rule: cli.Rule = "auto",
    lossy: cli.Lossy = False,
    max_new_tokens: cli.MaxNewTokens = 128,
    temperature: cli.Temperature = 0.0,
    top_k: cli.TopK = None,
    top_p: cli.TopP = None,
    min_p: cli.MinP = None,
    seed: cli.Seed = None,
    stop: cli.Stop = None,
    dtype: cli.Dtype = "auto",
    device: cli.Device = "auto",
    threads: cli.Threads = None,
    show_draft: Annotated[
        bool, typer.Option("--show-draft", help="Mark accepted, recovered and bonus tokens; in JSON: add every step.")
    ] = False,
    echo: Annotated[bool, typer.Option("--echo/--no-echo", help="Print the prompt before its continuation.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text and report.")] = False,
) -> None:
    """Continue a text speculatively, or answer it (--chat); the text goes to stdout, the report to stderr."""
    choice = cli.ModelChoice.of(target, draft, pair, gguf_file, k, tree, rule, dtype, device, threads, lossy)
    decoding = cli.Decoding(max_new_tokens, temperature, top_k, top_p, min_p, seed, tuple(stop or ()))
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("expected --prompt or --prompt-file, got both")
    if prompt is None:
        prompt = _read_stdin() if prompt_file is None else file_text(prompt_file)

    from specdec.cli.loading import load
    from specdec.cli.waiting import spinner

    loaded = load(choice)
    inputs = loaded.encode(prompt, chat)
    if as_json:
        result = _collect(loaded, inputs, decoding, keep_steps=show_draft)
        typer.echo(json.dumps({"prompt": prompt, **result}, indent=2))
        return
    screen = Screen(sys.stdout, kinds=show_draft)
    if show_draft:
        typer.echo(f"{Screen(sys.stderr, kinds=True).legend()}\n", err=True)
    writer = Writer(loaded.tokenizer, screen)
    ahead = [f"{prompt}\n\n" if chat else prompt] if echo else []

    def show(trace: Any) -> None:
        while ahead:  # with the first step: what a first call says of itself must not stand in the middle of the text
            screen.write(ahead.pop())
        writer(trace)

    try:
        with spinner():
            loaded.speculator.generate(**inputs, **decoding.arguments(), on_step=show)
    finally:
        writer.finish()
    assert loaded.speculator.report is not None
    typer.echo(f"\n{loaded.speculator.report.summary()}", err=True)
    if has_template(loaded.tokenizer) and not chat:
        typer.echo(how_asked(loaded.tokenizer, chat), err=True)
    if temperature > 0:
        typer.echo(f"sampled with --seed {decoding.seed}", err=True)


def _read_stdin() -> str:
    if sys.stdin.isatty():
        raise typer.BadParameter("no prompt: pass --prompt TEXT or --prompt-file FILE, or pipe a text in")
    return sys.stdin.read()


def _collect(loaded: Any, inputs: dict[str, Any], decoding: cli.Decoding, keep_steps: bool) -> dict[str, Any]:
    """Generate without showing anything; what happened, ready for JSON."""
    steps: list[Any] = []
    sequences = loaded.speculator.generate(**inputs, **decoding.arguments(), on_step=steps.append)
    ids = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    ends = loaded.speculator.target.generation_config.eos_token_id
    ended = len(ids) < decoding.max_new_tokens or (ids and ids[-1] in (ends if isinstance(ends, list) else [ends]))
    result: dict[str, Any] = {
        "text": loaded.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        "token_ids": ids,
        "finish_reason": "stop" if ended else "length",
        "seed": decoding.seed,
        "report": loaded.speculator.report.to_dict(),
    }
    if keep_steps:
        detokenizer = Detokenizer(loaded.tokenizer)
        result["steps"] = [
            {
                "step": trace.step,
                "num_draft_tokens": trace.drafted[0],
                "num_accepted_tokens": trace.accepted[0],
                "tokens": [
                    {"id": token, "text": detokenizer.push(token), "kind": kind}
                    for token, kind in zip(trace.emitted[0], trace.kinds[0], strict=True)
                ],
                "ms": {"draft": trace.ms_draft, "verify": trace.ms_verify, "rest": trace.ms_rest},
            }
            for trace in steps
        ]
    return result
