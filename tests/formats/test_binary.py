"""The binary format: against a reader of the docstring, both ways to multiply, what is refused."""

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.formats import build, link, use_backend
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.binary import BinaryLinear, Salient, lookup, reference, tensor_bytes
from lowbit.formats.binary.lookup import signed_sums, weighted_sums
from lowbit.formats.binary.weight import Weight
from lowbit.formats.native import NativeBackend
from lowbit.kernels.bits import pack
from lowbit.kernels.native import why_not

ENTRY: dict[str, Any] = {
    "format": "binary",
    "shape": [6, 40],
    "bias": "float16",
    "salient": 8,
    "row_mean": True,
    "column_scale": True,
    "scale_dtype": "float16",
    "shares": None,
}
LLAMA_7B = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
LLAMA_7B |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
OWNERS = {"k": "q", "v": "q", "up": "gate"}


def made(rows: int, columns: int, salient: int = 0, seed: int = 0, **options: Any) -> BinaryLinear:
    """Random bits, codes and scales; mean and column: whether there are any."""
    draw = torch.Generator().manual_seed(seed)
    size = options.pop("size", 1.0)
    mean, column = options.pop("mean", True), options.pop("column", True)

    def positive(count: int) -> Tensor:
        return torch.rand(count, generator=draw) + 0.1

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 16, shape, generator=draw, dtype=torch.uint8)

    plain = columns - salient
    channels = torch.randperm(columns, generator=draw)[:salient].sort().values
    part = Salient(channels, codes(rows, salient), positive(rows) * size, codes(rows))
    return BinaryLinear.from_parts(
        torch.rand(rows, plain, generator=draw) < 0.5,
        positive(rows) * size,
        row_mean=torch.randn(rows, generator=draw) * size if mean else None,
        column_scale=positive(plain) if column else None,
        salient=part if salient else None,
        **options,
    )


def by_the_docstring(entry: dict[str, Any], tensors: dict[str, bytes]) -> numpy.ndarray:
    """A reader written from the module's docstring alone, in Python's integers and float64."""
    rows, columns = entry["shape"]
    plain = columns - entry["salient"]

    def number(name: str, width: int, per_row: int, row: int, j: int) -> int:
        row_bytes = (per_row * width + 7) // 8
        stream = int.from_bytes(tensors[name][row * row_bytes : (row + 1) * row_bytes], "little")
        return (stream >> (j * width)) % 2**width

    def floats(name: str) -> numpy.ndarray:
        scale_type = {"float16": "<f2", "float32": "<f4"}[entry["scale_dtype"]]
        return numpy.frombuffer(tensors[name], scale_type).astype(float)

    row = floats("row_scale")
    mean = floats("row_mean") if entry["row_mean"] else numpy.zeros(rows)
    column = floats("column_scale") if entry["column_scale"] else numpy.ones(plain)
    weight = numpy.empty((rows, columns))
    for i in range(rows):
        before = 0  # salient channels passed
        for j in range(columns):
            if entry["salient"] and number("mask", 1, columns, 0, j):
                code = number("salient", 4, entry["salient"], i, before)
                zero = number("salient_zero", 4, rows, 0, i)
                weight[i, j] = floats("salient_scale")[i] * (code - zero)
                before += 1
            else:
                sign = -1 if number("sign", 1, plain, i, j - before) else 1
                weight[i, j] = column[j - before] * (mean[i] + sign * row[i])
    return weight


@st.composite
def layers(draw: st.DrawFn) -> BinaryLinear:
    columns = draw(st.integers(1, 27))
    return made(
        draw(st.integers(1, 9)),
        columns,
        draw(st.integers(0, columns - 1)),
        draw(st.integers(0, 99)),
        mean=draw(st.booleans()),
        column=draw(st.booleans()),
        size=draw(st.sampled_from([1.0, 1e-3, 1e-8])),
    )


@settings(max_examples=60, deadline=None)
@given(layers())
def test_read_as_the_docstring_says(layer: BinaryLinear) -> None:
    tensors = {n: p.detach().numpy().tobytes() for n, p in layer.named_parameters()}
    wanted = by_the_docstring(layer.entry(), tensors)
    numpy.testing.assert_allclose(layer.dequantize().numpy(), wanted, rtol=1e-6, atol=1e-30)


@settings(max_examples=40, deadline=None)
@given(layers(), st.integers(1, 9))
def test_both_ways_to_multiply_agree(layer: BinaryLinear, tokens: int) -> None:
    x = torch.randn(tokens, layer.in_features, generator=torch.Generator().manual_seed(tokens))
    wanted = x.double() @ layer.dequantize().double().T
    size = (x.abs() @ layer.dequantize().abs().T).double()
    means = layer.ordered().abs().amax() * x.abs().sum(1, keepdim=True)  # they cancel
    for backend in ("lookup", "reference"):
        with pytest.MonkeyPatch.context() as patch, use_backend(backend):
            patch.setattr(lookup, "MOST_TOKENS", 99)
            found = layer(x)
        assert ((found - wanted).abs() <= 1e-5 * (size + means)).all()


