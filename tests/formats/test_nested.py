import json
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.formats import build
from lowbit.formats.nested import NestedLayout, NestedLinear, SliceGrid, sliced_entry, to_uniform

WIDTHS = range(2, 9)
every_width = pytest.mark.parametrize("bits", WIDTHS)
every_kind = pytest.mark.parametrize(
    ("symmetric", "extra_precision"), [(False, False), (True, False), (False, True)]
)


def master(
    rows: int = 9,
    columns: int = 37,
    group_size: int | None = 8,
    symmetric: bool = False,
    extra_precision: bool = False,
    scale: float = 1.0,
    own_grids: tuple[int, ...] = (3, 2),
    **more: Any,
) -> NestedLinear:
    """Random codes, all of them if there is room."""
    draw = torch.Generator().manual_seed(rows + columns)
    groups = 1 if group_size is None else -(-columns // group_size)

    def grid() -> SliceGrid:
        scales = (torch.rand(rows, groups, generator=draw) + 0.1) * scale
        zeros = torch.randint(0, 256, (rows, groups), generator=draw, dtype=torch.uint8)
        return SliceGrid(scales, None if symmetric else zeros)

    codes = torch.randint(0, 256, (rows, columns), generator=draw, dtype=torch.uint8)
    whole, own = grid(), {width: grid() for width in own_grids}
    layout = NestedLayout(group_size, extra_precision)
    return NestedLinear.from_codes(codes, whole.scale, whole.zero, layout, own=own, **more)


def by_numpy(layer: NestedLinear, bits: int) -> np.ndarray:
    """The slice of a master, from its docstring, in integers and float64."""
    spec, step = layer.spec, 2 ** (8 - bits)
    codes = np.floor(layer.master.numpy().astype(float) / step + 0.5)
    if not spec.extra_precision:
        codes = np.minimum(codes, 2**bits - 1)
    if bits == 8:
        codes = layer.master.numpy().astype(float)
    size = spec.group_size or layer.in_features
    group = np.arange(layer.in_features) // size
    scale, zero = layer.scale, layer.zero
    if bits in spec.own_grids:
        at = spec.own_grids.index(bits)
        scale, zero = layer.slice_scale[at], None if layer.zero is None else layer.slice_zero[at]
    zeros = np.full(scale.shape, 128.0) if zero is None else zero.T.numpy()
    return scale.double().numpy()[:, group] * (codes * step - zeros[:, group])


@every_width
@every_kind
@pytest.mark.parametrize("group_size", [8, None])
def test_every_slice_is_the_one_that_numpy_cuts(
    bits: int, symmetric: bool, extra_precision: bool, group_size: int | None
) -> None:
    layer = master(group_size=group_size, symmetric=symmetric, extra_precision=extra_precision)
    wanted = torch.from_numpy(by_numpy(layer, bits)).float()
    layer.set_bits(bits)
    assert layer.bits == layer.entry()["bits"] == bits
    assert torch.equal(layer.dequantize(), wanted)
    sliced = layer.slice(bits)
    assert torch.equal(sliced.dequantize(), wanted)
    rebuilt = build(json.loads(json.dumps(sliced.entry())))
    rebuilt.load_state_dict(sliced.state_dict())
    assert torch.equal(rebuilt.dequantize(), wanted)


def test_each_width_gives_other_weights() -> None:
    layer = master()
    weights = [layer.at(bits).dequantize() for bits in WIDTHS]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    assert layer.bits == 8  # `at` leaves it alone


@every_width
def test_zero_is_zero_at_every_width_of_a_symmetric_layer(bits: int) -> None:
    layer = master(symmetric=True)
    layer.set_bits(bits)
    weight, at_zero = layer.dequantize(), layer.master == 128
    assert int(at_zero.sum()) > 0 and not weight[at_zero].any()
    # Slices keep their negative values: codes are counted from 128, not from 0.
    assert (weight < 0).float().mean() > 0.3


@every_width
@every_kind
def test_a_slice_holds_its_own_bits_and_no_more(
    bits: int, symmetric: bool, extra_precision: bool
) -> None:
    layer = master(64, 96, 32, symmetric, extra_precision)
    sliced = layer.slice(bits)
    tensors = dict(sliced.named_parameters())
    assert "master" not in tensors and tensors["packed"].shape == (64, 12 * bits)
    beside = 64 * 3 * 2 + (0 if symmetric else 64 * 3)
    top = int((layer.at(bits).codes() >= 2**bits - 1).sum())
    overflow = -(-top // 8) if extra_precision and bits < 8 else 0
    assert sliced.weight_bytes() == 64 * 12 * bits + beside + overflow
    assert ("overflow" in tensors) == (extra_precision and bits < 8)


def test_extra_precision_uses_its_level() -> None:
    layer = master(extra_precision=True)
    above = layer.master >= 224
    assert (layer.at(2).codes() == 4).equal(above) and bool(above.any())
    assert (layer.slice(2).codes() == 4).equal(above)
    assert int(master().at(2).codes().max()) == 3


@every_width
@every_kind
def test_in_the_uniform_format_to_the_last_bit(
    bits: int, symmetric: bool, extra_precision: bool
) -> None:
    layer = master(symmetric=symmetric, extra_precision=extra_precision, bias=torch.randn(9))
    layer.master[0, 0] = 255
    if extra_precision:
        if bits < 8:
            message = (
                rf"weights have the code {2**bits} .* holds codes of 0 to {2**bits - 1} at {bits}"
            )
            with pytest.raises(ValueError, match=message):
                to_uniform(layer, bits)
        layer.master.clamp_(max=255 - 2 ** (8 - bits))  # nothing is above then
    uniform = to_uniform(layer, bits)
    assert uniform.entry()["zero_shift"] == (0 if symmetric else 8 - bits)
    assert torch.equal(uniform.dequantize(), layer.at(bits).dequantize())
    assert uniform.bias is not None and torch.equal(uniform.bias, layer.bias)
    assert torch.equal(to_uniform(layer.slice(bits), bits).dequantize(), uniform.dequantize())


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1.0, "float16"), (2000, "float32"), (1e-6, "float32")]
)
def test_scales_of_a_uniform_slice_are_exact(scale: float, dtype: str) -> None:
    """float16 where it can hold step times the scale; float32 scales are not rounded to it."""
    layer = master(scale=scale)
    layer.scale[0] = layer.scale[0] * 1.001
    uniform = to_uniform(layer, 2)
    assert uniform.entry()["scale_dtype"] == dtype
    assert torch.equal(uniform.dequantize(), layer.at(2).dequantize())


