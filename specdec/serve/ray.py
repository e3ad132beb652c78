"""Replicas of the server on Ray Serve, behind Ray's proxy: `serve run specdec.serve.ray:app pair=smollm2-135m`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specdec.engine import Engine
from specdec.pairing.chosen import chosen_pair
from specdec.pairing.loading import load_pair
from specdec.pairing.registry import pair_of
from specdec.pairing.schema import Pair
from specdec.serve.app import create_app
from specdec.serve.options import KV_MIB, MAX_ROWS, MAX_WAITING, ServeOptions, further_drafters

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
"""Requests with one `x-session-id` go to one replica, which has the beginning of their text in its pool already. Ray's
router by prefixes reads arguments of Python calls; of requests over HTTP it sees bytes."""
REPLICA_HEADER = "x-specdec-replica"
"""Says who answered."""


class Arguments(BaseModel):
    """What `app` may be told, as `name=value` after `serve run specdec.serve.ray:app` or under `args:` in a file.

    pair, target, draft, gguf_file, k, rule, dtype, device: as in `specdec serve`; a pair may also be what its file
    says, as `specdec pairs export --to ray` has it. drafters: further ones that a request may name, with commas
    between. model_name: what clients call the model. max_rows, max_waiting, kv_mib, kv_dtype, lossy: of the engine of
    each replica.
    num_cpus, num_gpus: of one replica. min_replicas, max_replicas: as many as it takes that each has about
    `target_ongoing` generations (by default `max_rows`). sticky: see ROUTER.
    The others: see `ServeOptions`, for each replica.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    pair: str | dict[str, Any] | None = None
    target: str | None = None
    draft: str | None = None
    gguf_file: str | None = None
    k: int | None = None
    rule: str = "auto"
    dtype: str | None = None
    device: str | None = None
    drafters: str = "ngram"
    model_name: str | None = None
    max_rows: int = Field(MAX_ROWS, ge=1)
    max_waiting: int = Field(MAX_WAITING, ge=1)
    kv_mib: int = Field(KV_MIB, ge=1)
    kv_dtype: str | None = None
    lossy: bool = False
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_ongoing: float | None = Field(None, gt=0)
    sticky: bool = True
    api_key_file: Path | None = None
    max_concurrent: int = Field(ServeOptions.max_concurrent, ge=1)
    max_new_tokens: int = Field(ServeOptions.max_new_tokens, ge=1)
    max_prompt_tokens: int | None = Field(None, ge=1)
    request_seconds: float = Field(ServeOptions.request_seconds, gt=0)
    drain_seconds: float = Field(ServeOptions.drain_seconds, ge=0)

    @property
    def models(self) -> Pair:
        """Raises PairError: contradictory arguments, or nothing that this library runs."""
        if isinstance(self.pair, dict):
            return pair_of(self.pair, "pair")
        return chosen_pair(self.pair, self.target, self.draft, self.gguf_file)

    @property
    def options(self) -> ServeOptions:
        names = ("api_key_file", "max_concurrent", "max_new_tokens", "max_prompt_tokens", "request_seconds",
                 "drain_seconds")  # fmt: skip
        return ServeOptions(**{name: getattr(self, name) for name in names})


def app(args: Mapping[str, Any]) -> serve.Application:
    """The application that Ray deploys: replicas of one server, each with an engine and K/V of its own.

    What has begun on a replica that dies is lost: its stream breaks off without `[DONE]`, which clients report as an
    error. What comes then goes to the others, until Ray has started a new one.

    Raises:
        pydantic.ValidationError: an argument that does not exist, or a value out of range.
    """
    given = Arguments.model_validate(dict(args))
    router: dict[str, Any] = {"request_router_class": ROUTER} if given.sticky else {}
    deployment = serve.deployment(
        name="specdec",
        max_ongoing_requests=given.max_concurrent,
        autoscaling_config=AutoscalingConfig(
            min_replicas=given.min_replicas,
            max_replicas=max(given.min_replicas, given.max_replicas),
            target_ongoing_requests=given.target_ongoing or given.max_rows,
        ),
        graceful_shutdown_timeout_s=given.drain_seconds,
        ray_actor_options={"num_cpus": given.num_cpus, "num_gpus": given.num_gpus},
        request_router_config=RequestRouterConfig(**router),
    )
    return deployment(Replica).bind(given.model_dump())


@serve.ingress()
class Replica:
    """One server in an actor. It loads the models, and answers only then."""

    def __init__(self, args: Mapping[str, Any]):
        given = Arguments.model_validate(args)
        pair = given.models
        target, draft, tokenizer = load_pair(pair, given.dtype, given.device)
        drafting = (given.k, None) if given.k is not None else (pair.drafting.k, pair.drafting.tree)
        self._engine = Engine(
            target, draft, k=drafting[0], tree=drafting[1], drafters=further_drafters(given.drafters, draft),
            tokenizer=tokenizer, num_bytes=given.kv_mib << 20, kv_dtype=given.kv_dtype, lossy=given.lossy,
            max_rows=given.max_rows, max_waiting=given.max_waiting,
        )  # fmt: skip
        name = given.model_name or given.target or pair.name
        rule = pair.drafting.rule if given.rule == "auto" else given.rule
        self._app = create_app(self._engine, tokenizer, name, given.options, rule)
        self._app.add_middleware(Signed, name=serve.get_replica_context().replica_id.unique_id)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    def check_health(self) -> None:
        """Ray's own question, now and then; it starts another replica in place of one that raises."""
        if not self._engine.threaded:
            raise RuntimeError("the engine's thread is not running")


class Signed:
    """ASGI middleware: answers carry the name of their replica."""

    def __init__(self, app: ASGIApp, name: str):
        self._app, self._name = app, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REPLICA_HEADER] = self._name
            await send(message)

        await self._app(scope, receive, signed)