@pytest.mark.parametrize("tokens", [1, 4, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_any_number_of_tokens_in_any_dtype(tokens: int, dtype: torch.dtype) -> None:
    layer = made(12, 50, 10, bias=torch.randn(12))
    x = torch.randn(tokens, 1, 50).to(dtype)
    wanted = x.double() @ layer.dequantize().double().T + layer.bias.double()  # type: ignore[union-attr]
    found = layer(x)
    assert found.dtype == dtype and found.shape == (tokens, 1, 12)
    close = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(found.double(), wanted, rtol=close, atol=10 * close)


def test_few_tokens_are_looked_up_and_many_are_not() -> None:
    layer = made(4, 16, 4)
    names = [layer.backend_for(n).name for n in (1, lookup.MOST_TOKENS, 5)]
    assert names == ["lookup", "lookup", "reference"]
    assert layer.backend_for(1, dtype=torch.float64).name == "reference"


def test_half_precision_on_a_gpu_multiplies_by_the_weight() -> None:
    with torch.device("meta"):
        layer = build(ENTRY)
    for dtype, name in ((torch.float16, "weight"), (torch.float32, "reference")):
        assert layer.backend_for(9, dtype=dtype, device="cuda").name == name
    small = made(6, 20, 5)
    x = torch.randn(7, 20)
    found = Weight().multiply(small, {}, small.prepare(x))
    torch.testing.assert_close(found, x @ small.dequantize().T)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 24])
def test_looked_up_sums(count: int) -> None:
    bits = torch.randint(0, 2, (5, count), dtype=torch.uint8)
    codes = torch.randint(0, 16, (5, count), dtype=torch.uint8)
    x = torch.randn(3, count)
    torch.testing.assert_close(signed_sums(pack(bits, 1), x), x @ (1 - 2 * bits.float()).T)
    torch.testing.assert_close(weighted_sums(pack(codes, 4), x), x @ codes.float().T)


def test_gradients_reach_the_input() -> None:
    layer = made(6, 20, 5)
    for tokens in (2, 30):
        x = torch.randn(tokens, 20, requires_grad=True)
        layer(x).sum().backward()
        wanted = layer.dequantize().sum(0).expand(tokens, -1)
        torch.testing.assert_close(x.grad, wanted, rtol=1e-4, atol=1e-4)


def group() -> dict[str, BinaryLinear]:
    """q owns the mask of k, whose salient channels are the same."""
    q, k = made(6, 20, 5, bias=torch.ones(6)), made(4, 20, 5, shares="q")
    layers = {"q": q, "k": k}
    link(layers)
    return layers


def test_a_mask_is_stored_once_and_the_input_ordered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = group().values()
    assert q.mask is not None and k.mask is None and "mask" not in k.state_dict()
    assert q.weight_bytes() - 3 == tensor_bytes([6, 20], 5, True, True, "float16", "q")
    calls: list[int] = []
    ordered = BinaryLinear.prepare
    monkeypatch.setattr(
        BinaryLinear, "prepare", lambda self, x: calls.append(id(self)) or ordered(self, x)
    )
    x = torch.randn(3, 20)
    for layer in (k, q, k):
        torch.testing.assert_close(
            layer(x), x @ layer.dequantize().T + (0 if layer.bias is None else layer.bias)
        )
    assert calls == [id(q)]
    assert torch.equal(q(x, prepare_only=True), ordered(q, x))


def test_what_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="layer k: salient is 6, but 5 in q, with which it shares"):
        link({"q": made(6, 20, 5), "k": made(4, 20, 6, shares="q")})
    with pytest.raises(ValueError, match="uses tensors of q but was not linked"):
        made(4, 20, 5, shares="q").dequantize()
    with pytest.raises(ValueError, match="layer k: it is a binary layer of 20 inputs"):
        link({"q": made(6, 24, 5), "k": made(4, 20, 5, shares="q")})


def test_a_mask_that_does_not_fit_is_found() -> None:
    layer = made(4, 20, 5)
    layer.mask.fill_(255)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="mask has 20 salient channels: allowed is 5"):
        layer.dequantize()


def test_salient_codes_are_the_nearest_to_the_stored_scale() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 9, generator=draw)
    scale, zero = torch.rand(7, generator=draw) * 0.3 + 0.1, torch.arange(7.0) * 2
    scale[3] = 0
    salient = Salient.nearest(torch.arange(9), weight, scale, zero)
    assert salient.scale.dtype == torch.float16 and salient.codes.max() <= 15
    assert (salient.codes[3] == 6).all()
    every_code = torch.arange(16.0) - zero[:, None]
    levels = salient.scale.float()[:, None] * every_code  # (rows, 16)
    best = (weight[:, :, None] - levels[:, None, :]).abs().amin(-1)
    torch.testing.assert_close((salient.dequantize() - weight).abs(), best)


