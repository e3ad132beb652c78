"""Whatever the OpenAPI document allows, and what it does not, is answered as it says; never by a 500.

FUZZ_EXAMPLES=2000 python -m pytest -q tests/specdec/serve/test_serve_fuzz.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from in_process_server import InProcess, in_process
from tiny_pair import TEMPLATE, save_pair

from specdec.serve import ServeOptions

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.checks import (  # noqa: E402
    content_type_conformance,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
          response_schema_conformance]  # fmt: skip

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "12"))
OPERATIONS = [("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/health"),
              ("GET", "/metrics"), ("GET", "/specdec/info")]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    folder: Path = save_pair(tmp_path_factory.mktemp("chat-pair"), TEMPLATE)
    with in_process(folder, ServeOptions(max_new_tokens=6, max_choices=3, default_new_tokens=4)) as made:
        yield made


def fuzz(server: InProcess, method: str, path: str) -> list[int]:
    """Statuses of the answers."""
    document = server.request("GET", "/openapi.json").json()
    operation = schemathesis.openapi.from_dict(document)[path][method]
    statuses: list[int] = []

    @settings(max_examples=EXAMPLES if method == "POST" else 3, suppress_health_check=list(HealthCheck), deadline=None)
    @given(case=operation.as_strategy())
    def run(case: Any) -> None:
        given = case.as_transport_kwargs(base_url="http://localhost")
        more = {name: given[name] for name in ("params", "json", "headers") if given.get(name) is not None}
        if "data" in given:
            more["content"] = given["data"]
        found = server.request(method, path, **more)
        statuses.append(found.status_code)
        assert found.status_code < 500, found.text
        if not found.headers["content-type"].startswith("text/event-stream"):
            case.validate_response(found, checks=CHECKS)

    run()
    return statuses


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_those_of_the_document(server: InProcess, method: str, path: str) -> None:
    statuses = fuzz(server, method, path)
    assert statuses
