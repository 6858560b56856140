"""The operator that multiplies by packed layers."""

import ctypes

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lowbit.kernels.native.library import INSTRUCTION_SETS, chosen, functions, threads

_NUMBERS = {name: number for number, name in enumerate(INSTRUCTION_SETS)}


def multiply(
    x: Tensor, layers: list[Tensor], outputs: list[int], instruction_set: str | None = None
) -> list[Tensor]:
    """Multiplies by one or more packed layers, which read the same input.

    Layers that round it in the same way share the rounded input.

    x: (..., inputs) of a float dtype; the product computes in float32.
    layers: results of `pack_layer` for this instruction set.
    outputs: rows of each layer.
    instruction_set: None: that of `chosen`.

    Returns a float32 tensor (..., rows) for each layer. Each is the same, to the last bit, for
    every number of tokens and threads and for every instruction set.
    """
    name = instruction_set or chosen()
    if x.dtype != torch.float32:
        x = x.float()
    width = x.shape[-1]
    shape, tokens = x.shape[:-1], x.numel() // max(1, width)
    if not x.is_contiguous() and (x.dim() != 2 or x.stride(1) != 1):
        x = x.contiguous()
    results = [x.new_empty((*shape, count)) for count in outputs]
    if not x.numel():
        return [result.zero_() for result in results]
    pointers = ctypes.c_void_p * len(layers)
    failed = functions().lowbit_multiply(
        x.data_ptr(),
        tokens,
        x.stride(0) if x.dim() == 2 else width,
        _NUMBERS[name],
        len(layers),
        pointers(*[layer.data_ptr() for layer in layers]),
        pointers(*[result.data_ptr() for result in results]),
        threads.loop,
    )
    if failed:
        raise MemoryError(f"a product of {tokens} tokens needs more memory than there is")
    return results


# torch.compile cannot trace calls of ctypes. `Library.define` costs 7 us a call, a custom_op 10.
_LIBRARY = torch.library.Library("lowbit_native", "DEF")
_LIBRARY.define("multiply(Tensor x, Tensor[] layers, int[] outputs) -> Tensor[]")


def _multiply(x: Tensor, layers: list[Tensor], outputs: list[int]) -> list[Tensor]:
    return multiply(x, layers, outputs)


def _shapes(x: Tensor, layers: list[Tensor], outputs: list[int]) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], count), dtype=torch.float32) for count in outputs]


_LIBRARY.impl("multiply", _multiply, "CPU")
_LIBRARY.impl("multiply", _shapes, "Meta")
_OPERATOR = torch.ops.lowbit_native.multiply.default


def multiply_op(x: Tensor, layers: list[Tensor], outputs: list[int]) -> list[Tensor]:
    """Multiplies as `multiply` does, as an operator of torch where something must see one."""
    if _is_alone(x):
        return multiply(x, layers, outputs)
    result: list[Tensor] = _OPERATOR(x, layers, outputs)
    return result


def _is_alone(x: Tensor) -> bool:
    """Whether no compiler, tracer, transform, mode or profiler needs to see an operator."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not is_in_torch_dispatch_mode()
        and not torch._C._is_tracing()
        and torch._C._functorch.maybe_current_level() is None
        and not torch.autograd._profiler_enabled()
    )
