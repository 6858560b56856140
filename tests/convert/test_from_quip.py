"""Converted checkpoints compute what the layers of QuIP-for-all and AutoQuIP compute."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from quip_layout import STORED, Edit, rewrite, run
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.checkpoint import CheckpointReader, QuantizedFolder
from lowbit.checkpoint.output import size_of
from lowbit.convert import READERS, dequantize, from_bin, from_quip
from lowbit.load import load_model

pytestmark = pytest.mark.slow

# Widths of 32 and 16, and 96 = 3 x 32 inside the MLP.
SIZES = zoo.GQA | {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 1}
Parts = dict[str, Tensor]


def theirs(
    folder: Path,
    codebook: str,
    edit: Edit = lambda name, parts: None,
    family: str = "llama",
    sizes: dict[str, Any] = SIZES,
    **section: Any,
) -> dict[str, Parts]:
    zoo.write(zoo.Line(family, sizes), folder, dtype=torch.float16)
    return rewrite(folder, codebook, edit, **section)


def check(folder: Path, out: Path, layers: dict[str, Parts], codebook: str, ratio: float) -> None:
    """Checks that every converted layer gives the same outputs as the original layer."""
    model = load_model(from_quip(folder, out))
    assert len(layers) == 7
    for name, parts in layers.items():
        linear = model.get_submodule(name)
        for tokens in (2, 100):
            x = torch.randn(tokens, linear.in_features, generator=torch.Generator().manual_seed(1))
            assert zoo.error(linear(x), run(parts, codebook, x, ratio)) < 1e-5
    assert torch.isfinite(model(zoo.tokens()).logits).all()


@pytest.mark.parametrize("codebook", STORED)
def test_every_codebook(codebook: str, tmp_path: Path) -> None:
    layers = theirs(tmp_path / "in", codebook, opt_resid_scale=None)
    ratio = {"E8P12RVQ3B": 1 / 2.04, "E8P12RVQ4B": 1 / 3.45}.get(codebook, 1.0)
    check(tmp_path / "in", tmp_path / "out", layers, codebook, ratio)


@pytest.mark.parametrize("codebook", ["E8P12RVQ3B", "E8P12RVQ4B"])
@pytest.mark.parametrize(("stored", "ratio"), [(-1, -1), (0.5, 0.5), (2.5, 0.4)])
def test_residual_scales(codebook: str, stored: float, ratio: float, tmp_path: Path) -> None:
    layers = theirs(tmp_path / "in", codebook, opt_resid_scale=stored)
    check(tmp_path / "in", tmp_path / "out", layers, codebook, ratio)


def per_row(name: str, parts: Parts) -> None:
    rows = len(parts["Qidxs"])
    parts["Wscale"] = (torch.arange(rows) / rows * 0.1 + 0.05).half()
    parts.pop("weight")


def rescaled(name: str, parts: Parts) -> None:
    parts["SU"] = (parts["SU"] * torch.linspace(0.3, 3, len(parts["SU"]))).half()
    parts["SV"] = parts["SV"].float()


def merged(name: str, parts: Parts) -> None:
    """SU and SV are both missing, or both are 1, or one of them is missing."""
    if "mlp" in name:
        del parts["SU"], parts["SV"]
    elif "q_proj" in name:
        parts |= {side: torch.ones_like(parts[side]) for side in ("SU", "SV")}
    else:
        del parts["SU"]


@pytest.mark.parametrize(
    ("edit", "family", "section"),
    [
        (per_row, "qwen2", {"per_channel": True}),
        (rescaled, "llama", {"rescale_WH": True}),
        (merged, "llama", {"merge_suv": True}),
    ],
    ids=["per_channel, bias", "rescale_WH", "merge_suv"],
)
def test_options(edit: Edit, family: str, section: dict[str, Any], tmp_path: Path) -> None:
    layers = theirs(tmp_path / "in", "E8P12", edit, family, **section)
    check(tmp_path / "in", tmp_path / "out", layers, "E8P12", 1.0)
    entries = QuantizedFolder(tmp_path / "out").entries
    assert {entry["scale"] for entry in entries.values()} == {
        "row" if edit is per_row else "tensor"
    }
    assert (
        entries["model.layers.0.self_attn.q_proj"]["signs"]
        == {
            per_row: "float16",
            rescaled: "float32",
            merged: "seed",
        }[edit]
    )
    assert (family == "qwen2") == (entries["model.layers.0.self_attn.q_proj"]["bias"] == "float16")


def test_powers_of_two_without_use_rand(tmp_path: Path) -> None:
    sizes = SIZES | {"intermediate_size": 64}
    layers = theirs(tmp_path / "in", "D4", sizes=sizes, use_rand=False)
    check(tmp_path / "in", tmp_path / "out", layers, "D4", 1.0)


def test_a_whole_folder(tmp_path: Path) -> None:
    """The tensors of each layer are in two files; tensors of no layer are copied unchanged."""
    folder, out = tmp_path / "in", tmp_path / "out"
    theirs(folder, "E8P12")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"part-{int(name.endswith('Qidxs'))}.safetensors" for name in state}
    for file in set(files.values()):
        save_file({n: t for n, t in state.items() if files[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "quantization_config.json"):
        (folder / name).write_text("{}")
    READERS["quip"](folder, out)
    assert {path.name for path in out.iterdir() if path.suffix == ".json"} == {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    }
    quantized = QuantizedFolder(out)
    quantized.verify()
    made = quantized.quantization["made_by"]
    assert (made["source"], made["method"]["codebook"]) == ("in", "E8P12")
    assert quantized.reader.tensors[quantized.placeholder].dtype == torch.float16
    plain = [n for n in state if n.rpartition(".")[2] == "weight" and state[n].dim()]
    kept = CheckpointReader(out).read(plain)
    assert len(plain) == 5 and all(torch.equal(kept[name], state[name]) for name in plain)
    # down_proj: codes, a scale, signs, the factor of order 3
    packed = sum(quantized.reader.tensors[n].bytes for n in quantized.tensors_of(DOWN))
    assert packed == 32 * 96 // 4 + 4 + 2 * (32 + 96) + 2 * 3**2
    assert size_of(out).linears < 5
    tokens = zoo.tokens()
    dense = load_model(dequantize(out, tmp_path / "dense"))
    assert zoo.error(dense(tokens).logits, load_model(out)(tokens).logits) < 0.01  # of float16


def test_pickles_in_two_steps(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    layers = theirs(folder, "HI")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"lowbit convert {folder} CONVERTED --from-bin"):
        from_quip(folder, tmp_path / "out")
    check(from_bin(folder, tmp_path / "safe"), tmp_path / "out", layers, "HI", 1.0)


# What is refused

DOWN = "model.layers.0.mlp.down_proj"


def changed(name: str, parts: Parts, **changes: Tensor | None) -> None:
    """Changes tensors of one layer; None removes a tensor."""
    if name == DOWN:
        for part, tensor in changes.items():
            parts.pop(part, None)
            if tensor is not None:
                parts[part] = tensor


LAYERS: list[tuple[dict[str, Tensor | None], str]] = [
    ({"had_left": None}, "had_left, a matrix of order 3, is missing: without use_rand"),
    (
        {"had_left": torch.eye(12)},
        r"had_left has shape \[12, 12\], allowed are \[3, 3\] .*weights\)$",
    ),
    ({"had_left": 2 * torch.eye(3)}, "had_left is not orthogonal: .* by up to 3, allowed is 0.02;"),
    ({"had_right": -torch.ones(1, 1)}, r"had_right is \[\[-1\]\]: a 1 x 1 transform must be 1"),
    ({"had_right": 2 * torch.ones(1, 1)}, r"had_right is \[\[2\]\]: a 1 x 1 transform must be 1"),
    ({"SU": torch.ones(80)}, r"SU has shape \[80\], allowed are \[96\] .* a padded layer cannot"),
    ({"SU": torch.ones(100)}, r"SU has shape \[100\], allowed are \[96\] .*weights\)$"),
    (
        {"Wscale": torch.ones(20)},
        r"Wscale has shape \[20\], allowed are \[\] or \[1\] or \[32\] or \[32, 1\] "
        r"\(Qidxs holds 32 x 96 weights\)$",
    ),
    ({"bias": torch.ones(20)}, r"bias has shape \[20\]"),
    ({"SV": torch.full((32,), torch.nan)}, "SV has values that are not finite"),
    ({"Wscale": None}, "the tensor Wscale is missing, .*: copy the checkpoint"),
    (
        {"Qidxs": torch.zeros(32, 3, dtype=torch.int64)},
        r"Qidxs is torch.int64 \[32, 3\]: E8P12 nee",
    ),
    ({"weight": torch.zeros(32, 96)}, r"weight has shape \[32, 96\], allowed are \[\] or \[0\]"),
    (
        {"codebook_id": torch.zeros(())},
        "codebook_id is not a tensor of this layout: allowed are Qidxs",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    LAYERS,
    ids=[f"{i} {next(iter(changes))}" for i, (changes, _) in enumerate(LAYERS)],
)
def test_layers_are_refused_by_name(
    changes: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    theirs(tmp_path / "in", "E8P12", partial(changed, **changes))
    with pytest.raises(ValueError, match=rf"(layer {DOWN}: |tensor {DOWN}\.){message}"):
        from_quip(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_folders_are_refused(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    theirs(folder, "E8P12RVQ3B")
    kept = json.loads((folder / "config.json").read_text())
    for section, message in (
        ({"quant_method": "gptq"}, "was quantized by GPTQ, and lowbit does not read"),
        ({"codebook": "E8P13"}, "'E8P13' is not a codebook: did you mean 'E8P12'"),
        ({"codebook": None}, "quantization_config: codebook"),
        ({"opt_resid_scale": 0}, "opt_resid_scale is 0"),
        ({"opt_resid_scale": -2}, "opt_resid_scale is -2"),
    ):
        config = kept | {"quantization_config": kept["quantization_config"] | section}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            from_quip(folder, out)
    # As if the MLP's 128 had been 70.
    sizes = {"hidden_size": 32, "intermediate_size": 70}
    shutil.rmtree(folder)
    theirs(folder, "E8P12", sizes=SIZES | {"intermediate_size": 128}, use_rand=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | sizes))
    with pytest.raises(ValueError, match="mlp.* width 128 is 70 in config.json, padded to a power"):
        from_quip(folder, out)
    assert not out.exists()


def test_folders_without_their_layers_or_with_an_out(tmp_path: Path) -> None:
    theirs(tmp_path / "in", "E8P12")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists already"):
        from_quip(tmp_path / "in", tmp_path / "out")
    zoo.write(zoo.Line("llama", SIZES), tmp_path / "float")
    with pytest.raises(ValueError, match="is a float model"):
        from_quip(tmp_path / "float", tmp_path / "new")
