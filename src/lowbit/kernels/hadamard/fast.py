"""The transform as a few small matrix products, in pieces that stay in the cache.

Row-major, a row is a tensor with one axis for each factor of B; a step multiplies along one axis.
Add-and-subtract butterflies are no faster on many rows, and take twice as long on one: a
product with a 16 x 16 matrix costs as much as four passes of additions (benchmarks/hadamard.py).
The computation is float32, float64 for float64 inputs: products are written with `out`, which
autocast leaves alone (on CUDA, torch's TF32 switch applies to them as to any product: leave it
off). The last bits of a row may depend on how many rows come with it, as they do in torch's own
products.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lowbit.kernels.hadamard.construct import hadamard
from lowbit.kernels.hadamard.factorization import Factorization, choose
from lowbit.kernels.hadamard.hartley import fast_hartley
from lowbit.kernels.hadamard.reference import factors

Step = Callable[[Tensor, Tensor], None]  # reads its first argument, writes the second; both flat

_BITS = 5  # powers of two are split into factors of at most 32 ...
_WHOLE = 64  # ... but this one is a single step: 4 x 16 took three times as long
_COLUMNS = 16  # torch.bmm with fewer columns than this takes up to fifty times as long
# Where there would be, a factor k and a power p become one matrix if the k * (p - 1) products a
# value that this adds are at most so many; else the piece is transposed, which costs as much.
_TURN = 192
_FFT_FROM = 1024  # a dense Hartley matrix up to here; the FFT costs as much as about 1000 products
_PIECE = 1 << 17  # values a thread takes at a time: 512 KiB, half of the second-level cache


def apply_by_name(x: Tensor, kind: str, seed: int, inverse: bool) -> Tensor:
    """x: (..., n)  ->  (..., n): B x, or B.T x if inverse"""
    return apply(x, choose(x.shape[-1], kind, seed), inverse)


def _fake(x: Tensor, kind: str, seed: int, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, ctx.kind, ctx.seed, ctx.inverse = inputs  # type: ignore[attr-defined]


def _backward(ctx: FunctionCtx, gradient: Tensor) -> tuple:
    kind, seed, inverse = ctx.kind, ctx.seed, ctx.inverse  # type: ignore[attr-defined]
    return orthogonal_op(gradient, kind, seed, not inverse), None, None, None


# An op, so that torch.compile does not look inside. Not torch.library.custom_op: its first call
# imports torch's compiler (2.5 s), and every call takes 5 us more.
_library = torch.library.Library("lowbit", "FRAGMENT")
_library.define("orthogonal(Tensor x, str kind, int seed, bool inverse) -> Tensor")
_library.impl("orthogonal", apply_by_name, "CompositeExplicitAutograd")
torch.library.register_fake("lowbit::orthogonal", _fake, lib=_library)
torch.library.register_autograd("lowbit::orthogonal", _backward, setup_context=_setup, lib=_library)
orthogonal_op = torch.ops.lowbit.orthogonal.default


def apply(x: Tensor, factorization: Factorization, inverse: bool) -> Tensor:
    """x: (..., n) of any float dtype, any strides  ->  (..., n), contiguous, of the same dtype"""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    steps = _steps(factorization, inverse, dtype, x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not steps:  # n = 1
        return out.copy_(x)
    source, target = x.contiguous().view(-1), out.view(-1)
    size = piece = source.numel()
    if x.device.type == "cpu":
        piece = min(
            size, max(1, _PIECE * torch.get_num_threads() // factorization.n) * factorization.n
        )
    spare = [torch.empty(piece, dtype=dtype, device=x.device) for _ in range(2)]
    if piece == size:
        _run(steps, source, target, spare)
    else:
        for start in range(0, size, piece):
            stop = min(start + piece, size)
            _run(steps, source[start:stop], target[start:stop], [s[: stop - start] for s in spare])
    return out


def _run(steps: tuple[Step, ...], source: Tensor, target: Tensor, spare: list[Tensor]) -> None:
    """Steps write the spares in turn; the last one writes the target if the dtypes agree."""
    there, here = spare
    direct = source.dtype == here.dtype
    if not direct:
        source = here.copy_(source)
    for step in steps[:-1]:
        step(source, there)
        source, here, there = there, there, here
    steps[-1](source, target if direct else there)
    if not direct:
        target.copy_(there)


@lru_cache(maxsize=1024)
def _steps(
    factorization: Factorization, inverse: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Step, ...]:
    """Innermost first. They hold ordinary tensors, whatever mode they are first needed in."""
    with torch.inference_mode(False), torch.no_grad():
        if factorization.kind == "hartley" and factorization.orders[0] > _FFT_FROM:
            matrices, outermost = [], factorization.orders[0]
        else:
            matrices, outermost = factors(factorization), 0
        matrices += [hadamard(k).double() for k in _split(factorization.power)]
        few = 1 < factorization.power < _COLUMNS and len(matrices) > 1
        if few and len(matrices[-2]) * (factorization.power - 1) <= _TURN:
            matrices[-2:] = [torch.kron(*matrices[-2:])]
        if factorization.scale != 1:
            matrices[-1] = matrices[-1] * factorization.scale
        steps: list[Step] = []
        columns = 1
        for matrix in reversed(matrices):
            matrix = (matrix.T if inverse else matrix).to(device, dtype)
            steps.append(_product(matrix, columns))
            columns *= len(matrix)
        if outermost:
            steps.append(partial(_hartley, outermost, columns))
    return tuple(steps)


def _split(power: int) -> list[int]:
    """Factors of a power of two, outermost first: as equal as can be, the largest innermost."""
    bits = power.bit_length() - 1
    if power <= _WHOLE:
        return [power] if power > 1 else []
    count = -(-bits // _BITS)
    return [1 << (bits + i) // count for i in range(count)]


def _product(matrix: Tensor, columns: int) -> Step:
    """The step that multiplies along an axis which has `columns` values on its inner side."""
    k = len(matrix)
    if columns == 1:
        return partial(_inner, matrix.T.contiguous(), k)
    if columns < _COLUMNS:
        return partial(_turned, matrix.T.contiguous(), k, columns)
    return partial(_outer, matrix.contiguous()[None], k, columns)


def _inner(transposed: Tensor, k: int, source: Tensor, target: Tensor) -> None:
    torch.mm(source.view(-1, k), transposed, out=target.view(-1, k))


def _outer(matrix: Tensor, k: int, columns: int, source: Tensor, target: Tensor) -> None:
    rows = source.view(-1, k, columns)
    torch.bmm(matrix.expand(rows.shape[0], k, k), rows, out=target.view(-1, k, columns))


def _turned(transposed: Tensor, k: int, columns: int, source: Tensor, target: Tensor) -> None:
    turned = source.view(-1, k, columns).transpose(1, 2).reshape(-1, k)
    product = torch.mm(turned, transposed, out=torch.empty_like(turned))
    target.view(-1, k, columns).copy_(product.view(-1, columns, k).transpose(1, 2))


def _hartley(order: int, columns: int, source: Tensor, target: Tensor) -> None:
    fast_hartley(source.view(-1, order, columns), target.view(-1, order, columns))
