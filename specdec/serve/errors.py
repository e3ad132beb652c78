"""Why a request gets no text: a status, and a body that OpenAI's clients understand."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException

from specdec.engine import EngineClosedError, EngineFaultError, QueueFullError, RequestFaultError
from specdec.kv.errors import SpecdecError, TargetFaultError

_TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}
RETRY_SECONDS = 1
"""When whoever was turned away for the crowd should come back."""


class Refusal(HTTPException):
    """An answer that is an error.

    Args:
        status: of HTTP. message: what was expected, what came, and what to do. param: the field it is about.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else None
        super().__init__(status, message, headers)
        self.message, self.param, self.code = message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": {...}}`."""
        kind = _TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refusal(error: Exception) -> Refusal:
    """What the engine's error is to a client. Errors that are nobody's say nothing of what is inside."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, QueueFullError):
        return Refusal(503, f"too many requests are waiting: {error}", code="queue_full")
    if isinstance(error, EngineClosedError):
        return Refusal(503, "the server is shutting down", code="shutting_down")
    if isinstance(error, (RequestFaultError, TargetFaultError, EngineFaultError)):
        return Refusal(500, f"the generation failed: {error}", code="generation_failed")
    if isinstance(error, (SpecdecError, ValueError, TypeError)):
        return Refusal(400, str(error), code="invalid_value")
    return Refusal(500, "an error of the server's own; its log says more", code="internal_error")
