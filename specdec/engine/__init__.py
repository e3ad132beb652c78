"""Serving many requests at once: continuous batching with speculation."""

from specdec.engine.engine import Engine
from specdec.engine.errors import EngineClosedError, EngineFaultError, QueueFullError, RequestFaultError
from specdec.engine.handle import Handle, Result, any_more
from specdec.engine.metrics import EngineMetrics, Latency
from specdec.engine.params import Params
from specdec.engine.step_output import StepOutput, TokenLogprobs

__all__ = [
    "Engine",
    "EngineClosedError",
    "EngineFaultError",
    "EngineMetrics",
    "Handle",
    "Latency",
    "Params",
    "QueueFullError",
    "RequestFaultError",
    "Result",
    "StepOutput",
    "TokenLogprobs",
    "any_more",
]
