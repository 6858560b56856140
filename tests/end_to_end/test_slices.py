"""One folder of 8-bit codes, run at every width and loaded as each of its slices."""

from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
import zoo

import lowbit
from lowbit.formats.nested import NestedLinear

pytestmark = pytest.mark.slow

WIDTHS = (8, 6, 4, 3, 2)
FAMILIES = ["llama", "opt", "mixtral", "falcon 40b"]


def layers(model: Any) -> dict[str, NestedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, NestedLinear)}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_slice_that_is_loaded_is_the_master_at_its_width(name: str) -> None:
    whole, _ = lowbit.load(quantized.master(name))
    seen = []
    for bits in WIDTHS:
        lowbit.set_bits(whole, bits)
        sliced, _ = lowbit.load(quantized.master(name), bits=bits)
        assert torch.equal(quantized.logits(sliced), quantized.logits(whole))
        for layer in layers(sliced).values():
            assert layer.entry()["resident"] == "slice" and layer.bits == bits
            assert "master" not in dict(layer.named_parameters())
            assert layer.packed.shape[1] == -(-layer.in_features * bits // 8)
        seen.append(quantized.logits(whole))
    exact, _ = lowbit.load(quantized.source(name))
    # 8, 4 and 2 bits: 3 and 2 are near enough for a router to turn them round.
    errors = [zoo.error(logits, quantized.logits(exact)) for logits in seen[::2]]
    assert all(less < more for less, more in zip(errors, errors[1:], strict=False))


def test_extra_precision() -> None:
    whole, _ = lowbit.load(quantized.master(extra_precision=True))
    lowbit.set_bits(whole, 2)
    sliced, _ = lowbit.load(quantized.master(extra_precision=True), bits=2)
    assert torch.equal(quantized.logits(sliced), quantized.logits(whole))
    assert any(int(layer.codes().max()) == 4 for layer in layers(sliced).values())
    plain, _ = lowbit.load(quantized.master(), bits=2)
    assert not torch.equal(quantized.logits(plain), quantized.logits(sliced))


def test_a_width_for_each_layer(tmp_path: Path) -> None:
    plan = {"mlp.*": 4, "down_proj": 2, "model.layers.1.self_attn.q_proj": 3}
    (tmp_path / "plan.yaml").write_text("\n".join(f'"{k}": {v}' for k, v in plan.items()))
    wanted, _ = lowbit.load(quantized.master())
    lowbit.set_bits(wanted, plan)
    for bits in (plan, tmp_path / "plan.yaml"):
        model, _ = lowbit.load(quantized.master(), bits=bits)
        widths = {name.removeprefix("model."): layer.bits for name, layer in layers(model).items()}
        assert widths["layers.0.mlp.up_proj"] == 4 and widths["layers.0.mlp.down_proj"] == 2
        assert widths["layers.1.self_attn.q_proj"] == 3 and widths["layers.0.self_attn.q_proj"] == 8
        assert torch.equal(quantized.logits(model), quantized.logits(wanted))


def test_plans_name_layers_as_the_folder_does() -> None:
    """Where names in memory differ: `load` and `set_bits` take the same widths by name."""
    plan = {"block_sparse_moe.experts.*": 2, "block_sparse_moe.experts.1.w1": 3}
    model, _ = lowbit.load(quantized.master("mixtral"))
    assert not any("block_sparse_moe" in name for name in layers(model))
    lowbit.set_bits(model, plan)
    assert sorted({layer.bits for layer in layers(model).values()}) == [2, 3, 8]
    sliced, _ = lowbit.load(quantized.master("mixtral"), bits=plan)
    assert torch.equal(quantized.logits(sliced), quantized.logits(model))


def test_what_is_not_nested_stays_as_it_is() -> None:
    model, _ = lowbit.load(quantized.master(scope="ffn"), bits=2)
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")}
    assert kinds == {"NestedLinear", "UniformLinear"} and set(layers(model).values())
    assert {layer.bits for layer in layers(model).values()} == {2}


def test_only_the_slice_stays_in_memory() -> None:
    whole, sliced = (lowbit.load(quantized.master(), bits=bits)[0] for bits in (None, 2))
    sizes = [sum(layer.weight_bytes() for layer in layers(m).values()) for m in (whole, sliced)]
    assert sizes[1] < 0.5 * sizes[0]
    with pytest.raises(
        ValueError, match=r"layer .*holds a slice of 2 bits: .*load the master again"
    ):
        lowbit.set_bits(sliced, 4)


@pytest.mark.parametrize(
    ("bits", "options", "message"),
    [
        (9, {}, "bits is 9: allowed are 2 to 8"),
        ({"q_prj": 4}, {}, "'q_prj' matches no nested layer"),
        (4, {"device_map": {"": "disk"}}, "slices are cut in memory"),
    ],
    ids=str,
)
def test_slices_that_cannot_be(bits: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowbit.load(quantized.master(), bits=bits, **options)


def test_other_folders_have_no_widths() -> None:
    with pytest.raises(ValueError, match="only layers made by matquant have several widths"):
        lowbit.load(quantized.folder(), bits=4)
    with pytest.raises(ValueError, match="is a float model: bits is for"):
        lowbit.load(quantized.source(), bits=4)


@pytest.mark.gpu
def test_a_gpu_never_holds_the_master() -> None:
    wanted = quantized.logits(lowbit.load(quantized.master(), bits=2)[0])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model, _ = lowbit.load(quantized.master(), bits=2, device_map="cuda:0", dtype=torch.float32)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    held = torch.cuda.memory_allocated() - before
    assert torch.cuda.max_memory_allocated() - before < 1.1 * held
    assert zoo.error(quantized.logits(model).cpu(), wanted) < 1e-3
