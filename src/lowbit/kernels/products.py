"""Matrix products by several threads, with results that do not depend on the number of threads.

torch divides the work of an operation by the number of threads, so that sums over all elements,
Cholesky factors and even SiLU (whose last elements are computed by other code than the rest) end in
other bits with 2 or 3 threads than with one. In `with reproducible():` torch therefore uses one
thread. Only large products, where the time goes, are shared: they are cut into pieces that depend
on the shapes alone, and each piece is computed by one thread.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

PIECE = 1 << 28  # operations of a piece at least: 2 to 5 ms on one core; waking a thread is 0.05 ms
NARROWEST = 128  # rows or columns of a piece at least: narrower ones run at half the speed
MOST_PIECES = 64
TRIALS = 2  # measurements of each number of threads, of which the faster counts
VALID = 500  # products until the numbers of threads are measured again: other processes come and go


class Workers:
    """Threads that share the pieces of a product; how many take part is measured.

    For each shape of product, 1, 2, 4, ... threads are timed in turn, and the fastest number is
    used from then on. On a busy machine that may be one: a product ends with its last piece.

    most: the most threads to use.
    """

    def __init__(self, most: int) -> None:
        self.counts = sorted({most, *(1 << i for i in range(most.bit_length()))} - {0})
        self._pool = ThreadPoolExecutor(most, "products", initializer=_start)
        self._seconds: dict[Any, list[float]] = defaultdict(list)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()

    def run(self, shape: Any, pieces: int, compute: Callable[[int], None]) -> None:
        """Calls compute(0), ..., compute(pieces - 1). shape: products with equal shapes take as
        long as each other."""
        seconds = self._seconds[shape]
        tried = len(seconds)
        if tried >= TRIALS * len(self.counts) + VALID:
            seconds.clear()
            tried = 0
        threads = self.counts[tried % len(self.counts)]
        if tried >= TRIALS * len(self.counts):
            threads = self._fastest(seconds)
        started = time.perf_counter()
        if threads == 1:
            for index in range(pieces):
                compute(index)
        else:

            def compute_share(share: range) -> None:
                for index in share:
                    compute(index)

            shares = (range(first, pieces, threads) for first in range(threads))
            list(self._pool.map(compute_share, shares))  # raises what a piece raised
        seconds.append(time.perf_counter() - started)

    def _fastest(self, seconds: list[float]) -> int:
        of_count = {
            count: min(seconds[i : TRIALS * len(self.counts) : len(self.counts)])
            for i, count in enumerate(self.counts)
        }
        return min(of_count, key=of_count.__getitem__)


def _start() -> None:
    """Prepares a worker's thread: both settings belong to the thread."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


_workers: ContextVar[Workers | None] = ContextVar("lowbit_workers", default=None)


@contextmanager
def reproducible() -> Iterator[None]:
    """Makes results independent of the number of threads in this context; also a decorator.

    At most torch.get_num_threads() threads share a product, which OMP_NUM_THREADS and
    torch.set_num_threads limit. Inside another such context this one changes nothing.
    """
    if _workers.get() is not None:
        yield
        return
    threads = torch.get_num_threads()
    workers = Workers(threads)
    token = _workers.set(workers)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _workers.reset(token)
        workers.close()


def pieces_of(m: int, k: int, n: int) -> int:
    """Returns the number of pieces of a product (m, k) @ (k, n); it depends on nothing else."""
    enough = 2 * m * k * n // PIECE
    return max(1, min(enough, max(m, n) // NARROWEST, MOST_PIECES))


def product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a @ b, without gradients. a: (m, k), b: (k, n) -> (m, n)"""
    workers = _workers.get()
    (m, k), n = a.shape, b.shape[1]
    pieces = pieces_of(m, k, n)
    if workers is None or pieces == 1 or a.device.type != "cpu":
        return a @ b
    a, b = a.detach(), b.detach()
    out = torch.empty(m, n, dtype=a.dtype)
    by_row = m >= n
    size = -(-max(m, n) // pieces)

    def compute(index: int) -> None:
        part = slice(index * size, (index + 1) * size)
        if by_row:
            torch.mm(a[part], b, out=out[part])
        else:
            torch.mm(a, b[:, part], out=out[:, part])

    workers.run((m, k, n), pieces, compute)
    return out


class _Linear(torch.autograd.Function):
    """x @ weight.T, whose gradients are products in pieces as well. x: (rows, in)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            product(gradient, weight) if wanted[0] else None,
            product(gradient.T, x) if wanted[1] else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x @ weight.T + bias. x: (..., in), weight: (out, in) -> (..., out)"""
    rows = x.numel() // max(1, x.shape[-1])
    if _workers.get() is None or pieces_of(rows, x.shape[-1], len(weight)) == 1:
        return functional.linear(x, weight, bias)
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return functional.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x.reshape(rows, -1), weight)
    out = out.view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


class ProductLinear(nn.Linear):
    """An nn.Linear that computes by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def share_products(model: nn.Module) -> None:
    """Makes every nn.Linear of a model compute by `linear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = ProductLinear


def is_linear(module: nn.Module) -> bool:
    """Returns whether a module is an nn.Linear with its own forward, not that of another class."""
    return isinstance(module, nn.Linear) and type(module).forward in (
        nn.Linear.forward,
        ProductLinear.forward,
    )
