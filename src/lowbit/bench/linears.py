"""Measures all linears of one token, without attention, norms and Python around them.

One token runs through the model, and the calls of its linears are recorded with their inputs. They
are repeated in this order, so that weights come from memory as they do in the model: a layer that
runs in a loop would find them in a cache. Linears that read the same tensor in the model read the
same tensor here, and no tensor is read again for the next token.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.device import synchronize
from lowbit.formats.base import QuantizedLinear

Linear = QuantizedLinear | nn.Linear


@dataclass(frozen=True)
class Step:
    """Linears that read the same input, in the order in which they run. x: (1, 1, inputs)"""

    x: Tensor
    layers: tuple[Linear, ...]


def record(model: nn.Module) -> list[Step]:
    """Returns the calls of the linears for one token."""
    calls: list[tuple[Tensor, Linear]] = []
    hooks = [
        module.register_forward_pre_hook(lambda layer, x: calls.append((x[0], layer)))
        for module in model.modules()
        if isinstance(module, Linear)
    ]
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            model(input_ids=torch.tensor([[0]], device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    steps: list[Step] = []
    for x, layer in calls:
        if steps and steps[-1].x is x:
            steps[-1] = Step(x, (*steps[-1].layers, layer))
        else:
            steps.append(Step(x, (layer,)))
    return [Step(step.x.clone(), step.layers) for step in steps]


def seconds(steps: list[Step], tokens: int, rounds: int) -> list[float]:
    """Returns the seconds of each of some passes over all linears.

    tokens: tokens of each pass.
    rounds: passes.
    """
    times = []
    with torch.no_grad():
        for _ in range(rounds):
            inputs = [step.x.repeat(*[1] * (step.x.ndim - 2), tokens, 1) for step in steps]
            synchronize(steps[0].x.device)
            started = time.perf_counter()
            for step, x in zip(steps, inputs, strict=True):
                for layer in step.layers:
                    layer(x)
            synchronize(steps[0].x.device)
            times.append(time.perf_counter() - started)
    return times


def stored_bytes(steps: list[Step]) -> int:
    """Returns the bytes that store the weights which one token reads, without biases."""
    return sum(
        layer.weight_bytes() if isinstance(layer, QuantizedLinear) else layer.weight.nbytes
        for step in steps
        for layer in step.layers
    )


def weights(steps: list[Step]) -> int:
    """Returns the number of weights by which one token is multiplied."""
    layers = (layer for step in steps for layer in step.layers)
    return sum(layer.in_features * layer.out_features for layer in layers)


def backends(steps: list[Step], tokens: int, dtype: torch.dtype) -> list[str]:
    """Returns the names of the backends that run the quantized linears."""
    names = {
        layer.backend_for(tokens, dtype=dtype).name
        for step in steps
        for layer in step.layers
        if isinstance(layer, QuantizedLinear)
    }
    return sorted(names)
