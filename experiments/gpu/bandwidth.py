"""What the device can do at best: copy bandwidth and matrix products, against which everything else is held."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from specdec.experiments.clock import Deadline, median_ms
from specdec.experiments.gpu.options import GpuOptions


def bandwidth(options: GpuOptions, deadline: Deadline) -> list[dict[str, Any]]:
    """`copy_gb_s` counts bytes read and written; `read_gb_s` is of a sum, which writes next to nothing; `tflops` is of
    a square product in the run's dtype."""
    device, repeats = options.device, options.repeats
    source = torch.ones(options.copy_bytes // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy = median_ms(partial(target.copy_, source), device, repeats)
    read = median_ms(partial(torch.sum, source.view(-1, 1024), 1), device, repeats)
    side = options.product
    left, right = (torch.randn(side, side, device=device, dtype=options.torch_dtype) for _ in range(2))
    product = median_ms(partial(torch.matmul, left, right), device, repeats)
    return [
        {
            "copy_gb_s": 2 * options.copy_bytes / copy / 1e6,
            "read_gb_s": options.copy_bytes / read / 1e6,
            "tflops": 2 * side**3 / product / 1e9,
        }
    ]
