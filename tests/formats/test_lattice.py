import hashlib
from contextlib import nullcontext
from functools import cache
from itertools import product
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from lowbit.formats import build, link
from lowbit.formats.incoherence import (
    restore_weight,
    rotate_hessian,
    rotate_weight,
    rotation,
)
from lowbit.formats.lattice import (
    LatticeLayout,
    LatticeLinear,
    e8p,
    reference,
    search,
    tensor_bytes,
)
from lowbit.formats.lattice.codebooks import CODEBOOKS, E8, Codebook, codebook
from lowbit.formats.lattice.tables import WORDS
from lowbit.kernels.hadamard import orthogonal

pytestmark = pytest.mark.slow

ENTRY: dict[str, Any] = {
    "format": "lattice",
    "shape": [12, 40],
    "bias": "float16",
    "codebook": "E8P12RVQ4B",
    "residual_scale": 0.25,
    "scale": "row",
    "scale_dtype": "float16",
    "seed_in": 5,
    "seed_out": 6,
    "transform_in": "hadamard",
    "transform_out": "hadamard",
    "signs": "seed",
    "shares": None,
}
# (out, in, kind): Sylvester, Paley, Williamson (92 and 172), Hartley and random transforms, and
# widths that no codebook divides.
WIDTHS = [
    (16, 64, "auto"),
    (12, 40, "auto"),
    (92, 20, "auto"),
    (8, 344, "auto"),
    (7, 33, "auto"),
    (9, 13, "random"),
    (1, 1, "auto"),
]
every_book = pytest.mark.parametrize("book", CODEBOOKS.values(), ids=CODEBOOKS)
every_width = pytest.mark.parametrize(("rows", "columns", "kind"), WIDTHS, ids=str)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_codes(book: Codebook, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    codes = torch.randint(0, 2**book.code_bits, shape, generator=generator)
    return codes.to(book.code_dtype)


def made(
    rows: int,
    columns: int,
    book: Codebook,
    kind: str = "auto",
    scales: int = 1,
    shares: str | None = None,
    **more: Any,
) -> LatticeLinear:
    """A layer of random codes."""
    codes = random_codes(book, rows, book.blocks(columns))
    layout = LatticeLayout(book, rotation(columns, 5, kind), rotation(rows, 6, kind), shares)
    scale = draw(scales).abs() / 8 + 0.1
    return LatticeLinear.from_codes(codes, scale, layout, **more)


# A reader written from the docstrings alone, in Python's numbers and float64. Only TRIPLES and the
# dense transforms are taken over.


@cache
def magnitudes() -> list[tuple[float, ...]]:
    ball = [p for p in product((0.5, 1.5, 2.5), repeat=8) if sum(v * v for v in p) <= 10]
    triples = [tuple(0.5 if i in triple else 1.5 for i in range(8)) for triple in e8p.TRIPLES]
    return sorted([*ball, *triples])


def e8p_word(code: int) -> list[float]:
    pattern = magnitudes()[code >> 8]
    minus = [code >> i & 1 for i in range(7)]
    minus.append((sum(minus) + int(sum(pattern))) % 2)
    shift = -0.25 if code >> 7 & 1 else 0.25
    return [(-v if m else v) + shift for v, m in zip(pattern, minus, strict=True)]


@cache
def e8_words() -> list[tuple[float, ...]]:
    halves = [v / 2 for v in range(-4, 5)]
    points = {(0.0,) * 8}
    points |= {p for p in product((-0.5, 0.5), repeat=8) if sum(p) % 2 == 0}
    points |= {p for p in product((-1.0, 0.0, 1.0), repeat=8) if sum(map(abs, p)) == 2}
    points |= {tuple(v if i == j else 0.0 for i in range(8)) for j in range(8) for v in (-2.0, 2.0)}
    points -= {(0.0,) * 7 + (-2.0,)}
    assert all(v in halves for p in points for v in p)
    return sorted(points, key=lambda p: (sum(v * v for v in p), p))


@cache
def d4_words() -> list[tuple[float, ...]]:
    odd = [v / 2 for v in range(-5, 6, 2)]
    points = [p for p in product(odd, repeat=4) if sum(p) % 2 == 0]
    points = [p for p in points if sum(v * v for v in p) <= 9]
    return sorted(points, key=lambda p: (sum(v * v for v in p), p))


def word(name: str, ratio: float | None, code: int) -> numpy.ndarray:
    if name == "HI":
        return numpy.array([code - 7.5])
    if name == "D4":
        return numpy.array(d4_words()[code])
    first = numpy.array(e8p_word(code % 2**16))
    if name == "E8P12":
        return first
    residual = e8_words()[code >> 16] if name == "E8P12RVQ3B" else e8p_word(code >> 16)
    return first + float(numpy.float32(ratio)) * numpy.array(residual)


def signs_of(seed: int, size: int) -> numpy.ndarray:
    digest = hashlib.shake_256(b"lowbit signs " + str(seed).encode()).digest((size + 7) // 8)
    return numpy.array([1.0 - 2 * (digest[i // 8] >> i % 8 & 1) for i in range(size)])


def by_the_docstring(entry: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    """The weight in float64."""
    rows, columns = entry["shape"]
    bits = {"E8P12": 16, "E8P12RVQ3B": 24, "E8P12RVQ4B": 32, "D4": 8, "HI": 4}[entry["codebook"]]
    dim = {"D4": 4, "HI": 1}.get(entry["codebook"], 8)
    blocks = -(-columns // dim)
    rotated = numpy.empty((rows, blocks * dim))
    for i, row in enumerate(tensors["packed"]):
        stream = int.from_bytes(bytes(row.tolist()), "little")
        for j in range(blocks):
            code = (stream >> (j * bits)) % 2**bits
            found = word(entry["codebook"], entry["residual_scale"], code)
            rotated[i, j * dim : (j + 1) * dim] = found
    rotated = rotated[:, :columns] * tensors["scale"].double().numpy()[:, None]
    sides = []
    for name, size in (("out", rows), ("in", columns)):
        seed = entry[f"seed_{name}"]
        dense = orthogonal(size, entry[f"transform_{name}"], seed).dense().double().numpy()
        signs = tensors.get(f"sign_{name}", torch.from_numpy(signs_of(seed, size)))
        sides.append(signs.double().numpy()[:, None] * dense)
    return torch.from_numpy(sides[0] @ rotated @ sides[1].T)


# Codebooks


def test_e8p_is_what_the_paper_says() -> None:
    levels = e8p.patterns().double() + 0.5
    norms = levels.square().sum(1).tolist()
    assert [norms.count(n) for n in (2, 4, 6, 8, 10, 12)] == [1, 8, 28, 64, 126, 29]
    assert int((levels.sum(1) % 2 == 0).sum()) == 107
    words = e8p.words().double()
    assert len(words.unique(dim=0)) == 2**16
    # Less 1/4: points of E8, all whole or all half-integer with an even sum; whole after 1/4 - 1/2.
    for shift in (0.25, -0.25):
        part = words[(torch.arange(2**16) >> 7 & 1) == (shift < 0)] - shift
        assert not ((part - 0.5) % 1).any() and not (part.sum(1) % 2).any()
    assert words.square().mean().item() == pytest.approx(1.196, abs=1e-3)
    norms = words.square().sum(1)
    assert (norms.min(), norms.max()) == (0.5, 16.5)


def test_tables_are_what_the_docstring_says() -> None:
    codes = [0, 1, 127, 128, 255, 256, 65535, *random_codes(CODEBOOKS["E8P12"], 300).tolist()]
    assert e8p.words()[codes].tolist() == [e8p_word(code) for code in codes]
    e8, d4 = (WORDS[name][0]() for name in ("E8", "D4"))
    assert [tuple(row) for row in e8.tolist()] == e8_words() and len(e8_words()) == 256
    assert [tuple(row) for row in d4.tolist()] == d4_words() and len(d4_words()) == 256
    assert [e8.square().sum(1).tolist().count(n) for n in (0, 2, 4)] == [1, 240, 15]


@pytest.mark.parametrize("book", [CODEBOOKS[n] for n in ("E8P12", "D4", "HI")] + [E8], ids=str)
def test_every_word_is_its_own_nearest(book: Codebook) -> None:
    codes = torch.arange(2**book.code_bits).to(book.code_dtype)
    words = book.decode(codes)
    assert words.shape == (len(codes), book.dim) and words.dtype == torch.float32
    found, values = book.nearest(words)
    assert torch.equal(found, codes) and torch.equal(values, words)


@every_book
def test_codes_survive_their_bytes(book: Codebook) -> None:
    top = 2**book.code_bits - 1
    for shape in [(0, 3), (2, 0), (1, 1), (5, 7), (3, 2, 10)]:
        codes = random_codes(book, *shape)
        codes.view(-1)[:1] = top
        packed = book.pack(codes)
        width = (shape[-1] * book.code_bits + 7) // 8
        assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], width)
        unpacked = book.unpack(packed, shape[-1])
        assert unpacked.dtype == book.code_dtype and torch.equal(unpacked, codes)
        streams = [int.from_bytes(bytes(row), "little") for row in packed.flatten(0, -2).tolist()]
        for stream, row in zip(streams, codes.flatten(0, -2).tolist(), strict=True):
            assert row == [stream >> j * book.code_bits & top for j in range(len(row))]


@pytest.mark.parametrize(
    ("name", "error", "tolerance"),
    [
        ("E8P12", 0.0915, 0.0005),
        ("E8P12RVQ3B", 0.0295, 0.0003),
        ("E8P12RVQ4B", 0.0079, 0.0001),
        ("D4", 0.1025, 0.0005),
        ("HI", 0.0115, 0.0002),
    ],
)
def test_squared_error_on_a_unit_gaussian(name: str, error: float, tolerance: float) -> None:
    book = codebook(name)
    x = draw(2**20 // book.dim, book.dim) * book.scale
    codes, values = book.nearest(x)
    assert codes.dtype == book.code_dtype and torch.equal(book.decode(codes), values)
    found = float((values - x).square().mean()) / book.scale**2
    assert found == pytest.approx(error, abs=tolerance)


def test_3_bits_take_the_nearest_first_word() -> None:
    """The second try costs as much as the first, and gains less than 0.5 % there."""
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    codes, _ = codebook("E8P12RVQ3B").nearest(x)
    first, _ = codebook("E8P12").nearest(x)
    assert torch.equal(codes & 2**16 - 1, first.to(codes.dtype))


def test_two_tries_beat_one() -> None:
    x = draw(5000, 8)
    one = CODEBOOKS["E8P12"].nearest(x)[1]
    greedy = one + CODEBOOKS["E8P12"].nearest((x - one) * 3.8)[1] / 3.8
    greedy_error, error = (
        (values - x).square().sum(1) for values in (greedy, codebook("E8P12RVQ4B").nearest(x)[1])
    )
    assert torch.all(error <= greedy_error + 1e-5) and error.mean() < 0.97 * greedy_error.mean()


def test_other_residual_scales() -> None:
    book = codebook("E8P12RVQ3B", 0.25)
    code = torch.tensor([7 + 2**16 * 200])
    assert book.decode(code)[0].tolist() == word("E8P12RVQ3B", 0.25, int(code)).tolist()
    with pytest.raises(ValueError, match="residual_scale is 0.5: D4 has one stage"):
        codebook("D4", 0.5)
    with pytest.raises(ValueError, match="'E8P' is not a codebook: did you mean 'E8P12'"):
        codebook("E8P")


# The search


def hard_vectors() -> dict[str, Tensor]:
    words = e8p.words()
    pairs = [words[random_codes(CODEBOOKS["E8P12"], n)] for n in (1500, 1500)]
    quarters = torch.randint(-12, 13, (2000, 8), generator=torch.Generator().manual_seed(0)) / 4
    equal = torch.linspace(-4, 4, 33)[:, None].expand(-1, 8)
    return {f"Gaussian times {scale}": draw(5000, 8) * scale for scale in (0.5, 1.03, 2, 5)} | {
        "between words": (pairs[0] + pairs[1]) / 2,
        "quarters": quarters,
        "equal coordinates": torch.cat([equal, equal * torch.tensor([1.0, -1] * 4)]),
        "few values": quarters.sign() * 1.25,
        "all large": draw(2000, 8).sign() * (1.6 + 0.3 * draw(2000, 8, seed=1)),
        "far away": draw(50, 8) * 1e4,
        "near zero": draw(50, 8) * 1e-30,
    }


def distance(x: Tensor, codes: Tensor, words: Tensor) -> Tensor:
    return (words[codes.long()].double() - x.double()).square().sum(-1)


@pytest.mark.parametrize(("name", "x"), hard_vectors().items(), ids=hard_vectors())
def test_search_equals_trying_all(name: str, x: Tensor) -> None:
    words = e8p.words()
    best = distance(x, reference.nearest(x, words), words)
    slack = 1e-6 * (1 + x.double().square().sum(-1))
    assert torch.all((distance(x, search.nearest(x), words) - best).abs() <= slack)


def test_search_of_each_shift_equals_trying_all() -> None:
    words, x = e8p.words(), torch.cat([draw(700, 8) * 1.03, draw(300, 8) * 3])
    lower = (torch.arange(2**16) >> 7 & 1).bool()
    for shift, codes in enumerate(search.nearest_of_each_shift(x)):
        assert torch.all(codes >> 7 & 1 == shift)
        part = words[lower == bool(shift)]
        best = distance(x, reference.nearest(x, part), part)
        assert torch.allclose(distance(x, codes, words), best, rtol=1e-5, atol=1e-6)


def test_search_of_any_shape_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(3, 5, 8)
    codes = search.nearest(x)
    assert codes.shape == (3, 5) and codes.dtype == torch.int32
    assert search.nearest(x[:0]).shape == (0, 5)
    assert torch.equal(search.nearest(x.transpose(0, 1)), codes.T)
    assert torch.equal(search.nearest(x.double().requires_grad_()), codes)
    monkeypatch.setattr(search, "CHUNK_ON_CPU", 4)
    assert torch.equal(search.nearest(x), codes)


def test_reference_takes_the_first_of_equals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "TILE", 2)
    monkeypatch.setattr(reference, "PRODUCTS_ON_CPU", 6)
    words = torch.tensor([[5.0], [1.0], [-1.0], [1.0], [-1.0]])
    x = torch.tensor([[0.0], [2.0], [-2.0], [4.0], [0.0], [1.0], [-1.0]])
    assert reference.nearest(x, words).tolist() == [1, 1, 2, 0, 1, 1, 2]
    assert reference.nearest(x[:0], words).shape == (0,)


# Incoherence


@every_width
def test_rotations_are_the_formulas(rows: int, columns: int, kind: str) -> None:
    inner, outer = rotation(columns, 3, kind), rotation(rows, 2**53 - 1, kind)
    left, right = (
        torch.from_numpy(signs_of(side.seed, side.size))[:, None] * side.transform.dense().double()
        for side in (outer, inner)
    )
    weight, root = draw(rows, columns).double(), draw(columns, columns, seed=1).double()
    hessian = root @ root.T
    rotated = rotate_weight(weight, inner, outer)
    torch.testing.assert_close(rotated, left.T @ weight @ right, rtol=0, atol=1e-5)
    torch.testing.assert_close(restore_weight(rotated, inner, outer), weight)
    turned = rotate_hessian(hessian, inner)
    torch.testing.assert_close(turned, right.T @ hessian @ right, rtol=0, atol=1e-4)
    loss = (weight @ hessian @ weight.T).trace()
    torch.testing.assert_close((rotated @ turned @ rotated.T).trace(), loss)


@every_book
def test_a_side_without_signs_is_the_transform_alone(book: Codebook) -> None:
    sides = rotation(40, None), rotation(12, None)
    codes = random_codes(book, 12, book.blocks(40))
    layer = LatticeLinear.from_codes(codes, torch.ones(1), LatticeLayout(book, *sides))
    assert (layer.entry()["seed_in"], layer.entry()["seed_out"]) == (None, None)
    rebuilt = build(layer.entry())
    rebuilt.load_state_dict(layer.state_dict())
    inner, outer = (side.transform.dense() for side in sides)
    for made in (layer, rebuilt):
        torch.testing.assert_close(made.dequantize(), outer @ layer.rotated() @ inner.T)
        x = draw(3, 40)
        torch.testing.assert_close(made(x), x @ made.dequantize().T, rtol=1e-4, atol=1e-4)
    assert sides[0].signs().tolist() == [1] * 40


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_drawn_signs_can_be_stored(dtype: torch.dtype) -> None:
    book = CODEBOOKS["D4"]
    owner = made(12, 40, book, scales=12, bias=draw(12).half())
    member = made(12, 40, book, shares="q")
    q, k = owner.with_signs(dtype), member.with_signs(dtype)
    link({"q": q, "k": k})
    assert torch.equal(q.dequantize(), owner.dequantize())
    assert torch.equal(k.dequantize(), member.dequantize())
    assert k.sign_in is None and q.sign_in is not None and q.sign_in.dtype == dtype
    again = q.with_signs(torch.float32)
    assert torch.equal(again.dequantize(), q.dequantize())
    assert again.bias is not None and torch.equal(again.bias, owner.bias)  # type: ignore[arg-type]


def test_signs_are_the_same_everywhere() -> None:
    assert rotation(12, 7).signs().tolist() == signs_of(7, 12).tolist()
    first = [1, 1, 1, 1, 1, -1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1]
    assert rotation(16, 0).signs().tolist() == first
    drawn = rotation(2**14, 1).signs()
    assert drawn.abs().unique().tolist() == [1] and abs(float(drawn.mean())) < 0.03
    assert torch.equal(rotation(100, 1).signs(), drawn[:100])
    assert not torch.equal(rotation(100, 2).signs(), drawn[:100])
    drawn.zero_()
    assert rotation(2**14, 1).signs().all()


# The layer


@every_book
@every_width
def test_stored_as_the_docstring_says(rows: int, columns: int, kind: str, book: Codebook) -> None:
    layer = made(rows, columns, book, kind, scales=rows)
    weight = by_the_docstring(layer.entry(), dict(layer.named_parameters()))
    error = (layer.dequantize() - weight).abs().max()
    assert error <= 4e-6 * weight.abs().max()
    assert layer.dequantize().is_contiguous()


@every_book
@every_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward(rows: int, columns: int, kind: str, book: Codebook, dtype: torch.dtype) -> None:
    layer = made(rows, columns, book, kind, bias=draw(rows) if rows % 2 else None)
    weight = by_the_docstring(layer.entry(), dict(layer.named_parameters()))
    bias = 0 if layer.bias is None else layer.bias.double()
    inputs = [draw(n, columns).to(dtype) for n in (31, 33)]
    inputs += [draw(columns, 2, 3).to(dtype).permute(2, 1, 0), inputs[0][::2].unsqueeze(0)]
    for x in inputs:
        exact = x.double() @ weight.T + bias
        low = None if layer.bias is None else layer.bias.to(dtype)
        torchs = torch.nn.functional.linear(x, weight.to(dtype), low)
        allowed = 2 * (torchs - exact).abs().max() + 1e-6 * exact.abs().max()
        y = layer(x)
        assert y.dtype == dtype and y.shape == exact.shape
        assert (y - exact).abs().max() <= allowed
    assert layer(inputs[0][:0]).shape == (0, rows)


def test_float64_inputs_are_multiplied_in_float64() -> None:
    layer = made(12, 40, CODEBOOKS["E8P12"], bias=draw(12))
    weight = by_the_docstring(layer.entry(), dict(layer.named_parameters()))
    x = draw(3, 40).double()
    y = layer(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, x @ weight.T + layer.bias.double(), rtol=0, atol=1e-6)  # type: ignore[union-attr]


def test_large_half_precision_inputs_do_not_overflow() -> None:
    layer = made(16, 64, CODEBOOKS["E8P12"])
    x = torch.zeros(1, 64, dtype=torch.float16)
    x[0, 3] = 30000
    exact = x.double() @ layer.dequantize().double().T
    assert exact.abs().max() < 65504 and layer(x).isfinite().all()


def test_codes_are_counted_from_the_stored_scale() -> None:
    book, sides = CODEBOOKS["D4"], (rotation(20, 1), rotation(12, 2))
    rotated = draw(12, 20)
    rotated[3] = 0
    scale = draw(12, seed=1).abs() + 0.5
    scale[4] = 0
    layer = LatticeLinear.from_rotated(rotated, scale, LatticeLayout(book, *sides))
    assert layer.scale.dtype == torch.float16 and torch.equal(layer.scale, scale.half())
    kept = layer.scale.float()
    steps = torch.where(kept == 0, torch.inf, kept)[:, None]
    expected = book.nearest((rotated / steps).unflatten(1, (5, 4)))[0]
    assert torch.equal(layer.codes(), expected)
    assert not layer.rotated()[4].any()
    again = LatticeLinear.from_codes(expected, layer.scale, LatticeLayout(book, *sides))
    assert torch.equal(again.packed, layer.packed) and again.entry() == layer.entry()
    single = LatticeLinear.from_rotated(rotated, torch.tensor([1e-9]), LatticeLayout(book, *sides))
    assert single.scale.dtype == torch.float32 and single.entry()["scale"] == "tensor"


@every_book
def test_a_gaussian_weight_keeps_what_the_codebook_keeps(book: Codebook) -> None:
    weight = draw(48, 96)
    sides = rotation(96, 1), rotation(48, 2)
    rotated = rotate_weight(weight, *sides)
    scale = rotated.square().mean().sqrt().reshape(1) / book.scale
    layer = LatticeLinear.from_rotated(rotated, scale, LatticeLayout(book, *sides))
    error = float((layer.dequantize() - weight).square().mean() / weight.square().mean())
    expected = {"E8P12": 0.0915, "E8P12RVQ3B": 0.0295, "E8P12RVQ4B": 0.0079, "D4": 0.1025}
    assert error == pytest.approx(expected.get(book.name, 0.0115), rel=0.1)


def test_trained_signs_are_stored() -> None:
    book = CODEBOOKS["E8P12"]
    trained = draw(40).half(), draw(12, seed=1).half()
    layer = made(12, 40, book, signs=trained)
    assert layer.entry()["signs"] == "float16" and layer.sign_in is not None
    assert torch.equal(layer.sign_in, trained[0])
    weight = by_the_docstring(layer.entry(), dict(layer.named_parameters()))
    torch.testing.assert_close(layer.dequantize().double(), weight, rtol=0, atol=1e-5)
    x = draw(3, 40)
    torch.testing.assert_close(layer(x).double(), x.double() @ weight.T, rtol=0, atol=1e-4)
    seeded = rotation(40, 5).signs(), rotation(12, 6).signs()
    same = made(12, 40, book, signs=seeded)
    assert torch.equal(same.dequantize(), made(12, 40, book).dequantize())


@pytest.mark.parametrize("tokens", [3, 100])
def test_signs_scales_and_inputs_can_be_trained(tokens: int) -> None:
    """On both paths the gradients are those of y = S_out B_out (scale words) B_in.T S_in x."""
    layer = made(12, 40, CODEBOOKS["D4"], signs=(draw(40), draw(12, seed=1)), scales=12)
    layer.scale.data = layer.scale.data.float()
    learned = [layer.sign_in, layer.sign_out, layer.scale]
    x, target = draw(tokens, 40).requires_grad_(), draw(tokens, 12, seed=2)
    for parameter in learned:
        parameter.requires_grad_()  # type: ignore[union-attr]
    found = torch.autograd.grad((layer(x) * target).sum(), [x, *learned])  # type: ignore[list-item]
    words = layer.codebook.decode(layer.codes()).flatten(1)
    outer, inner = (side.transform.dense() for side in (layer.rotation_out, layer.rotation_in))
    y = (x * layer.sign_in) @ inner @ (layer.scale[:, None] * words).T @ outer.T * layer.sign_out
    expected = torch.autograd.grad((y * target).sum(), [x, *learned])  # type: ignore[list-item]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_owner_alone_has_the_signs_of_the_input() -> None:
    book, signs = CODEBOOKS["E8P12"], (draw(40), draw(12, seed=1))
    owner = made(12, 40, book, signs=signs)
    member = made(12, 40, book, signs=(None, signs[1]), shares="q")
    assert sorted(dict(member.named_parameters())) == ["packed", "scale", "sign_out"]
    assert member.weight_bytes() == owner.weight_bytes() - 40 * 4
    rebuilt = build(member.entry())
    rebuilt.load_state_dict(member.state_dict())
    with pytest.raises(ValueError, match="uses tensors of q but was not linked"):
        rebuilt(draw(2, 40))
    with pytest.raises(ValueError, match="uses tensors of q but was not linked"):
        rebuilt.dequantize()
    link({"q": owner, "k": rebuilt})
    assert torch.equal(rebuilt.dequantize(), owner.dequantize())
    assert torch.equal(rebuilt(draw(2, 40)), owner(draw(2, 40)))


def test_seeded_members_work_alone() -> None:
    owner = made(12, 40, CODEBOOKS["HI"])
    member = made(12, 40, CODEBOOKS["HI"], shares="q")
    alone = member(draw(2, 40))
    assert torch.equal(member.dequantize(), owner.dequantize())
    link({"q": owner, "k": member})
    assert member.owner is owner and torch.equal(member(draw(2, 40)), alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signs": (draw(40), draw(12))}, "layer k: signs is float32, but seed in q"),
        ({"rotation_in": rotation(40, 9)}, "layer k: seed_in is 9, but 5 in q"),
        ({"rotation_in": rotation(40, 5, "hartley")}, "layer k: transform_in is hartley, but had"),
    ],
    ids=["signs", "seed", "kind"],
)
def test_members_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    book = CODEBOOKS["D4"]
    owner = made(12, 40, book)
    codes = random_codes(book, 12, 10)
    sides = change.get("rotation_in", owner.rotation_in), owner.rotation_out
    signs = (None, change["signs"][1]) if "signs" in change else None
    layout = LatticeLayout(book, *sides, "q")
    member = LatticeLinear.from_codes(codes, torch.ones(1), layout, signs=signs)
    with pytest.raises(ValueError, match=message):
        link({"q": owner, "k": member})


@pytest.mark.parametrize(("inner", "outer"), [("float16", "float32"), ("hadamard", "float16")])
def test_stored_factors(inner: str, outer: str) -> None:
    """Widths of 40 = 5 x 8 and 12 = 3 x 4."""
    made = ENTRY | {"transform_in": inner, "transform_out": outer, "residual_scale": -0.25}
    q, k = build(made), build(made | {"shares": "q"})
    with (
        pytest.raises(ValueError, match="was not linked") if inner != "hadamard" else nullcontext()
    ):
        k.dequantize()
    link({"q": q, "k": k})
    for layer in (q, k):
        assert isinstance(layer, LatticeLinear)
        codes = random_codes(layer.codebook, 12, 5)
        layer.packed.copy_(layer.codebook.pack(codes))
        layer.scale.fill_(0.5)
        for factor in (layer.factor_in, layer.factor_out):
            if factor is not None:
                factor.copy_(draw(*factor.shape))
        assert layer.weight_bytes() == tensor_bytes(**layer.entry())
    assert k.factor_in is None and k.factor_out.shape == (3, 3)
    wanted = [
        torch.kron(m.float(), orthogonal(p).dense())
        for m, p in ((q.factor_in, 8), (k.factor_out, 4))
        if m is not None
    ]
    left = wanted[0] if inner != "hadamard" else orthogonal(40).dense()
    plain = k.rotation_in.signs()[None] * (
        k.rotation_out.signs()[:, None] * (wanted[-1] @ k.rotated() @ left.T)
    )
    torch.testing.assert_close(k.dequantize(), plain)
    for tokens in (1, 100):
        x = draw(tokens, 40)
        torch.testing.assert_close(k(x), x @ plain.T, rtol=1e-4, atol=1e-4)
    stored = {"q": q.with_signs(torch.float16), "k": k.with_signs(torch.float16)}
    link(stored)
    assert torch.equal(stored["k"].dequantize(), k.dequantize())


def test_factors_that_cannot_be_stored() -> None:
    for shape, odd in (([8, 40], 1), ([2**14 + 1, 40], 2**14 + 1)):
        with pytest.raises(ValueError, match=f"transform_out: the odd part of .* is {odd}: a fac"):
            build(ENTRY | {"shape": shape, "transform_out": "float16"})
    sides = rotation(40, 5), rotation(12, 6, "float16")
    book = CODEBOOKS["D4"]
    with pytest.raises(ValueError, match="factor_out is missing"):
        LatticeLinear.from_codes(
            random_codes(book, 12, 10), torch.ones(1), LatticeLayout(book, *sides)
        )


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    for book in CODEBOOKS.values():
        layer = made(12, 40, book)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(draw(3, 40)), layer(draw(3, 40)))
    stored = build(ENTRY | {"transform_in": "float16", "signs": "float16"})
    compiled = torch.compile(stored, backend="eager", fullgraph=True)
    assert torch.equal(compiled(draw(3, 40)), stored(draw(3, 40)))


# Sizes and what is refused


def test_formula_on_hand_counted_bytes() -> None:
    def count(shape: tuple[int, int], book: str, scale: str = "tensor", **more: Any) -> int:
        more = {"scale_dtype": "float32", "signs": "seed", "shares": None} | more
        return tensor_bytes(shape, book, scale, **more)

    assert count((4096, 4096), "E8P12") == 4096 * 1024 + 4
    assert count((5, 37), "E8P12") == 5 * 5 * 2 + 4
    assert count((5, 37), "E8P12RVQ3B", "row", scale_dtype="float16") == 5 * 5 * 3 + 5 * 2
    assert count((5, 37), "E8P12RVQ4B", "row") == 5 * 5 * 4 + 5 * 4
    assert count((5, 37), "D4", signs="float16") == 5 * 10 + 4 + 2 * (5 + 37)
    assert count((5, 37), "HI", signs="float32", shares="q") == 5 * 19 + 4 + 4 * 5


def layout(book: str, shares: str | None = None) -> LatticeLayout:
    return LatticeLayout(CODEBOOKS[book], rotation(40, 5), rotation(12, 6), shares)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": torch.zeros(12, 10).int()}, "codes is torch.int32: allowed is torch.uint8"),
        ({"codes": torch.zeros(12, 9, dtype=torch.uint8)}, r"packed is \(12, 9\): this layer tak"),
        ({"scale": torch.ones(11)}, r"scale is \(11,\): this layer takes \(12,\)"),
        ({"scale": torch.ones(12, 1)}, r"scale is \(12, 1\): allowed are \(1,\) and \(out,\)"),
        ({"scale": torch.full((12,), torch.nan)}, "scale has values that are not finite"),
        ({"bias": torch.ones(5)}, r"bias is \(5,\): this layer takes \(12,\)"),
        ({"bias": torch.ones(12).double()}, "bias"),
        ({"signs": (None, torch.ones(12))}, "sign_in is missing"),
        (
            {"signs": (torch.ones(40), torch.ones(12)), "layout": layout("D4", "q")},
            "sign_in is given",
        ),
        ({"signs": (torch.ones(40), torch.ones(12).bfloat16())}, "signs"),
        ({"signs": (torch.ones(40) / 0, torch.ones(12))}, "sign_in has values that are not fini"),
        ({"layout": layout("D4", "")}, "shares"),
    ],
    ids=str,
)
def test_bad_tensors_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "codes": torch.zeros(12, 10, dtype=torch.uint8),
        "scale": torch.ones(12),
        "layout": layout("D4"),
    }
    LatticeLinear.from_codes(**arguments)
    with pytest.raises(ValueError, match=message):
        LatticeLinear.from_codes(**(arguments | changes))


def test_bad_codes_and_weights_are_refused() -> None:
    for name in ("E8P12", "E8P12RVQ3B"):
        book = CODEBOOKS[name]
        for wrong in (-1, 2**book.code_bits):
            with pytest.raises(ValueError, match=f"codes go from .* in {name} are 0 to"):
                book.pack(torch.full((12, 5), wrong, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"rotated is \(12, 41\): this layer takes \(12, 40\)"):
        LatticeLinear.from_rotated(draw(12, 41), torch.ones(1), layout("D4"))
    with pytest.raises(ValueError, match="rotated has values that are not finite"):
        LatticeLinear.from_rotated(torch.full((12, 40), torch.inf), torch.ones(1), layout("D4"))


BAD_VALUES: dict[str, list[Any]] = {
    "shape": [None, 12, [], [12], [12, 40, 1], [0, 40], [-12, 40], [12, 2**31], [12.0, 40]],
    "bias": ["float64", "", 1, True],
    "codebook": [None, "", "e8p12", "E8", ["E8P12"]],
    "residual_scale": [None, 0, -1.5, 1.5, float("nan"), float("inf"), "0.5", True],
    "scale": [None, "group", 1, "ROW"],
    "scale_dtype": [None, "bfloat16", "float64", 16],
    "seed_in": [-1, 2**53, 1.0, "1", True],
    "seed_out": [-1, 2**53, 1.0, "1", False],
    "transform_in": [None, "auto", "Hadamard", "fft", 0],
    "transform_out": [None, "auto", "", 1],
    "signs": [None, "stored", "bfloat16", "float64", 0],
    "shares": ["", 0, False, ["q"]],
    "format": ["LATTICE", "", None],
}


@pytest.mark.parametrize("key", BAD_VALUES)
def test_bad_values_are_refused_by_name(key: str) -> None:
    build(ENTRY)
    for value in BAD_VALUES[key]:
        with pytest.raises(ValueError, match=key):
            build(ENTRY | {key: value})


def test_other_bad_entries() -> None:
    with pytest.raises(ValueError, match="'seeds' is not a field .* did you mean 'seed_in'"):
        build(ENTRY | {"seeds": 4})
    with pytest.raises(ValueError, match="scale_dtype is float16: allowed for one .* float32"):
        build(ENTRY | {"scale": "tensor"})
    with pytest.raises(ValueError, match="residual_scale is 0.25: D4 has one stage"):
        build(ENTRY | {"codebook": "D4"})
    for shape, side in (([12, 7], "in"), ([7, 40], "out")):
        with pytest.raises(ValueError, match=f"transform_{side}: n is 7: no Hadamard matrix"):
            build(ENTRY | {"shape": shape})
    huge = ENTRY | {"shape": [2**31 - 1, 2**31 - 1], "transform_in": "hartley"}
    huge |= {"transform_out": "hartley", "signs": "float32"}
    with torch.device("meta"):
        assert build(huge | {"codebook": "E8P12", "residual_scale": None}).weight_bytes() > 2**59
