"""Compares the gradients of a student with those of the whole model, as transformers runs it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.formats import use_backend
from lowbit.formats.base import QuantizedLinear
from lowbit.load import load_model
from lowbit.models.skeleton import unfuse_experts
from lowbit.tuning.student import Student, Target
from lowbit.tuning.teacher import loss
from lowbit.tuning.vectors import store_vectors, vectors_in

TOLERANCE = 1e-4  # relative, of each vector's gradient
NOISE = 1e-6  # gradients below this share of the largest one are rounding errors


def compare_gradients(student: Student, tokens: Tensor, target: Sequence[Target]) -> int:
    """Asserts that what `add_gradients` left in the vectors is right; returns how many there are.

    The whole model also has gradients by vectors that come before its blocks.
    """
    whole = whole_gradients(student, tokens, target)
    found = {n: v.change.grad for n, v in student.vectors.items() if v.change.grad is not None}
    inside = student.model.family.blocks + "."
    before = {n for n in whole if inside not in n and n not in student.vectors}
    assert found.keys() == whole.keys() - before
    most = max(float(gradient.abs().max()) for gradient in whole.values())
    for name, gradient in found.items():
        wanted = whole[name] * student.vectors[name]._unit
        error = float((gradient - wanted).norm())
        assert error <= TOLERANCE * float(wanted.norm()) + NOISE * most, (name, error)
    return len(found)


@use_backend("reference")
def whole_gradients(
    student: Student, tokens: Tensor, target: Sequence[Target]
) -> dict[str, Tensor]:
    """The gradients by the values of vectors, by name on disk."""
    model: Any = load_model(student.model.folder, dtype=torch.float32)
    unfuse_experts(model)
    store_vectors(model)
    values: dict[str, nn.Parameter] = {}
    for path, inside, name in list(vectors_in(model)):
        disk = f"{inside.stored_as}.{name}" if isinstance(inside, QuantizedLinear) else ""
        disk = disk or student.model.names_to_load.get(f"{path}.{name}", "")
        if disk:
            value = nn.Parameter(inside.get_parameter(name).detach().float())
            inside.register_parameter(name, values.setdefault(disk, value))
    total = torch.zeros(())
    for bits in student.widths:
        for layer in model.modules() if bits is not None else ():
            if isinstance(layer, QuantizedLinear):
                layer.set_bits(bits)
        logits = model(tokens, use_cache=False).logits[:, :-1]
        losses = [loss(*pair) for pair in zip(logits, target, strict=True)]
        total = total + torch.stack(losses).mean() / len(student.widths)
    total.backward()  # type: ignore[no-untyped-call]
    return {name: value.grad for name, value in values.items() if value.grad is not None}
