"""Names of the hardware: part of what a measurement means."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """The processor's model name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def has_feature(name: str) -> bool:
    """Whether the processor says that it has a feature, by Linux' name for it; False where nobody says."""
    return name in _cpuinfo("flags").split()


def _cpuinfo(key: str) -> str:
    """The first value in /proc/cpuinfo; empty where there is none."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.partition(":")[0].strip() == key:
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""


def gpu_name() -> str | None:
    """The current CUDA device's name, None without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
