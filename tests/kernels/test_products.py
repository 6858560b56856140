"""Products in pieces: right, and equal for every number of threads."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowbit.kernels import products
from lowbit.kernels.products import linear, pieces_of, product, reproducible, share_products

SHAPES = {
    "one piece": (3, 5, 7),
    "rows": (1027, 64, 130),
    "columns": (130, 65, 1111),
    "square": (640, 33, 640),
    "a thin last piece": (129 * 5, 64, 16),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(products, "PIECE", 1 << 16)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with reproducible():
            yield
    finally:
        torch.set_num_threads(before)


def matrices(m, k, n):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(m, k, generator=draw), torch.randn(k, n, generator=draw)


@every_shape
def test_products_are_right(shape):
    a, b = matrices(*shape)
    exact = a.double() @ b.double()
    with threads(2):
        found = product(a, b)
    worst = (a @ b - exact).abs().max()
    assert (found - exact).abs().max() <= 2 * worst + 1e-6


@every_shape
def test_bytes_are_equal_for_every_number_of_threads(shape):
    a, b = matrices(*shape)
    found = []
    for count in (1, 2, 3, 5):
        with threads(count):
            # Often enough that every number of threads is tried, and one is chosen.
            found += [product(a, b) for _ in range(12)]
    assert all(torch.equal(found[0], other) for other in found)


@every_shape
def test_gradients_of_a_linear_are_those_of_torch(shape):
    m, k, n = shape
    a, b = matrices(m, k, n)

    def gradients(function, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (a[None], b.T, torch.ones(n))]
        out = function(*inputs)
        out.square().mean().backward()
        return [out.detach(), *(t.grad for t in inputs)]

    exact = gradients(functional.linear, torch.float64)
    torchs = gradients(functional.linear, torch.float32)
    found = []
    for count in (1, 3):
        with threads(count):
            found.append(gradients(linear, torch.float32))
    for want, own, one, three in zip(exact, torchs, *found, strict=True):
        assert torch.equal(one, three)
        assert (one - want).abs().max() <= 2 * (own - want).abs().max() + 1e-6


def test_only_wanted_gradients_are_computed():
    a, b = matrices(1027, 64, 130)
    weight = b.T.clone().requires_grad_()
    with threads(1):
        linear(a, weight, None).sum().backward()
    assert a.grad is None and weight.grad is not None


def test_other_dtypes_are_kept():
    for dtype in (torch.float64, torch.bfloat16):
        a, b = (t.to(dtype) for t in matrices(1027, 64, 130))
        with threads(2):
            assert product(a, b).dtype == dtype


def test_small_products_are_not_cut():
    assert pieces_of(100, 1000, 100) == 1
    assert pieces_of(0, 10, 10) == 1
    assert pieces_of(10**5, 10**5, 10**5) == products.MOST_PIECES


def test_threads_of_torch_are_restored():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(2):
        assert torch.get_num_threads() == 1
        with reproducible():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before
    a, b = matrices(1027, 64, 130)
    assert torch.equal(product(a, b), a @ b)


def test_a_failed_piece_is_an_error_of_the_product():
    workers = products.Workers(2)

    def fail(index):
        if index == 3:
            raise MemoryError

    for _ in range(6):  # with one thread and with two
        with pytest.raises(MemoryError):
            workers.run("shape", 4, fail)
        workers._seconds["shape"].append(0.0)
    workers.close()


def test_the_fastest_number_of_threads_is_used_until_it_is_measured_again(monkeypatch):
    monkeypatch.setattr(products, "VALID", 10)
    clock, used = [0.0], []
    monkeypatch.setattr(products.time, "perf_counter", lambda: clock[0])
    workers = products.Workers(4)

    def shared(function, shares):
        used.append(len(list(shares)))
        clock[0] += {2: 2.0, 4: 9.0}[used[-1]]
        return []

    def alone(index):
        if index == 0:
            used.append(1)
            clock[0] += 5.0

    monkeypatch.setattr(workers._pool, "map", shared)
    for _ in range(20):
        workers.run("shape", 8, alone)
    assert used == [1, 2, 4, 1, 2, 4, *[2] * 10, 1, 2, 4, 1]
    workers.close()


def test_every_linear_of_a_model_shares_its_products():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([Own(4, 4)]), nn.LayerNorm(4))
    share_products(model)
    assert type(model[0]) is products.ProductLinear and type(model[1][0]) is Own
    assert isinstance(model[0], nn.Linear)
