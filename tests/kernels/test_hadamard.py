import copy
import math
import pickle
import random

import pytest
import torch
from torch import Tensor

from lowbit.kernels.hadamard import Transform, fast, orthogonal
from lowbit.kernels.hadamard.haar import haar
from lowbit.kernels.hadamard.hartley import hartley
from lowbit.kernels.hadamard.reference import factors

pytestmark = pytest.mark.slow

# of models: the specification of QuIP#, section 3.3, and those of the models in examples/
WIDTHS = [
    *(128, 512, 1024, 2048, 4096, 8192, 16384, 768, 3072, 6144, 12288, 24576, 1536, 5120, 2560),
    *(10240, 20480, 1280, 14336, 28672, 7168, 3584, 896, 9216, 36864, 4608, 2304, 1152, 18432, 576),
    *(5632, 2816, 22528, 1408, 704, 6656, 53248, 15360, 3840, 960, 17408, 4864, 9728, 5376, 21504),
    *(10752, 3200, 1600, 6400, 25600, 13824, 27648, 6912, 14848, 59392, 15872, 17920, 8960, 18944),
    *(172, 344, 11008, 22016, 5504, 2880, 5760, 4544, 18176, 4800, 8640, 10944, 29568, 10920),
    *(4672, 13696),
]
AWKWARD = [1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 24, 107 * 2, 172 * 4, 181 * 8, 684, 924, 1031, 1365 * 2]
# one of each way that the fast path takes, small enough for a dense matrix
SMALL = [1, 2, 7, 12, 13, 24, 48, 64, 128, 172, 28 * 4, 107 * 2, 172 * 4, 20 * 32, 1027, 12 * 20]


def rows(n: int, count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, n, generator=torch.Generator().manual_seed(seed))


def definition(transform: Transform, x: Tensor) -> Tensor:
    """(M (x) I_p)(I_K (x) H_p) x in float64: butterflies, then one factor of M after the other."""
    y = x.double().reshape(-1, transform.power)
    level = 1
    while level < transform.power:
        a, b = y.view(-1, 2, level).unbind(1)
        y, level = torch.stack([a + b, a - b], dim=1), 2 * level
    y = y.reshape(len(x), *transform.orders, transform.power)
    for axis, factor in enumerate(factors(transform), 1):
        y = torch.tensordot(y, factor, dims=([axis], [1])).movedim(-1, axis)
    return y.reshape(x.shape) * transform.scale


