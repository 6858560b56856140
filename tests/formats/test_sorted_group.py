"""The bytes of the docstring, integer sums that are exact, and results of one token by itself."""

import gc
import re
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit.formats import build, link
from lowbit.formats.sorted_group import (
    InputOrder,
    SortedGroupLayout,
    SortedGroupLinear,
    reference,
    tensor_bytes,
)
from lowbit.kernels.bits import pack

ENTRY: dict[str, Any] = {
    "format": "sorted_group",
    "shape": [3, 20],
    "bias": None,
    "bits": 4,
    "group_size": 8,
    "scale_dtype": "float16",
    "salient": 4,
    "salient_dtype": "float16",
    "activation": {"bits": 4, "symmetric": True, "group": 8},
    "permutation": "stored",
    "shares": None,
}


def layer(
    rows: int = 6,
    columns: int = 45,
    salient: int = 5,
    group_size: int | None = 16,
    bits: tuple[int, int | None] = (4, 4),
    seed: int = 0,
    salient_bits: int = 16,
    shares: str | None = None,
    **more: Any,
) -> SortedGroupLinear:
    """Random codes in a random order; bits: of weights and of inputs."""
    draw = torch.Generator().manual_seed(seed)
    kept = columns - salient
    codes = torch.randint(0, 2 ** bits[0], (rows, kept), generator=draw, dtype=torch.uint8)
    scale = torch.rand(rows, -(-kept // (group_size or kept)), generator=draw) + 0.1
    beside = torch.randn(rows, salient, generator=draw)
    order = InputOrder(torch.randperm(columns, generator=draw), salient, group_size, bits[1])
    return SortedGroupLinear.from_codes(
        codes,
        scale,
        beside,
        SortedGroupLayout(order, bits[0], salient_bits, shares),
        **more,
    )


def inputs(columns: int = 45, tokens: int = 7) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(tokens, columns, generator=draw) * torch.rand(columns, generator=draw) * 9


def by_the_docstring(state: dict[str, Tensor], entry: dict[str, Any], x: Tensor) -> Tensor:
    """One token through a layer, number by number from the bytes."""
    rows, columns = entry["shape"]
    kept, size = columns - entry["salient"], entry["group_size"]
    x = x.double()[state["permutation"].long()]
    top = 2 ** (entry["activation"]["bits"] - 1) - 1
    y = torch.zeros(rows, dtype=torch.float64)
    for row in range(rows):
        stream = int.from_bytes(state["packed"][row].numpy().tobytes(), "little")
        for group, start in enumerate(range(0, kept, size)):
            places = range(start, min(start + size, kept))
            scale_x = float(x[places.start : places.stop].float().abs().max() / top)
            total = 0
            for j in places:
                code = (stream >> (j * entry["bits"])) % 2 ** entry["bits"]
                q = round(float(x[j].float() / scale_x))
                total += q * (code - 2 ** (entry["bits"] - 1))
            y[row] += scale_x * float(state["scale"][row, group]) * total
        weights = state["salient"][row].double()
        if entry["salient_dtype"] == "int8":
            weights = weights * float(state["salient_scale"][row])
        y[row] += float((x[kept:] * weights).sum())
    return y + state["bias"].double()


@pytest.mark.parametrize("salient_bits", [16, 8])
@pytest.mark.parametrize("bits", [(4, 4), (3, 6)], ids=str)
def test_a_reader_written_from_the_docstring(bits: tuple[int, int], salient_bits: int) -> None:
    made = layer(bits=bits, salient_bits=salient_bits, bias=torch.randn(6))
    x = inputs()
    wanted = [by_the_docstring(made.state_dict(), made.entry(), token) for token in x]
    torch.testing.assert_close(made(x).double(), torch.stack(wanted), rtol=1e-5, atol=1e-4)


def test_the_sums_are_integers() -> None:
    """Bit for bit what int64 gives; only the scales are rounded."""
    made = layer(salient=0, columns=40)
    x = inputs(40)
    codes, scale = reference.quantize_input(x[:, made.permutation.int()], 4, 16)
    assert torch.equal(codes, codes.round()) and codes.abs().max() == 7
    weights = made.codes().long() - 8
    y = torch.zeros(len(x), 6)
    for group, start in enumerate(range(0, 40, 16)):
        places = slice(start, start + 16)
        sums = (codes[:, places].long() @ weights[:, places].T).float()
        y += sums * scale[:, group, None] * made.scale[:, group].float()
    assert torch.equal(made(x), y)


def test_sums_beyond_float32_are_exact_too() -> None:
    """A whole row at 8 bits by 8: an odd sum above 2**24 has no float32."""
    size = 2001
    assert reference.exact_dtype(8, 8, 1024) == torch.float32
    assert reference.exact_dtype(8, 8, size) == torch.float64
    inputs_of, weights = (torch.full((1, size), 127.0).to(torch.float64) for _ in range(2))
    sums = reference.group_sums(inputs_of, weights, None)
    found = reference.total(sums, *(torch.ones(1, 1, dtype=torch.float64) for _ in range(2)))
    assert found.item() == 127 * 127 * size > 2**24


def test_autocast_leaves_the_sums_exact() -> None:
    """Sums of 1000 products of 8 bits are beyond bfloat16's integers, and beyond all of float16."""
    made, x = layer(salient=0, columns=2000, group_size=1000, bits=(8, 8)), inputs(2000)
    wanted = made(x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(made(x), wanted)


def test_an_input_that_needs_no_work_is_not_kept() -> None:
    made = SortedGroupLinear.from_grid(
        torch.ones(2, 8), torch.ones(2, 1), SortedGroupLayout(InputOrder(None, 0, None, None), 4)
    )
    x = torch.ones(3, 8)
    held = weakref.ref(x)
    made(x)
    gc.disable()
    try:
        del x
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("bits", [(4, 4), (8, 8)], ids=str)
def test_gradients_pass_through_the_rounding(bits: tuple[int, int]) -> None:
    """To all inputs but the largest of a group, which moves the group's scale too."""
    made, x = layer(bits=bits), inputs().double().requires_grad_()
    target = inputs(6).double()
    (found,) = torch.autograd.grad((made(x) * target).sum(), x)
    weight = made.dequantize().double()
    passed = torch.ones_like(x, dtype=torch.bool)
    for group in made.permutation[:40].long().split(16):
        passed.scatter_(1, group[x[:, group].abs().argmax(1, keepdim=True)], False)
    torch.testing.assert_close(found[passed], (target @ weight)[passed], rtol=1e-4, atol=1e-3)
    fake = made.quantized_input(x) @ weight.T
    (wanted,) = torch.autograd.grad((fake * target).sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_tokens_do_not_see_each_other() -> None:
    """Bit for bit: all at once, one by one, in another shape, behind other tokens."""
    made = layer(rows=33, columns=70, salient=0)
    x = inputs(70, 12)
    whole = made(x)
    assert torch.equal(whole, torch.cat([made(token[None]) for token in x]))
    assert torch.equal(whole, made(x.view(3, 4, 70)).view(12, 33))
    assert torch.equal(whole[:5], made(torch.cat([x[:5], 1000 * x[5:]]))[:5])
    assert torch.equal(made(x[0]), whole[0])


def test_tokens_do_not_see_each_other_with_salient_channels() -> None:
    """To the rounding of a float product, whose order of additions BLAS chooses."""
    made = layer(rows=33, columns=70, salient=9)
    x = inputs(70, 12)
    singly = torch.cat([made(token[None]) for token in x])
    torch.testing.assert_close(made(x), singly, rtol=1e-6, atol=1e-5)


def test_the_input_stays_as_it_is() -> None:
    made, x = layer(), inputs()
    before = x.clone()
    made(x)
    made.quantized_input(x)
    assert torch.equal(x, before)


def test_zeros_and_nothing() -> None:
    made = layer(bias=torch.randn(6))
    assert torch.equal(made(torch.zeros(2, 45)), made.bias.expand(2, 6))
    assert made(torch.zeros(0, 45)).shape == (0, 6)
    # A group of zeros among others, as padding makes them.
    x = inputs(tokens=1)
    x[:, made.permutation[:16].int()] = 0
    assert made(x).isfinite().all()


def test_inputs_that_are_not_rounded() -> None:
    made, x = layer(bits=(4, None)), inputs()
    assert torch.equal(made.quantized_input(x), x)
    torch.testing.assert_close(made(x), x @ made.dequantize().T, rtol=1e-5, atol=1e-4)


def test_rounding_of_inputs_is_within_half_a_step() -> None:
    made, x = layer(), inputs()
    seen = made.quantized_input(x)
    order = made.permutation.int()
    stays = order[40:]
    assert torch.equal(seen[:, stays], x[:, stays])
    for start in range(0, 40, 16):
        group = order[start : min(start + 16, 40)]
        step = x[:, group].abs().amax(1, keepdim=True) / 7
        assert ((seen - x)[:, group].abs() <= step / 2 * 1.0001).all()
    assert not torch.equal(seen, x)


def test_float64_all_the_way() -> None:
    made, x = layer(), inputs().double()
    y = made(x)
    wanted = made.quantized_input(x) @ made.dequantize().double().T
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)


def members(**differing: Any) -> dict[str, SortedGroupLinear]:
    return {"q": layer(), "k": layer(seed=2, shares="q", **differing)}


def test_a_permutation_is_stored_once_and_applied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = members()
    link(layers)
    q, k = layers["q"], layers["k"]
    assert k.permutation is None and "permutation" not in k.state_dict()
    alone = build(k.entry() | {"shares": None})
    alone.load_state_dict(k.state_dict() | {"permutation": q.permutation})
    calls = []
    plain = SortedGroupLinear.prepare

    def prepare(self: SortedGroupLinear, x: Tensor) -> Tensor:
        calls.append(self)
        return plain(self, x)

    monkeypatch.setattr(SortedGroupLinear, "prepare", prepare)
    x = inputs()
    found = q(x), k(x)
    assert calls == [q]
    assert torch.equal(found[1], alone(x))
    assert torch.equal(k.dequantize(), alone.dequantize())
    assert torch.equal(k.quantized_input(x), alone.quantized_input(x))


@pytest.mark.parametrize(
    ("differing", "key"),
    [
        ({"group_size": 8}, "group_size"),
        ({"salient": 4}, "salient"),
        ({"bits": (4, 8)}, "activation"),
    ],
    ids=str,
)
def test_only_like_layers_share(differing: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f"layer k: {key} is .* in q, with which it shares"):
        link(members(**differing))


@pytest.mark.parametrize("bits", [(4, 4), (4, None)], ids=str)
def test_compiles_whole(bits: tuple[int, int | None]) -> None:
    torch._dynamo.reset()
    layers = {"q": layer(bits=bits), "k": layer(bits=bits, shares="q")}
    link(layers)
    x = inputs()
    for made in layers.values():
        compiled = torch.compile(made, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), made(x))


def test_too_many_inputs_are_refused() -> None:
    """The order would pick some of them."""
    with pytest.raises(ValueError, match=r"x is \(7, 46\): this layer takes \(7, 45\)"):
        layer()(inputs(46))


def test_a_member_needs_its_owner() -> None:
    with pytest.raises(ValueError, match="uses tensors of q but was not linked"):
        members()["k"](inputs())


def salient_of(layer: SortedGroupLinear) -> Tensor:
    return reference.salient_weight(*layer.salient_tensors())


def test_salient_weights_as_they_are_stored() -> None:
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    order = InputOrder(torch.arange(12).flip(0), 4, 4, 4)

    def made(weight: Tensor, bits: int) -> SortedGroupLinear:
        layout = SortedGroupLayout(order, 4, bits)
        return SortedGroupLinear.from_grid(weight, torch.full((4, 2), 0.5), layout)

    half, whole, codes = made(weight, 16), made(weight * 1e5, 16), made(weight, 8)
    assert [x.entry()["salient_dtype"] for x in (half, whole, codes)] == [
        *("float16", "float32", "int8"),
    ]
    assert torch.equal(salient_of(half), weight[:, 8:].half().float())
    assert torch.equal(salient_of(whole), weight[:, 8:] * 1e5)
    step = weight[:, 8:].abs().amax(1, keepdim=True) / 127
    assert ((salient_of(codes) - weight[:, 8:]).abs() <= step * 0.51).all()
    assert codes.weight_bytes() == half.weight_bytes() - 4 * 4 + 4 * 2
    # In the model's order, columns are where their inputs are.
    assert torch.equal(half.dequantize().flip(1)[:, 8:], salient_of(half))
    with pytest.raises(ValueError, match="salient_bits is 4: allowed are 8 and 16"):
        made(weight, 4)


# A Llama-2-7B, bits a weight of its linears; the specification counts a permutation for each
# linear, 0.001 bits more.
LLAMA_7B = {
    (0.0, 32): 4.503,
    (0.0, 128): 4.128,
    (0.01, 64): 4.373,
    (0.05, 128): 4.724,
    (0.05, 1024): 4.619,
    (0.1, 32): 5.656,
}


@pytest.mark.parametrize(("ratio", "group_size"), LLAMA_7B)
def test_bits_of_a_large_model(ratio: float, group_size: int) -> None:
    hidden, inner = 4096, 11008
    shapes = [(hidden, hidden, "q", 3), (hidden, hidden, None, 1)]
    shapes += [(inner, hidden, "gate", 2), (hidden, inner, None, 1)]
    total = weights = 0
    for rows, columns, owner, count in shapes:
        for number in range(count):
            total += tensor_bytes(
                (rows, columns),
                bits=4,
                group_size=group_size,
                scale_dtype="float16",
                salient=round(ratio * columns),
                salient_dtype="float16",
                permutation="stored",
                shares=owner if number else None,
            )
            weights += rows * columns
    assert 8 * total / weights == pytest.approx(LLAMA_7B[ratio, group_size], abs=0.0025)


def test_many_inputs_have_wide_numbers() -> None:
    for columns, dtype in ((32768, torch.int16), (32769, torch.int32)):
        with torch.device("meta"):
            made = build(ENTRY | {"shape": [1, columns]})
        assert made.permutation.dtype == dtype


def test_the_order_must_be_a_permutation() -> None:
    layout = SortedGroupLayout(InputOrder(torch.tensor([0, 1, 1, 3]), 0, 4, 4), 4)
    with pytest.raises(ValueError, match="permutation is not a permutation of the 4 inputs"):
        SortedGroupLinear.from_grid(torch.ones(2, 4), torch.ones(2, 1), layout)
    made = layer()
    made.permutation[3] = made.permutation[4]
    with pytest.raises(ValueError, match="permutation is not a permutation of the 45 inputs"):
        made.dequantize()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"salient": 20}, "salient is 20: allowed with 20 inputs are 0 to 19"),
        ({"salient": -1}, "salient"),
        ({"salient_dtype": "int4"}, "salient_dtype"),
        ({"activation": {"bits": 4, "symmetric": True, "group": 4}}, "activation.group is 4"),
        ({"activation": {"bits": 4, "symmetric": False, "group": 8}}, "symmetric"),
        ({"activation": {"bits": 4, "symmetric": True}}, "group"),
        ({"permutation": "sorted"}, "permutation"),
        ({"shares": ""}, "shares"),
        (
            {"shape": [2**31 - 1] * 2, "salient_dtype": "float32", "salient": 2**31 - 2},
            "below 2\\*\\*63 bytes",
        ),
        ({"grup_size": 8}, "did you mean 'group_size'"),
    ],
    ids=lambda value: re.sub(r"\W+", " ", str(value))[:40],
)
def test_entries_that_cannot_be(change: dict[str, Any], message: str) -> None:
    build(ENTRY)
    with pytest.raises(ValueError, match=message):
        build(ENTRY | change)


def test_a_damaged_shape_is_named() -> None:
    layout = SortedGroupLayout(InputOrder(None, 0, 4, 4), 4)
    with pytest.raises(ValueError, match=r"scale is \(2, 3\): this layer takes \(2, 2\)"):
        SortedGroupLinear.from_grid(torch.ones(2, 8), torch.ones(2, 3), layout)


def test_half_a_byte_for_each_code() -> None:
    codes = torch.tensor([[1, 15, 8, 7]], dtype=torch.uint8)
    made = SortedGroupLinear.from_codes(
        codes, torch.ones(1, 1), torch.empty(1, 0), SortedGroupLayout(InputOrder(None, 0, 4, 4), 4)
    )
    assert made.packed.tolist() == [[0xF1, 0x78]] == pack(codes, 4).tolist()
    assert made.dequantize().tolist() == [[-7, 7, 0, -1]]
