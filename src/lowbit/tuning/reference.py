"""Checks that the float model is the one from which a folder was quantized."""

import hashlib
from collections.abc import Mapping
from typing import Any

from lowbit.checkpoint import QuantizedFolder, file_sha256, open_checkpoint
from lowbit.formats.base import QuantizedLinear
from lowbit.models.streamed import StreamedModel

CONVERTED = "converted from"  # begins the name of the method of a folder that was converted


def check_reference(
    quantized: QuantizedFolder, student: StreamedModel, teacher: StreamedModel
) -> dict[str, str]:
    """Compares a float model with what a quantized folder states of its source.

    quantized: the folder.
    student, teacher: its model and the float model.

    Returns the hash of the float model, and whether it was compared: "checked" is "hash", or
    "shapes" if the folder states no hash of a float model, because it was converted from the
    checkpoint of another program.

    Raises ValueError if the float model is another one.
    """
    folder = teacher.folder
    digest = open_checkpoint(folder).digest(())
    config = file_sha256(folder / "config.json")
    found = {digest, hashlib.sha256(f"{config} {digest}".encode()).hexdigest()}
    stated = stated_hash(quantized.quantization.get("made_by") or {})
    if stated is not None and stated not in found:
        raise ValueError(
            f"{folder} is not the model from which {quantized.folder} was quantized: the hash of "
            "its config.json and its weights differs from the one that the quantized folder "
            "states. Name the very folder that was quantized, or a copy of it"
        )
    _check_shapes(student, teacher)
    return {"model": digest, "checked": "shapes" if stated is None else "hash"}


def stated_hash(made_by: Mapping[str, Any]) -> str | None:
    """Returns the hash of the float model that a folder states; None: it states none.

    made_by: of the folder's config.json. That of a converted folder states the hash of the
        checkpoint that it was converted from, which is no float model.
    """
    method, model = made_by.get("method"), made_by.get("model")
    name = method.get("name") if isinstance(method, dict) else None
    converted = isinstance(name, str) and name.startswith(CONVERTED)
    return model if isinstance(model, str) and not converted else None


def _check_shapes(student: StreamedModel, teacher: StreamedModel) -> None:
    """Raises ValueError for a float model whose tensors have other names or shapes."""
    packed = {n for n, m in student.skeleton.named_modules() if isinstance(m, QuantizedLinear)}
    ours = {n: tuple(t.shape) for n, t in student.skeleton.state_dict().items()}
    theirs = {n: tuple(t.shape) for n, t in teacher.skeleton.state_dict().items()}
    ours = {n: shape for n, shape in ours.items() if n.rpartition(".")[0] not in packed}
    for name in packed:
        layer = student.skeleton.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        ours[f"{name}.weight"] = (layer.out_features, layer.in_features)
    for name, shape in ours.items():
        if theirs.get(name) != shape:
            came = list(theirs[name]) if name in theirs else "none"
            raise ValueError(
                f"{teacher.folder} is not the float model of {student.folder}: tensor {name} has "
                f"shape {came} there, and {list(shape)} in the quantized model"
            )