def check(transform: Transform) -> None:
    """Orthogonal, undone by its inverse from either side, and no entry above sqrt(2 / n)."""
    n = transform.n
    x = rows(n)
    y = transform(x)
    torch.testing.assert_close(y @ y.T / n, x @ x.T / n, rtol=0, atol=1e-5)
    torch.testing.assert_close(transform.inverse(y), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(transform(transform.inverse(x)), x, rtol=0, atol=1e-5)
    one_hot = torch.zeros(3, n)
    one_hot[range(3), [0, n // 3, n - 1]] = 1
    for spread in (transform(one_hot), transform.inverse(one_hot)):
        peaks = spread.abs().amax(1) * math.sqrt(n)
        if transform.kind == "hadamard":
            torch.testing.assert_close(peaks, torch.ones(3))
            assert (spread * math.sqrt(n)).abs().min() > 0.999
        elif transform.kind == "hartley":
            assert peaks.max() <= 1.42


@pytest.mark.parametrize("n", WIDTHS + AWKWARD)
def test_width(n: int) -> None:
    transform = orthogonal(n)
    check(transform)
    torch.testing.assert_close(
        transform(rows(n)).double(), definition(transform, rows(n)), rtol=0, atol=1e-5
    )


def test_200_multiples_of_8() -> None:
    for n in random.Random(0).sample(range(8, 16384, 8), 200):
        check(orthogonal(n))


@pytest.mark.parametrize("kind", ["hartley", "random"])
def test_other_kinds(kind: str) -> None:
    for n in (3, 24, 344, 11008, 18944, 1031 * 4):
        transform = orthogonal(n, kind, 7)
        assert transform.kind == kind
        check(transform)
        x = rows(n)
        torch.testing.assert_close(
            transform(x).double(), definition(transform, x), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("n", SMALL)
def test_dense_is_the_definition(n: int) -> None:
    for transform in {orthogonal(n), orthogonal(n, "random" if n < 1000 else "auto")}:
        dense = transform.dense()
        eye = torch.eye(n)
        assert dense.dtype == torch.float32 and dense.shape == (n, n)
        torch.testing.assert_close(dense.double(), definition(transform, eye).T, rtol=0, atol=1e-7)
        torch.testing.assert_close(dense @ dense.T, eye, rtol=0, atol=1e-5)
        torch.testing.assert_close(transform(eye), dense.T, rtol=0, atol=1e-6)
        torch.testing.assert_close(transform.inverse(eye), dense, rtol=0, atol=1e-6)


def test_the_inverse_is_another_matrix() -> None:
    dense = orthogonal(28 * 16).dense()
    assert (dense - dense.T).abs().max() > 0.05


@pytest.mark.parametrize("order", [3, 107, 1365])
def test_hartley_formula(order: int) -> None:
    matrix = hartley(order)
    assert torch.equal(matrix, matrix.T)
    assert matrix.abs().max() <= math.sqrt(2 / order)
    eye = torch.eye(order, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix, eye, rtol=0, atol=1e-12)
    angle = 2 * math.pi * 2 * (order - 1) / order
    assert abs(matrix[2, -1].item() * math.sqrt(order) - math.cos(angle) - math.sin(angle)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [13, 64, 12 * 64, 172, 20 * 60, 1031])
def test_within_twice_the_error_of_torch(dtype: torch.dtype, n: int) -> None:
    transform = orthogonal(n)
    x = rows(n, 64).to(dtype)
    exact = definition(transform, x)
    dense = definition(transform, torch.eye(n)).T.to(dtype)
    ours = transform(x)
    assert ours.dtype == dtype
    bound = 2 * (x @ dense.T - exact).abs().max() + 1e-3 * torch.finfo(dtype).eps
    assert (ours - exact).abs().max() <= bound


def test_float64_is_computed_in_float64() -> None:
    for n in (13, 172, 768, 1031):
        x = rows(n).double()
        y = orthogonal(n)(x)
        torch.testing.assert_close(y, definition(orthogonal(n), x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(704,), (0, 704), (2, 0, 704), (5, 1, 3, 704), (700, 704)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    """The last one is taken in several pieces, of which the last is shorter."""
    transform = orthogonal(704)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = transform(x)
    assert y.shape == shape and y.is_contiguous()
    flat = x.reshape(-1, 704)
    torch.testing.assert_close(y.view(-1, 704), flat @ transform.dense().T, rtol=0, atol=1e-5)
    half = transform(flat.half()).float()
    torch.testing.assert_close(half, y.view(-1, 704), rtol=4e-3, atol=4e-3)


def test_any_strides() -> None:
    transform = orthogonal(24)
    x = rows(24, 8)
    for view in (x.T.contiguous().T, x[::2], rows(48, 8)[:, ::2], x[:1].expand(4, -1)):
        before = view.clone()
        torch.testing.assert_close(transform(view), transform(view.contiguous()))
        assert torch.equal(view, before)


def test_width_one_is_a_copy() -> None:
    x = rows(1)
    y = orthogonal(1)(x)
    assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()


def test_gradients() -> None:
    for n in (1, 13, 24):
        transform = orthogonal(n)
        x = rows(n).double().requires_grad_()
        for function in (transform, transform.inverse):
            assert torch.autograd.gradcheck(function, x)
            assert torch.autograd.gradgradcheck(lambda x, f=function: f(x).pow(2), x)
    x = rows(704).bfloat16().requires_grad_()
    orthogonal(704)(x).float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    expected = orthogonal(704).inverse(torch.ones(3, 704))
    torch.testing.assert_close(x.grad.float(), expected, rtol=8e-3, atol=1e-2)


def test_same_bits_every_time() -> None:
    for n in (172, 704, 13 * 64, 1031):
        transform = orthogonal(n)
        x = rows(n, 300)
        y = transform(x)
        fast._steps.cache_clear()
        assert torch.equal(orthogonal(n)(x.clone()), y)


def test_random_is_seeded() -> None:
    x = rows(24)
    state = torch.random.get_rng_state()
    one, again, other = (orthogonal(24, "random", seed)(x) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one, again) and not torch.allclose(one, other, atol=0.1)


def test_random_never_changes() -> None:
    """Models on disk store the seed alone: fails where a torch draws or factors differently."""
    assert haar(3, 5)[0].tolist() == pytest.approx([-0.29917877, -0.58761996, -0.75179442])
    assert haar(107, 5)[0, :2].tolist() == pytest.approx([0.09098993, -0.07968024])
    assert haar(107, 5)[-1, -1].item() == pytest.approx(-0.06416037)


def test_survives_copies() -> None:
    transform = orthogonal(24, "random", 5)
    assert copy.deepcopy(transform) == pickle.loads(pickle.dumps(transform)) == transform


@pytest.mark.parametrize("n", [13, 24, 224, 1031])
def test_first_use_in_any_mode(n: int) -> None:
    """What is built and kept must not depend on the mode of the call that needed it first."""
    transform = orthogonal(n)
    x = rows(n)
    expected = definition(transform, x).float()
    for mode in (torch.inference_mode, torch.no_grad, lambda: torch.device("meta")):
        fast._steps.cache_clear()
        with mode():
            y = transform(x)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
        leaf = x.clone().requires_grad_()
        transform(leaf).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(transform(x), expected, rtol=0, atol=1e-5)
    shape = transform(torch.empty(2, 3, n, dtype=torch.float16, device="meta"))
    assert shape.shape == (2, 3, n) and shape.dtype == torch.float16


def test_is_an_op_to_torch() -> None:
    arguments = (rows(24).requires_grad_(), "hadamard", 0, False)
    torch.library.opcheck(fast.orthogonal_op, arguments)
    transform = orthogonal(24)
    compiled = torch.compile(lambda x: transform(2 * x), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows(24)), transform(2 * rows(24)))


def test_wrong_inputs() -> None:
    transform = orthogonal(24)
    for shape in ((2, 25), (24, 1), ()):
        with pytest.raises(ValueError, match="its last dimension must be 24"):
            transform(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"x is torch.int32: allowed are torch.float16"):
        transform.inverse(torch.zeros(24, dtype=torch.int32))