def test_the_nearest_codes_are_counted_from_the_stored_scale() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 20, generator=draw)
    scale = torch.rand(6, 2, generator=draw) * 0.02 + 0.02
    layer = NestedLinear.from_grid(weight, scale, torch.full((6, 2), 120.4), NestedLayout(10))
    assert layer.scale.dtype == torch.float16 and (layer.zeros() == 120).all()
    steps = layer.scale.float().repeat_interleave(10, 1)
    inside = (layer.master > 0) & (layer.master < 255)
    error = (layer.dequantize() - weight).abs()[inside]
    assert (error <= steps[inside] / 2 * 1.0001).all() and inside.float().mean() > 0.9


def test_another_width_shares_the_tensors() -> None:
    layer = master(bias=torch.ones(9))
    narrow = layer.at(4)
    assert narrow.master is layer.master and (narrow.bits, layer.bits) == (4, 8)
    x = torch.randn(2, 37)
    assert torch.equal(narrow(x), layer.slice(4)(x)) and not torch.equal(narrow(x), layer(x))


def test_slices_stand_for_the_same_weight() -> None:
    layer = master(dtype=torch.bfloat16)
    assert layer.slice(4).entry()["dtype"] == "bfloat16"
    assert to_uniform(layer, 4).entry()["dtype"] == "bfloat16"
    assert "dtype" not in to_uniform(master(), 4).entry()


def test_slices_with_an_overflow_multiply_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile begins where the tiles before have used up the overflow."""
    monkeypatch.setattr("lowbit.formats.tiles.WEIGHTS_ON_CPU", 2 * 37)
    layer = master(extra_precision=True)
    for bits in (2, 5, 7):
        sliced = layer.slice(bits)
        x = torch.randn(3, 37)
        with torch.no_grad():
            wanted = x @ sliced.dequantize().T
            torch.testing.assert_close(sliced(x), wanted, rtol=1e-5, atol=1e-3)
            assert torch.equal(sliced(x), layer.at(bits)(x))
        before = sliced._repacked.of(sliced, sliced.backends[-1])["before"]
        top = (layer.at(bits).codes() >= 2**bits - 1).sum(1)
        assert before.tolist() == [int(top[:row].sum()) for row in range(9)]


def entry(**changes: Any) -> dict[str, Any]:
    return master().entry() | changes


SLICE = {"resident": "slice", "extra_precision": True, "bits": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": 9}, "bits"),
        ({"resident": "both"}, "resident"),
        ({"trained": [9]}, "trained"),
        ({"top_codes": 3}, "top_codes is 3: .*null otherwise"),
        (SLICE, "top_codes is None: it must be a number for slices below 8 bits"),
        (SLICE | {"top_codes": -1}, "top_codes"),
        (SLICE | {"top_codes": 10**6}, "top_codes is 1000000: there are 333 codes"),
        ({"shape": [2**31 - 1, 2**31 - 1], "group_size": 1}, "allowed are layers below"),
        ({"extra": 1}, "'extra' is not a field"),
    ],
    ids=str,
)
def test_entries_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(entry(**changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: master().set_bits(9), "bits is 9: allowed are 2 to 8"),
        (lambda: master().slice(4).set_bits(2), "holds a slice of 4 bits: allowed is 4; .*2 bits"),
        (lambda: master().slice(4).slice(2), "slice of 4 bits: a slice of 2 bits"),
        (
            lambda: sliced_entry(entry(extra_precision=True), 4),
            "needs the master's codes",
        ),
        (
            lambda: NestedLinear.from_codes(
                torch.zeros(2, 2).byte(),
                torch.ones(2, 1),
                torch.ones(1, 2).byte(),
                NestedLayout(None),
            ),
            r"zero is \(1, 2\): this layer takes \(2, 1\)",
        ),
        (
            lambda: NestedLinear.from_codes(
                torch.zeros(2, 2), torch.ones(2, 1), None, NestedLayout(None)
            ),
            "master is torch.float32: allowed is torch.uint8",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
