"""Copies that leave weights out: neurons of MLPs, or single weights. What they leave out is chosen by the inputs that
layers have in a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.drafters.self_draft.calibration import Fit, Inputs, fit_in_order
from specdec.drafters.self_draft.mirror import named_weighted, weight_of
from specdec.kv.errors import UnsupportedModelError
from specdec.verify.quantised import is_quantised

_MLP = ("gate_proj", "up_proj", "down_proj")


def input_sizes(model: PreTrainedModel, texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Per linear layer, by its path, the root mean square of each of its inputs, float32 `[in]`."""
    sizes: dict[str, Tensor] = {}

    def noting(path: str) -> Fit:
        def note(given: Inputs) -> None:
            sizes[path] = given.tokens.square().mean(0).sqrt_()

        return note

    fit_in_order(model, texts, {layer: noting(path) for path, layer in named_weighted(model).items()})
    return sizes


def keep_neurons(model: PreTrainedModel, percent: int, sizes: Mapping[str, Tensor]) -> None:
    """Cut every MLP down to the neurons that add most to its output: size of the activation times norm of its column
    (after PowerInfer's hot neurons: Song et al. 2023, arXiv 2312.12456).

    Raises:
        UnsupportedModelError: no MLP of gate, up and down projections.
    """
    found = False
    for path, part in list(model.named_modules()):
        layers: list[Any] = [part._modules.get(name) for name in _MLP]
        gate, up, down = layers
        if f"{path}.down_proj" not in sizes or not all(map(_is_linear, layers)):
            continue
        found = True
        across, above, back = map(weight_of, layers)
        worth = sizes[f"{path}.down_proj"] * back.float().norm(dim=0)
        kept = worth.topk(max(1, round(len(worth) * percent / 100))).indices.sort().values
        part._modules["gate_proj"] = _linear(across[kept], None if gate.bias is None else gate.bias[kept])
        part._modules["up_proj"] = _linear(above[kept], None if up.bias is None else up.bias[kept])
        part._modules["down_proj"] = _linear(back[:, kept].contiguous(), down.bias)
    if not found:
        raise UnsupportedModelError(
            f"draft 'self:hot...': expected MLPs of {', '.join(_MLP)}, {type(model).__name__} has none"
        )


def prune(model: PreTrainedModel, percent: int, sizes: Mapping[str, Tensor]) -> None:
    """Set the weights of every row to zero that matter least: size of the weight times that of its input (Wanda, Sun et
    al. 2023, arXiv 2306.11695)."""
    for path, layer in named_weighted(model).items():
        if path in sizes:
            weight = weight_of(layer)
            worth = weight.float().abs() * sizes[path]
            count = round(worth.shape[1] * percent / 100)
            least = worth.topk(count, dim=1, largest=False).indices
            parent, _, name = path.rpartition(".")
            pruned = weight.detach().scatter(1, least, 0.0)
            model.get_submodule(parent)._modules[name] = _linear(pruned, layer.bias)


def _is_linear(layer: Any) -> bool:
    return type(layer) is nn.Linear or (layer is not None and is_quantised(layer))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[assignment]
    return layer.eval()
