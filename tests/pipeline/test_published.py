"""--start-from FILE.pth: OmniQuant's parameters give the weights that OmniQuant makes of them."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import omniquant_layout as layout
import pytest
import quantized
import torch
import zoo

import lowbit
from lowbit.checkpoint import file_sha256
from lowbit.events import Warned
from lowbit.methods import PTQ161, OmniQuant
from lowbit.pipeline import RunOptions
from lowbit.pipeline.replay import Replay
from lowbit.pipeline.run import run

pytestmark = pytest.mark.slow

KEPT = TemporaryDirectory(prefix="lowbit-published-", ignore_cleanup_errors=True)
# Without grouped-query attention, for which OmniQuant learns no channel scales.
MHA = {k: v for k, v in zoo.GQA.items() if k != "num_key_value_heads"}
MODELS = {"llama": zoo.Line("llama", MHA), "opt": zoo.ZOO["opt"]}
BITS, GROUP, BLOCKS = 3, 16, range(2)
APPLIED: dict[str, Any] = {"bits": BITS, "group_size": GROUP, "let": True, "epochs": 0}
METHOD = OmniQuant(**APPLIED, rounding="nearest", init="minmax")
ROUNDED = METHOD.with_fields({"activation_bits": 4})


@cache
def source(name: str) -> Path:
    return quantized.add_tokenizer(zoo.write(MODELS[name], Path(KEPT.name) / name))


def learned(name: str, shift: bool = False, tied: bool = True) -> dict[int, Any]:
    """Parameters of all blocks, as OmniQuant has them in memory."""
    family, draw = layout.FAMILIES[name], torch.Generator().manual_seed(0)
    return {
        block: layout.parameters(
            layout.tensors_of(source(name), family, block),
            family,
            GROUP,
            shift,
            zoo.SIZES["num_attention_heads"],
            draw,
            tied,
        )
        for block in BLOCKS
    }


def saved(path: Path, parameters: Any) -> Path:
    torch.save(parameters, path)
    return path


CASES = {
    "llama": ("llama", METHOD, False),
    "llama, activations": ("llama", ROUNDED, False),
    "opt": ("opt", METHOD, False),
    "opt, activations and shifts": ("opt", ROUNDED, True),
}


@pytest.mark.parametrize("case", CASES)
def test_they_give_the_same_weights(tmp_path: Path, case: str) -> None:
    name, method, shift = CASES[case]
    parameters, family = learned(name, shift), layout.FAMILIES[name]
    path = saved(tmp_path / "omni_parameters.pth", parameters)
    job = Replay(source(name), method, RunOptions(start_from=path, device="cpu"), None)
    model, _ = lowbit.load(run(job, tmp_path / "out", lambda event: None))
    for block in BLOCKS:
        wanted = layout.quantized(
            layout.tensors_of(source(name), family, block),
            family,
            parameters[block],
            BITS,
            GROUP,
            qkt=method.activation_bits is not None,
        )
        inside = model.get_submodule(family.block.format(block).rstrip("."))
        found = dict(inside.state_dict())
        found |= {f"{n}.weight": inside.get_submodule(n).dequantize() for n in family.linears}
        for tensor, value in wanted.items():
            ours = found[tensor].float()
            # Scales are stored in float16, and a weight in the middle between two codes may go to
            # either.
            same = torch.isclose(ours, value, rtol=6e-4, atol=1e-6).float().mean()
            assert same > 0.998, (block, tensor, float(same))


def test_a_run_goes_on_from_them(tmp_path: Path) -> None:
    path = saved(tmp_path / "omni_parameters.pth", learned("opt"))
    method = METHOD.with_fields({"epochs": 1})
    out = quantized.quantize(source("opt"), tmp_path / "out", method, start_from=path)
    assert quantized.section(out)["made_by"]["start_from"] == file_sha256(path)


def test_scales_that_break_rotary_pairs_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "omni_parameters.pth", learned("llama", tied=False))
    events: list[Any] = []
    job = Replay(source("llama"), ROUNDED, RunOptions(start_from=path, device="cpu"), None)
    run(job, tmp_path / "out", events.append)
    [text] = [event.text for event in events if isinstance(event, Warned)]
    assert "model.layers.0: qkt_smooth_scale, and 1 more" in text and "geometric means" in text


def changed(**changes: Any) -> dict[int, Any]:
    parameters = learned("opt")
    parameters[1] |= changes
    return parameters


REFUSED: dict[str, tuple[Any, str]] = {
    "code": ({0: {"a": Path}}, "holds more than tensors, or is damaged"),
    "tensors of a model": ({"a.weight": torch.ones(2)}, "is no file of OmniQuant"),
    "blocks": ({0: {}, 2: {}}, "has the blocks 0, 2, but the model has 2, from 0 on"),
    "name": (
        lambda: changed(more=torch.ones(2)),
        "block 1: more is no parameter of OmniQuant",
    ),
    "linear": (
        lambda: changed(**{"fc9.weight_quantizer.upbound_factor": torch.ones(4, 1)}),
        "block 1: fc9.weight_quantizer.upbound_factor is about a linear that the model",
    ),
    "rows": (
        lambda: changed(**{"fc1.weight_quantizer.upbound_factor": torch.ones(7, 1)}),
        "has 7 values, but its linear has 80 rows",
    ),
    "channels": (
        lambda: changed(qkv_smooth_scale=torch.ones(7)),
        "has 7 values, but the model has 48 such channels",
    ),
    "signs": (lambda: changed(fc1_smooth_scale=-torch.ones(48)), "scales that are not positive"),
    "infinite": (lambda: changed(fc1_smooth_scale=torch.full((48,), torch.inf)), "not finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused(tmp_path: Path, name: str) -> None:
    parameters, message = REFUSED[name]
    path = saved(tmp_path / "a.pth", parameters() if callable(parameters) else parameters)
    with pytest.raises(ValueError, match=message):
        quantized.quantize(source("opt"), tmp_path / "out", METHOD, start_from=path)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", learned("opt", shift=True))
    for number, (method, message) in enumerate(
        (
            (PTQ161(), "which ptq161 does not learn: choose the method omniquant"),
            (METHOD, "shift.*which these settings do not learn"),
            (METHOD.with_fields({"group_size": 48}), "but these settings need"),
        )
    ):
        with pytest.raises(ValueError, match=message):
            quantized.quantize(source("opt"), tmp_path / str(number), method, start_from=path)
