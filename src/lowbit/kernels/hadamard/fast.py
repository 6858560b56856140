"""Computes the transform as a few small matrix products, in pieces that stay in the cache.

A row is viewed as a row-major tensor with one axis for each factor of B; a step multiplies along
one axis. Add-and-subtract butterflies are no faster for many rows, and take twice as long for one
row: a product with a 16 x 16 matrix costs as much as four passes of additions
(benchmarks/hadamard.py).

The computation is in float32, or in float64 for float64 inputs. Products are written with `out`,
which autocast does not change. On CUDA, torch's TF32 switch applies to them as to any product:
leave it off. The last bits of a row may depend on the number of rows, as in torch's own products.
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
_WHOLE = 64  # ... but up to this one, there is one step: for 64, 4 x 16 took three times as long
_COLUMNS = 16  # torch.bmm with fewer columns than this takes up to fifty times as long
# To avoid that, a factor k and a power p are joined to one matrix if this adds at most so many
# products per value, k * (p - 1). Otherwise the piece is transposed, which costs as much.
_TRANSPOSE = 192
_FFT_FROM = 1024  # above this order, an FFT is cheaper than a dense Hartley matrix
_PIECE = 1 << 17  # values a thread takes at a time: 512 KiB, half of the second-level cache


def apply_by_name(x: Tensor, kind: str, seed: int, inverse: bool) -> Tensor:
    """Computes B x, or B.T x if inverse. x: (..., n) -> (..., n)"""
    return apply(x, choose(x.shape[-1], kind, seed), inverse)


def _fake(x: Tensor, kind: str, seed: int, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, ctx.kind, ctx.seed, ctx.inverse = inputs  # type: ignore[attr-defined]


def _backward(ctx: FunctionCtx, gradient: Tensor) -> tuple:
    kind, seed, inverse = ctx.kind, ctx.seed, ctx.inverse  # type: ignore[attr-defined]
    return orthogonal_op(gradient, kind, seed, not inverse), None, None, None


# A custom op, so that torch.compile does not trace it. It is not made by torch.library.custom_op,
# whose first call imports torch's compiler (2.5 s) and whose calls take 5 us more.
_library = torch.library.Library("lowbit", "FRAGMENT")
_library.define("orthogonal(Tensor x, str kind, int seed, bool inverse) -> Tensor")
_library.impl("orthogonal", apply_by_name, "CompositeExplicitAutograd")
torch.library.register_fake("lowbit::orthogonal", _fake, lib=_library)
torch.library.register_autograd("lowbit::orthogonal", _backward, setup_context=_setup, lib=_library)
orthogonal_op = torch.ops.lowbit.orthogonal.default


def apply(x: Tensor, factorization: Factorization, inverse: bool) -> Tensor:
    """Computes B x, or B.T x if inverse, along the last dimension.

    x: (..., n) of any float dtype and any strides.

    Returns (..., n), contiguous, of the same dtype.
    """
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
    """Runs the steps from source to target.

    Steps write to the two spare buffers in turn. The last step writes to the target directly if the
    dtypes agree.
    """
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
    """Returns the steps of a transform, innermost first.

    Their matrices are never inference tensors, because steps are cached and used in every mode.
    """
    with torch.inference_mode(False), torch.no_grad():
        if factorization.kind == "hartley" and factorization.orders[0] > _FFT_FROM:
            matrices, outermost = [], factorization.orders[0]
        else:
            matrices, outermost = factors(factorization), 0
        matrices += [hadamard(k).double() for k in _split(factorization.power)]
        few = 1 < factorization.power < _COLUMNS and len(matrices) > 1
        if few and len(matrices[-2]) * (factorization.power - 1) <= _TRANSPOSE:
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
    """Splits a power of two into nearly equal factors: outermost first, the largest innermost."""
    bits = power.bit_length() - 1
    if power <= _WHOLE:
        return [power] if power > 1 else []
    count = -(-bits // _BITS)
    return [1 << (bits + i) // count for i in range(count)]


def _product(matrix: Tensor, columns: int) -> Step:
    """Returns the step that multiplies along an axis; `columns` is the size of all inner axes."""
    k = len(matrix)
    if columns == 1:
        return partial(_inner, matrix.T.contiguous(), k)
    if columns < _COLUMNS:
        return partial(_transposed, matrix.T.contiguous(), k, columns)
    return partial(_outer, matrix.contiguous()[None], k, columns)


def _inner(transposed: Tensor, k: int, source: Tensor, target: Tensor) -> None:
    torch.mm(source.view(-1, k), transposed, out=target.view(-1, k))


def _outer(matrix: Tensor, k: int, columns: int, source: Tensor, target: Tensor) -> None:
    rows = source.view(-1, k, columns)
    torch.bmm(matrix.expand(rows.shape[0], k, k), rows, out=target.view(-1, k, columns))


def _transposed(transposed: Tensor, k: int, columns: int, source: Tensor, target: Tensor) -> None:
    rows = source.view(-1, k, columns).transpose(1, 2).reshape(-1, k)
    product = torch.mm(rows, transposed, out=torch.empty_like(rows))
    target.view(-1, k, columns).copy_(product.view(-1, columns, k).transpose(1, 2))


def _hartley(order: int, columns: int, source: Tensor, target: Tensor) -> None:
    fast_hartley(source.view(-1, order, columns), target.view(-1, order, columns))
