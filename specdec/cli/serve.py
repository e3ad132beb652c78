"""`specdec serve`: OpenAI's API over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.cli import options as cli
from specdec.pairing import Pair
from specdec.serve.options import KV_MIB, MAX_ROWS, MAX_WAITING, ServeOptions, further_drafters

_SERVER, _LIMITS = "Server", "Limits"


def _server(help: str, *names: str, panel: str = _SERVER, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def serve(
    target: cli.Target = None,
    draft: cli.Draft = None,
    pair: cli.PairName = None,
    gguf_file: cli.GgufFile = None,
    k: cli.ChainLength = None,
    tree: cli.TreeWidths = None,
    rule: cli.Rule = "auto",
    drafters: Annotated[
        str, _server("Further drafters that a request may name, e.g. ngram,suffix,self:int8.", panel="Drafting")
    ] = "ngram",
    dtype: cli.Dtype = "auto",
    device: cli.Device = "auto",
    threads: cli.Threads = None,
    host: Annotated[str, _server("Address to listen at; 0.0.0.0 lets other machines in.")] = ServeOptions.host,
    port: Annotated[int, _server("Port; 0 takes a free one.", min=0, max=65535)] = ServeOptions.port,
    api_key_file: Annotated[
        Path | None, _server("A file of keys, one a line, of which clients must send one (default: no key).")
    ] = None,
    model_name: Annotated[
        str | None, _server("What clients call the model (default: the pair's or target's name).")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, _server("A web page's origin that browsers may let in; repeat for more.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        _server("A name in the header Host that is taken beside this machine's own, as a proxy's; repeat for more."),
    ] = None,
    max_rows: Annotated[int, _server("Requests that are decoded together.", panel=_LIMITS, min=1)] = MAX_ROWS,
    max_waiting: Annotated[int, _server("Texts that may wait for a place.", panel=_LIMITS, min=1)] = MAX_WAITING,
    kv_mib: Annotated[int, _server("MiB of K/V, target and drafters together.", panel=_LIMITS, min=1)] = KV_MIB,
    kv_dtype: Annotated[
        str | None, _server("Keep K/V in 8 bits: int8 or fp8. LOSSY: wants --lossy beside it.", panel=_LIMITS)
    ] = None,
    lossy: Annotated[
        bool, _server("Agree that --kv-dtype changes the law of the text.", "--lossy", panel=_LIMITS)
    ] = False,
    max_concurrent: Annotated[
        int, _server("Generations at once, waiting ones included.", panel=_LIMITS, min=1)
    ] = ServeOptions.max_concurrent,
    max_new_tokens: Annotated[
        int, _server("Tokens of one text at most.", "--max-new-tokens", "-n", panel=_LIMITS, min=1)
    ] = ServeOptions.max_new_tokens,
    max_prompt_tokens: Annotated[
        int | None, _server("Tokens of a prompt at most (default: what the model takes).", panel=_LIMITS, min=1)
    ] = None,
    max_choices: Annotated[
        int, _server("Texts of one request at most (prompts times n).", panel=_LIMITS, min=1)
    ] = ServeOptions.max_choices,
    max_body_bytes: Annotated[
        int, _server("Bytes of a request's body at most.", panel=_LIMITS, min=1)
    ] = ServeOptions.max_body_bytes,
    request_seconds: Annotated[
        float, _server("Seconds in which a text must be done, the queue included.", panel=_LIMITS, min=0.001)
    ] = ServeOptions.request_seconds,
    drain_seconds: Annotated[
        float, _server("Seconds that streams have left after SIGTERM or Ctrl-C.", panel=_LIMITS, min=0.0)
    ] = ServeOptions.drain_seconds,
) -> None:
    """Serve a model over HTTP, as OpenAI's API does: completions, chats, streams, metrics, and a page to look at.

    SIGTERM or Ctrl-C ends it when all streams are finished; a second one at once.
    """
    choice = cli.ModelChoice.of(target, draft, pair, gguf_file, k, tree, rule, dtype, device, threads)
    if api_key_file is not None and not api_key_file.is_file():
        raise typer.BadParameter(f"--api-key-file: expected a file, found none at {api_key_file.name!r}")
    options = ServeOptions(
        host=host,
        port=port,
        api_key_file=api_key_file,
        cors_origins=tuple(cors_origin or ()),
        allowed_hosts=tuple(allowed_host or ()),
        max_concurrent=max_concurrent,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        max_choices=max_choices,
        max_body_bytes=max_body_bytes,
        request_seconds=request_seconds,
        drain_seconds=drain_seconds,
    )
    try:
        from specdec.serve.server import run
    except ImportError as error:
        typer.echo(f"error: {error}: specdec serve needs more packages: pip install 'specdec-lm[serve]'", err=True)
        raise typer.Exit(1) from None

    from specdec.cli.loading import load_models
    from specdec.engine import Engine
    from specdec.prompt_files import has_template

    models = load_models(choice)
    engine = Engine(
        models.target, models.draft, k=choice.k, tree=choice.tree, drafters=further_drafters(drafters, choice.draft),
        tokenizer=models.tokenizer, num_bytes=kv_mib << 20, max_rows=max_rows, max_waiting=max_waiting,
        kv_dtype=kv_dtype, lossy=lossy,
    )  # fmt: skip
    name = model_name or _name(choice.pair, target is not None)

    def ready(address: str) -> None:
        typer.echo(f"{name} at {address}/v1 (a page to look at: {address}/)")
        typer.echo(f"drafted for by {engine.drafters[0]}; a request may name: {', '.join(engine.drafters[1:])}")
        if (what := engine.metrics().lossy) is not None:
            typer.echo(f"lossy: {what}; texts follow another law than the target's")
        key = "" if api_key_file is None else " -H 'Authorization: Bearer KEY'"
        way, asks = "completions", '"prompt": "def main("'
        if has_template(models.tokenizer):
            way, asks = "chat/completions", '"messages": [{"role": "user", "content": "Who are you?"}]'
        body = f'{{{asks}, "max_tokens": 32, "stream": true}}'
        typer.echo(f"try: curl -N {address}/v1/{way} -H 'Content-Type: application/json'{key} -d '{body}'")
        typer.echo("Ctrl-C ends it when all streams are finished")

    run(engine, models.tokenizer, name, options, choice.rule, ready)


def _name(pair: Pair, only_target: bool) -> str:
    """What is served is the target: clients need not know what drafts for it."""
    target = pair.target
    if not only_target:
        return pair.name
    if target.model is not None:
        return target.model
    return Path(target.gguf_file).stem if target.gguf_file else Path(pair.location(target)).name
