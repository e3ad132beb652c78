"""`specdec chat`: talk to a model in the terminal."""

from __future__ import annotations

import sys
from typing import Any

import typer

from specdec.cli import options as cli
from specdec.cli.text import Screen, Writer
from specdec.cli.values import file_text

HELP = """\
/help    this list
/reset   forget the conversation
/report  how the last answer was generated
/quit    leave (so does Ctrl-D); Ctrl-C stops an answer"""


def chat(
    target: cli.Target = None,
    draft: cli.Draft = None,
    pair: cli.PairName = None,
    gguf_file: cli.GgufFile = None,
    k: cli.ChainLength = None,
    tree: cli.TreeWidths = None,
    rule: cli.Rule = "auto",
    lossy: cli.Lossy = False,
    max_new_tokens: cli.MaxNewTokens = 256,
    temperature: cli.Temperature = 0.0,
    top_k: cli.TopK = None,
    top_p: cli.TopP = None,
    min_p: cli.MinP = None,
    seed: cli.Seed = None,
    stop: cli.Stop = None,
    dtype: cli.Dtype = "auto",
    device: cli.Device = "auto",
    threads: cli.Threads = None,
    prompt_file: cli.PromptFile = None,
    show_draft: bool = typer.Option(False, "--show-draft", help="Mark accepted, recovered and bonus tokens."),
) -> None:
    """Converse with a model; without a chat template the conversation is one growing text."""
    choice = cli.ModelChoice.of(target, draft, pair, gguf_file, k, tree, rule, dtype, device, threads, lossy)
    decoding = cli.Decoding(max_new_tokens, temperature, top_k, top_p, min_p, seed, tuple(stop or ()))

    first = None if prompt_file is None else file_text(prompt_file)

    from specdec.cli.loading import load

    loaded = load(choice)
    conversation = Conversation(loaded.tokenizer)
    if sys.stdin.isatty():
        _enable_line_editing()
        typer.echo(f"{'chat' if conversation.has_template else 'text'} mode; /help for commands", err=True)
    if show_draft:
        typer.echo(Screen(sys.stderr, kinds=True).legend(), err=True)
    if first is not None:
        _answer(first, conversation, loaded, decoding, show_draft)
    while (line := _read_line()) is not None:
        if not line.strip():
            continue
        if line.startswith("/"):
            if line.strip() == "/quit":
                return
            _command(line.strip(), conversation, loaded)
            continue
        _answer(line, conversation, loaded, decoding, show_draft)


class Conversation:
    """What was said, as token ids, so that the K/V of earlier turns can be used again."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.reset()

    def reset(self) -> None:
        self.num_turns = 0
        self._messages: list[dict[str, str]] = []
        self._ids: list[int] = []
        self._cache: Any = None

    def ask(self, text: str) -> tuple[list[int], Any]:
        """The whole prompt of the next turn, and a cache of its beginning (None: compute everything)."""
        if self.has_template:
            self._messages.append({"role": "user", "content": text})
            encoded = self._tokenizer.apply_chat_template(self._messages, add_generation_prompt=True, return_dict=True)
            ids = list(encoded["input_ids"])
        else:
            ids = [*self._ids, *self._tokenizer(text + "\n", add_special_tokens=not self._ids).input_ids]
        # A template may write an old answer differently from how it was generated; then its K/V is not this text's.
        held = 0 if self._cache is None else self._cache.get_seq_length()
        usable = 0 < held < len(ids) and ids[:held] == self._ids[:held]
        return ids, self._cache if usable else None

    def answered(self, text: str, ids: list[int], cache: Any) -> None:
        """Note the model's answer: its text, and all ids of the conversation so far with their K/V."""
        if self.has_template:
            self._messages.append({"role": "assistant", "content": text})
        self._ids, self._cache = ids, cache
        self.num_turns += 1


def _answer(line: str, conversation: Conversation, loaded: Any, decoding: cli.Decoding, show_draft: bool) -> None:
    from specdec.cli.waiting import spinner
    from specdec.kv.versions import CACHE_KEYWORD, cache_of

    ids, cache = conversation.ask(line)
    writer = Writer(loaded.tokenizer, Screen(sys.stdout, kinds=show_draft))
    held: Any = None
    try:
        reused = {} if cache is None else {CACHE_KEYWORD: cache}
        with spinner():
            out = loaded.speculator.generate(
                **loaded.batch(ids),
                **decoding.arguments(conversation.num_turns),
                **reused,
                return_dict_in_generate=True,
                on_step=writer,
            )
        held = cache_of(out)
    except KeyboardInterrupt:
        typer.echo("", err=True)  # what was said so far stays in the conversation
    writer.finish()
    conversation.answered(writer.text, ids + writer.token_ids, held)


def _command(line: str, conversation: Conversation, loaded: Any) -> None:
    if line == "/help":
        typer.echo(HELP)
    elif line == "/reset":
        conversation.reset()
        typer.echo("forgotten", err=True)
    elif line == "/report":
        report = loaded.speculator.report
        typer.echo("nothing was generated yet" if report is None else report.summary())
    else:
        typer.echo(f"unknown command {line}; /help lists them", err=True)


def _read_line() -> str | None:
    """The next line, None at the end. Without a terminal nothing is prompted, so that scripts see answers only."""
    try:
        return input("> ") if sys.stdin.isatty() else input()
    except (EOFError, KeyboardInterrupt):
        return None


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401  (importing it is what gives input() history and editing)
    except ImportError:
        return
