"""Checkpoints of QuIP-for-all and AutoQuIP to the format `lattice`: the same words, numbered anew.

Their tensors of a layer y = S_V B_out (sigma C (B_in.T (S_U x))) + bias:

| name        | holds                                                 | becomes                 |
| ----------- | ----------------------------------------------------- | ----------------------- |
| `Qidxs`     | the codes of C, see `quip_codes.py`                   | `packed`                |
| `Wscale`    | sigma: one, or one for each row of C                  | `scale`                 |
| `SU`, `SV`  | diagonals of S_U and S_V; absent or 1 once merged     | `sign_in`, `sign_out`   |
| `had_left`  | M of B_in, where the width has an odd part above 1    | `factor_in`             |
| `had_right` | M of B_out, likewise                                  | `factor_out`            |
| `bias`      | the bias                                              | `bias`                  |
| `weight`    | one value or none, in some                            | nothing                 |

B = (M (x) I_p)(I_K (x) H_p), as the format has it (QuIP#, arXiv 2402.04396, section 3). S_U and S_V
may be any vectors. With `rescale_WH` their SU is multiplied by a scale that should divide it; it is
taken as it is, for that is what their models run with. So is a residual scale of -1, the default of
their quantizer. Without `use_rand`, M comes from a table that is not in the checkpoint, or a width
was padded to a power of two; both are refused.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from lowbit.checkpoint import CheckpointReader, CheckpointWriter, TensorInfo
from lowbit.checkpoint.companions import copy_companions
from lowbit.checkpoint.folder import written_aside
from lowbit.checkpoint.output import final_config
from lowbit.checkpoint.reader import INDEX, SINGLE
from lowbit.checkpoint.verify import read_config
from lowbit.checkpoint.writer import RUN
from lowbit.config import explain, unknown_name
from lowbit.convert.quip_codes import LAYOUTS, our_codes
from lowbit.formats import build
from lowbit.formats.checks import dtype_name, finite
from lowbit.formats.lattice.codebooks import CODEBOOKS
from lowbit.version import __version__

PARTS = ("Qidxs", "Wscale", "SU", "SV", "had_left", "had_right", "bias", "weight")
RESIDUAL_SCALES = {"E8P12RVQ3B": 1 / 2.04, "E8P12RVQ4B": 1 / 3.45}  # where theirs is null
ORTHOGONAL = 0.02  # how far M @ M.T may be from I; rounding to float16 makes 0.001


class Section(BaseModel):
    """What their config.json says about quantization, as far as it matters here."""

    quant_method: str
    codebook: str
    use_rand: bool = True
    rescale_WH: bool = False
    merge_suv: bool = False
    per_channel: bool = False
    opt_resid_scale: float | None = None

    @property
    def residual_scale(self) -> float | None:
        """What the second stage is multiplied by. Theirs is that, or above 1 its reciprocal."""
        if self.codebook not in RESIDUAL_SCALES:
            return None
        scale = self.opt_resid_scale
        if scale is None:
            return RESIDUAL_SCALES[self.codebook]
        return 1 / scale if scale > 1 else scale


@dataclass(frozen=True)
class Layer:
    """One of their layers, from the headers. parts: its tensors by their names within it."""

    name: str
    rows: int
    columns: int
    parts: dict[str, TensorInfo]

    @property
    def factors(self) -> dict[str, int]:
        """The matrices M that its widths need, and their orders."""
        sides = {"had_left": self.columns, "had_right": self.rows}
        orders = {name: width // (width & -width) for name, width in sides.items()}
        return {name: order for name, order in orders.items() if order > 1}


def from_quip(folder: str | Path, out: str | Path, trust_remote_code: bool = False) -> Path:
    """Writes what QuIP-for-all or AutoQuIP wrote as a folder that lowbit loads, and returns it.

    Weights must be in safetensors. One shard is in memory at a time.

    trust_remote_code: whether Python code that comes with the model is copied.

    Raises ValueError, with the name of the layer, for what cannot be read or stored in our format,
    and when `out` exists; shapes are checked before anything is written, and nothing of `out`
    remains.
    """
    folder, out = Path(folder), Path(out)
    config = read_config(folder)
    section = _section(config, folder)
    reader = _reader(folder)
    layers = _layers(reader, section, config)
    with written_aside(out) as part:
        _write(reader, layers, section, part)
        copy_companions(folder, part, trust_remote_code)
        shutil.rmtree(part / RUN)
    return out


def _section(config: Mapping[str, Any], folder: Path) -> Section:
    try:
        section = Section.model_validate(config.get("quantization_config") or {})
    except ValidationError as error:
        raise ValueError(f"{folder}/config.json: quantization_config: {explain(error)}") from None
    if section.quant_method.lower() != "quip":
        raise ValueError(
            f"{folder} was quantized by {section.quant_method!r}: --from quip reads what "
            "QuIP-for-all and AutoQuIP wrote, whose quant_method is 'QUiP'"
        )
    if section.codebook not in LAYOUTS:
        raise ValueError(f"{folder}: {unknown_name(section.codebook, LAYOUTS, 'codebook')}")
    scale = section.residual_scale
    if scale is not None and not 0 < abs(scale) <= 1:
        raise ValueError(
            f"{folder}: opt_resid_scale is {section.opt_resid_scale}: allowed are numbers above 0, "
            "and negative ones down to -1"
        )
    return section


def _reader(folder: Path) -> CheckpointReader:
    whole = (folder / INDEX).exists() or (folder / SINGLE).exists()
    if not whole and any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} has its weights in pickles, and --from quip opens none: first write them as "
            f"safetensors with lowbit convert {folder} SAFE --from-bin, then convert SAFE"
        )
    return CheckpointReader(folder)


def _layers(
    reader: CheckpointReader, section: Section, config: Mapping[str, Any]
) -> dict[str, Layer]:
    """All of their layers by name, checked as far as headers tell."""
    parts: dict[str, dict[str, TensorInfo]] = {
        name.removesuffix(".Qidxs"): {} for name in reader.tensors if name.endswith(".Qidxs")
    }
    for name, info in reader.tensors.items():
        owner, _, part = name.rpartition(".")
        if owner in parts:
            parts[owner][part] = info
    if not parts:
        raise ValueError(f"{reader.folder} has no tensor that is called Qidxs: nothing to convert")
    layers: dict[str, Layer] = {}
    for name, found in parts.items():
        try:
            layers[name] = _layer(name, found, section, config)
        except ValueError as error:
            raise ValueError(f"{reader.folder}: layer {name}: {error}") from None
    return layers


def _layer(
    name: str, parts: dict[str, TensorInfo], section: Section, config: Mapping[str, Any]
) -> Layer:
    layout, codes = LAYOUTS[section.codebook], parts["Qidxs"]
    if codes.dtype != layout.dtype or len(codes.shape) != 2 or codes.shape[1] % layout.count:
        raise ValueError(
            f"Qidxs is {codes.dtype} {list(codes.shape)}: {section.codebook} is {layout.dtype}, "
            f"rows of a multiple of {layout.count}"
        )
    rows, columns = codes.shape[0], codes.shape[1] // layout.count * layout.weights
    layer = Layer(name, rows, columns, parts)
    if unknown := sorted(parts.keys() - set(PARTS)):
        raise ValueError(f"{unknown[0]} is no tensor of this layout: it has {', '.join(PARTS)}")
    if "Wscale" not in parts:
        raise ValueError("Wscale is missing")
    allowed: dict[str, list[tuple[int, ...]]] = {
        "Wscale": [(), (1,), (rows,), (rows, 1)],
        "SU": [(columns,)],
        "SV": [(rows,)],
        "bias": [(rows,)],
        "weight": [(), (0,)],
        **dict.fromkeys(("had_left", "had_right"), [(), (0,), (1, 1)]),
        **{side: [(order, order)] for side, order in layer.factors.items()},
    }
    for part, shapes in allowed.items():
        if part in parts and parts[part].shape not in shapes:
            raise ValueError(
                f"{part} is {list(parts[part].shape)}: with Qidxs of {rows} x {columns} weights it "
                f"is {list(shapes[-1])}; a layer that was padded cannot be converted"
            )
    _check_transforms(layer, section, config)
    return layer


def _check_transforms(layer: Layer, section: Section, config: Mapping[str, Any]) -> None:
    for side, order in layer.factors.items():
        if side not in layer.parts:
            raise ValueError(
                f"{side} is missing, the matrix of order {order}: without use_rand it comes from a "
                "table that is not in the checkpoint, so only powers of two can be converted"
            )
    if section.use_rand:
        return
    for width in (layer.columns, layer.rows):
        if (size := _unpadded(width, config)) is not None:
            raise ValueError(
                f"its width {width} is {size} in config.json, padded to a power of two: this "
                "cannot be converted"
            )


def _unpadded(width: int, config: Mapping[str, Any]) -> int | None:
    """The size in config.json that a power of two stands for, if it does not stand there itself."""
    named = {key: size for key, size in config.items() if type(size) is int and key != "vocab_size"}
    sizes = {size for key, size in named.items() if key.endswith(("_size", "_dim", "_inner"))}
    near = sorted(size for size in sizes if width // 2 < size < width)
    return near[-1] if near and width not in sizes and width & (width - 1) == 0 else None


def _write(
    reader: CheckpointReader, layers: Mapping[str, Layer], section: Section, out: Path
) -> None:
    """A shard for each of theirs. A layer is in the shard that has its codes."""
    inside = {f"{layer.name}.{part}" for layer in layers.values() for part in layer.parts}
    plain = {n: info.file for n, info in reader.tensors.items() if n not in inside}
    placed = {name: layer.parts["Qidxs"].file for name, layer in layers.items()}
    files = sorted({*plain.values(), *placed.values()})
    made_by = {
        "source": reader.folder.resolve().name,
        "method": {"name": "converted from quip", **section.model_dump(exclude={"quant_method"})},
        "model": reader.digest(),
        "versions": {"lowbit": __version__},
    }
    first, dtype = next(iter(layers)), _dtype(reader, plain)
    with CheckpointWriter(out, made_by, len(files)) as writer:
        for index, file in enumerate(files):
            tensors = reader.read([name for name, there in plain.items() if there == file])
            modules: dict[str, dict[str, Any]] = {}
            for name in (name for name, there in placed.items() if there == file):
                modules[name], made = _convert(reader, layers[name], section, dtype)
                tensors |= {f"{name}.{key}": tensor for key, tensor in made.items()}
            guard = f"{first}.weight" if first in modules else None
            if guard is not None:
                tensors[guard] = torch.empty(0, dtype=dtype)
            writer.write_shard(index, tensors, None, {"modules": modules, "marker": guard})
        records = [record for i in range(len(files)) if (record := writer.record(i))]
        writer.finish(final_config(reader.folder, records, made_by))


def _dtype(reader: CheckpointReader, plain: Mapping[str, str]) -> torch.dtype:
    """The dtype of the float weights: that of the largest tensor that is in no layer."""
    beside = [
        reader.tensors[name] for name in plain if reader.tensors[name].dtype.is_floating_point
    ]
    return max(beside, key=lambda info: info.bytes).dtype if beside else torch.float16


def _convert(
    reader: CheckpointReader, layer: Layer, section: Section, weight: torch.dtype
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The entry and the tensors of a layer of the format `lattice`.

    weight: the dtype of the float weight that the layer stands for.
    """
    wanted = [f"{layer.name}.{part}" for part in layer.parts if part != "weight"]
    stored = {name.rpartition(".")[2]: tensor for name, tensor in reader.read(wanted).items()}
    try:
        tensors = {
            "packed": CODEBOOKS[section.codebook].pack(
                our_codes(section.codebook, stored["Qidxs"])
            ),
            "scale": _scale(stored["Wscale"]),
            **_signs(layer, stored),
            **_factors(layer, stored),
        }
        if "bias" in stored:
            tensors["bias"] = stored["bias"]
        entry = _entry(layer, section, tensors) | {"dtype": dtype_name(weight)}
        made = build(entry)
    except ValueError as error:
        raise ValueError(f"{reader.folder}: layer {layer.name}: {error}") from None
    made.load_state_dict(tensors)
    return made.entry(), made.state_dict()