@pytest.mark.parametrize(
    ("size", "mean", "wanted"),
    [(1.0, 1e-7, "float16"), (1e-8, 0.0, "float32"), (1e5, 0.0, "float32"), (1.0, 1e5, "float32")],
)
def test_scales_are_float16_unless_they_would_lose_range(
    size: float, mean: float, wanted: str
) -> None:
    negative = torch.zeros(3, 8, dtype=torch.bool)
    layer = BinaryLinear.from_parts(
        negative, torch.full((3,), size), row_mean=torch.full((3,), mean)
    )
    assert layer.entry()["scale_dtype"] == wanted
    expected = torch.full((3, 8), size + mean)
    torch.testing.assert_close(layer.dequantize(), expected, rtol=2**-11, atol=0)


def bits_of(shapes: dict[str, tuple[int, int]], ratio: float, alignment: int) -> float:
    """Bits per weight of the linears of a block, by the formula."""
    stored = 0
    for name, shape in shapes.items():
        salient = round(shape[1] * ratio / alignment) * alignment
        stored += tensor_bytes(shape, salient, True, True, "float16", OWNERS.get(name))
    return 8 * stored / sum(rows * columns for rows, columns in shapes.values())


def test_bits_of_llama_7b() -> None:
    """Near the 1.61 that the paper prints, which leaves out means and the scales of the 4 bits."""
    assert bits_of(LLAMA_7B, 0.2, 64) == pytest.approx(1.6190, abs=5e-5)
    # Fewer salient channels, but rows that end inside a byte.
    assert bits_of(LLAMA_7B, 0.2, 1) == pytest.approx(1.6146, abs=5e-5)
    # One matrix by hand, in bits: signs, codes, A, M, c, scale and zero of the 4 bits, mask.
    hand = 4096 * 3264 + 4 * 4096 * 832 + 16 * (4096 + 4096 + 3264 + 4096) + 4 * 4096 + 4096
    assert 8 * tensor_bytes([4096, 4096], 832, True, True, "float16", None) == hand


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"salient": 40}, "salient is 40: allowed with 40 inputs are 0 to 39"),
        ({"salient": -1}, "salient"),
        ({"salient": 0, "shares": "q"}, "shares is 'q': it must be null without salient"),
        ({"shares": ""}, "shares"),
        ({"scale_dtype": "bfloat16"}, "scale_dtype"),
        ({"row_mean": 1}, "row_mean"),
        ({"shape": [0, 40]}, "shape"),
        ({"shape": [2**31, 40]}, "shape"),
        ({"extra": 1}, "extra"),
    ],
    ids=str,
)
def test_entries_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(ENTRY | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_scale": torch.ones(3)}, r"row_scale is \(3,\): this layer takes \(2,\)"),
        ({"row_scale": torch.full((2,), torch.nan)}, "row_scale has values that are not finite"),
        ({"column_scale": torch.ones(5)}, r"column_scale is \(5,\): this layer takes \(6,\)"),
        ({"row_mean": torch.full((2,), torch.inf)}, "row_mean has values that are not finite"),
        (
            {
                "salient": Salient(
                    torch.tensor([1, 1]),
                    torch.zeros(2, 2, dtype=torch.uint8),
                    torch.ones(2),
                    torch.zeros(2, dtype=torch.uint8),
                )
            },
            "there are 2 salient channels, 1 without duplicates: allowed is 2",
        ),
    ],
    ids=["shape", "nan", "columns", "means", "channels"],
)
def test_parts_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    parts: dict[str, Any] = {
        "negative": torch.zeros(2, 6, dtype=torch.bool),
        "row_scale": torch.ones(2),
    }
    with pytest.raises(ValueError, match=message):
        BinaryLinear.from_parts(**parts | change)


def test_plain_weight_is_the_formula() -> None:
    sign = pack(torch.tensor([[0, 1, 1]], dtype=torch.uint8), 1)
    row, mean, column = torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([1.0, 3.0, 0.0])
    found = reference.plain_weight(sign, row, mean, column, 3)
    assert found.tolist() == [[2.5, -4.5, 0.0]]
    assert reference.plain_weight(sign, row, None, None, 3).tolist() == [[2.0, -2.0, -2.0]]


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: made(8, 32, 8), lambda: made(8, 32)])
def test_compiles_without_a_break(make: Callable[[], QuantizedLinear]) -> None:
    torch._dynamo.reset()
    layer = make()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for tokens in (1, 8):
        x = torch.randn(tokens, 32)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.kernels
@pytest.mark.skipif(why_not() is not None, reason="needs a compiler: the kernels were not compiled")
def test_packed_signs_take_one_bit() -> None:
    rows, columns = 64, 4096
    layer = BinaryLinear.from_parts(torch.randn(rows, columns) < 0, torch.ones(rows))
    (backend,) = (b for b in layer.backends if isinstance(b, NativeBackend))
    packed, _ = backend.packed_bytes(layer)
    assert packed < 1.2 * rows * columns / 8
