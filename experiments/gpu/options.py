"""What a GPU run does: one frozen object, with one preset for the real thing and one for a dry run on any CPU.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from specdec.experiments.frame import Options, argument, option

if TYPE_CHECKING:
    import torch

SECTIONS = ("tests", "bandwidth", "attention", "passes", "generate")
"""In the order of `all`."""


class Shape(NamedTuple):
    """A Llama's sizes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int


LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128256)
LLAMA_1B = Shape(16, 2048, 8192, 32, 8, 128256)


@dataclass(frozen=True, kw_only=True)
class GpuCommand(Options):
    """What the command line says."""

    section: Annotated[str, argument(f"all, or one of {', '.join(SECTIONS)}.")]
    out: Annotated[Path, option("Folder for gpu.json, gpu.md and the pictures.")]
    dry_run: Annotated[bool, option("Tiny shapes on a CPU: does everything run?", "--dry-run")] = False
    budget: Annotated[float | None, option("Seconds after which no measurement is begun.")] = None

    def __post_init__(self) -> None:
        self.one_of(("all", *SECTIONS), "section")


@dataclass(frozen=True)
class GpuOptions:
    """
    Attributes:
        target, draft: shapes of the random models.
        contexts: committed tokens of attention and pass timings; rows: batch sizes of attention timings.
        nodes: nodes of timed passes; attention_nodes: of timed attention.
        alphas: chance that a drafted token is the target's, per position; k: lengths of drafted chains.
        copy_bytes: size of the buffer whose copy measures bandwidth; product: side of the square matrix product.
        repeats: timed calls per point; budget_seconds: no new measurement is begun after it.
    """

    out: Path
    device: str = "cuda"
    dtype: str = "bfloat16"
    dry: bool = False
    target: Shape = LLAMA_8B
    draft: Shape = LLAMA_1B
    contexts: tuple[int, ...] = (1024, 8192, 32768)
    rows: tuple[int, ...] = (1, 8, 32)
    nodes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    attention_nodes: tuple[int, ...] = (1, 8, 64)
    alphas: tuple[float, ...] = (0.6, 0.8, 0.9)
    k: tuple[int, ...] = (3, 5, 8)
    prompt_tokens: int = 512
    new_tokens: int = 192
    copy_bytes: int = 4 << 30
    product: int = 8192
    repeats: int = 20
    budget_seconds: float = 520.0
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @staticmethod
    def dry_run(out: Path) -> GpuOptions:
        """The same code on a CPU in seconds; its figures mean nothing."""
        tiny = Shape(2, 64, 96, 4, 2, 512)
        return GpuOptions(
            out, device="cpu", dtype="float32", dry=True, target=tiny, draft=tiny._replace(layers=1),
            contexts=(24, 70), rows=(1, 2), nodes=(1, 4), attention_nodes=(1, 5), alphas=(0.8,), k=(3,),
            prompt_tokens=8, new_tokens=12, copy_bytes=1 << 20, product=64, repeats=2, budget_seconds=150.0,
        )  # fmt: skip