def _entry(layer: Layer, section: Section, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    def dtype(name: str, otherwise: str | None) -> str | None:
        return dtype_name(tensors[name].dtype) if name in tensors else otherwise

    return {
        "format": "lattice",
        "shape": [layer.rows, layer.columns],
        "bias": dtype("bias", None),
        "codebook": section.codebook,
        "residual_scale": section.residual_scale,
        "scale": "tensor" if len(tensors["scale"]) == 1 else "row",
        "scale_dtype": dtype("scale", None),
        "seed_in": None,
        "seed_out": None,
        "transform_in": dtype("factor_in", "hadamard"),
        "transform_out": dtype("factor_out", "hadamard"),
        "signs": dtype("sign_out", "seed"),
        "shares": None,
    }


def _scale(stored: Tensor) -> Tensor:
    """One in float32, or one for each row as it is stored."""
    scale = finite("Wscale", stored.flatten())
    return scale.half() if len(scale) > 1 and stored.dtype == torch.float16 else scale


def _signs(layer: Layer, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Nothing where there are none, or all are 1 because neighbours took them."""
    given = {part: stored[part] for part in ("SU", "SV") if part in stored}
    if all(bool((vector == 1).all()) for vector in given.values()):
        return {}
    half = all(vector.dtype == torch.float16 for vector in given.values())
    vectors = {"SU": torch.ones(layer.columns), "SV": torch.ones(layer.rows)}
    vectors |= {part: finite(part, vector) for part, vector in given.items()}
    dtype = torch.float16 if half else torch.float32
    return {"sign_in": vectors["SU"].to(dtype), "sign_out": vectors["SV"].to(dtype)}


def _factors(layer: Layer, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for side, name in (("had_left", "factor_in"), ("had_right", "factor_out")):
        if side not in stored or not stored[side].numel():
            continue
        factor = finite(side, stored[side].reshape(layer.factors.get(side, 1), -1))
        far = float((factor @ factor.T - torch.eye(len(factor))).abs().max())
        if far > ORTHOGONAL or (side not in layer.factors and factor.item() < 0):
            raise ValueError(
                f"{side} is not orthogonal: {side} @ {side}.T is {far:.3g} away from I"
            )
        if side in layer.factors:
            made[name] = factor.half() if stored[side].dtype == torch.float16 else factor
    return made
