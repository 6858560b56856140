"""A device "strict" for tests: memory of the CPU, and a GPU's rules on which tensors may meet.

A strict tensor holds a CPU tensor, and torch's CPU kernels compute on that. So whatever runs there
gives the bytes that it gives on the CPU, unless the code asks where it runs. What CUDA refuses is
refused: an operation on tensors of both devices, the generator of another device, numpy. What a GPU
has to wait for is counted.

It is built on torch's experimental way to write a backend in Python. It has no torch.compile and no
graphs, and time on it means nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils import backend_registration
from torch.utils._device import _device_constructors
from torch.utils._mode_utils import no_dispatch

NAME = "strict"
HAS_API = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
MEMORY = 1 << 34  # bytes that the device says it has

aten = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy, aten._copy_from, aten._copy_from_and_resize}
INDEXING = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# Operations that take a CPU tensor without dimensions beside tensors of CUDA, besides those that
# torch marks as pointwise. cat, stack, mm, gather and so on do not.
TAKES_A_NUMBER = {aten.where, aten.masked_fill, aten.masked_fill_, aten.fill, aten.fill_}
WAITS = {aten._local_scalar_dense, aten.equal, aten.is_nonzero}  # for a value that Python reads
SIZES = {  # for the number of elements of the result
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave,
}
# Operations that CUDA refuses while torch.use_deterministic_algorithms holds, as its page lists.
NOT_DETERMINISTIC = {
    aten.cumsum.default,  # of floats
    aten.histc.default,
    aten.median.dim,
    aten.nll_loss2d_forward.default,
    aten.put_.default,
}


@dataclass
class Counts:
    """What has happened on the device.

    ops: operations.
    items: values that Python waited for: item(), float(x), bool(x), torch.equal.
    sizes: results whose size Python waited for: nonzero, unique, x[mask].
    index_copies: indices on the CPU into a strict tensor, each of which CUDA copies and waits for.
    up, down: bytes copied to the device and from it.
    """

    ops: int = 0
    items: int = 0
    sizes: int = 0
    index_copies: int = 0
    up: int = 0
    down: int = 0


FROM_VALUES = ("tensor", "as_tensor", "asarray")
_counts: list[Counts] = []  # of every `counted` that is open
_on = [False]


class StrictTensor(Tensor):
    """A tensor on the strict device.

    held: the CPU tensor that it holds, of the same shape and strides.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: Tensor, requires_grad: bool | None = None) -> "StrictTensor":
        if requires_grad is not None:  # accelerate calls the class of a parameter so
            return torch.nn.Parameter(real, requires_grad)
        with torch.inference_mode(real.is_inference()):
            made = Tensor._make_wrapper_subclass(
                cls,
                real.shape,
                strides=real.stride(),
                storage_offset=real.storage_offset(),
                dtype=real.dtype,
                layout=real.layout,
                device=torch.device(NAME, 0),
            )
        made.held = real
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return handle(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)
        self.held = value.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()  # whose address tells which tensors share memory

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor.__getitem__(self, self._at(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        Tensor.__setitem__(self, self._at(index), value)

    def _at(self, index: Any) -> Any:
        """Returns an index with tensors in the place of lists, which torch would make itself."""
        if isinstance(index, tuple):
            return tuple(map(self._at, index))
        return torch.tensor(index, device=self.device) if isinstance(index, list) else index

    def new_tensor(self, data: Any, dtype: Any = None, **options: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, **{"device": self.device} | options)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> "StrictTensor":
        if id(self) in memo:
            return memo[id(self)]
        copied = StrictTensor(self.held.clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    def __repr__(self, **_: Any) -> str:
        return f"StrictTensor({self.held!r})"


def handle(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Computes an operation on the CPU tensors inside strict tensors, if a GPU would take it."""
    packet = getattr(func, "overloadpacket", func)
    if packet is aten.scaled_dot_product_attention:
        return attention(*args, **kwargs)
    if torch.is_inference_mode_enabled():  # operations that consist of others arrive whole
        found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
    leaves = _leaves((*args, *kwargs.values()))
    inside = [leaf for leaf in leaves if isinstance(leaf, StrictTensor)]
    named = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    stays = named.type == NAME if named is not None else bool(inside)
    _check(func, packet, args, leaves, stays)
    _count(packet, args, inside, stays)
    args = [_map(_inner, value) for value in args]
    kwargs = {name: _map(_inner, value) for name, value in kwargs.items()}
    if packet in (aten._copy_from, aten._copy_from_and_resize):
        func, args = aten.copy_.default, (args[1], args[0])
    with torch._C._AutoDispatchBelowAutograd():
        out = func(*args, **kwargs)
    for leaf in inside:
        _follow(leaf)
    if not stays:
        return out
    same = {id(_inner(leaf)): leaf for leaf in leaves if isinstance(leaf, Tensor)}

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return same[id(value)] if id(value) in same else StrictTensor(value)

    return _map(outer, out)


def _leaves(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found += _leaves(value) if isinstance(value, list | tuple) else [value]
    return found


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)([_map(function, each) for each in value])
    return function(value)


def _inner(leaf: Any) -> Any:
    if isinstance(leaf, StrictTensor):
        return leaf.held
    ours = isinstance(leaf, torch.device) and leaf.type == NAME
    return torch.device("cpu") if ours else leaf


def _follow(tensor: StrictTensor) -> None:
    """Gives a tensor the shape that an operation in place has given to the one that it holds."""
    real = tensor.held
    if tensor.shape == real.shape and tensor.stride() == real.stride():
        return
    with no_dispatch():
        before = torch._C._meta_in_tls_dispatch_include()
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            aten.set_.source_Storage_storage_offset(
                tensor,
                Tensor.untyped_storage(tensor),
                real.storage_offset(),
                real.shape,
                real.stride(),
            )
        finally:
            torch._C._set_meta_in_tls_dispatch_include(before)


def _check(func: Any, packet: Any, args: Any, leaves: list[Any], stays: bool) -> None:
    """Raises RuntimeError where CUDA does."""
    for leaf in leaves:
        if stays and isinstance(leaf, torch.Generator) and leaf.device.type == "cpu":
            raise RuntimeError(f"{func}: expected a generator of {NAME}, but it is of the cpu")
    if stays and func in NOT_DETERMINISTIC and torch.are_deterministic_algorithms_enabled():
        if packet is not aten.cumsum or args[0].is_floating_point():
            raise RuntimeError(f"{func} does not have a deterministic implementation")
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    outside = [tensor for tensor in tensors if not isinstance(tensor, StrictTensor)]
    if not outside or len(outside) == len(tensors) or packet in COPIES:
        return
    if packet in INDEXING and isinstance(args[0], StrictTensor):
        outside = [value for value in args[2:3] if not isinstance(value, StrictTensor)]
        if all(value.dim() == 0 for value in outside):
            return
    pointwise = torch.Tag.pointwise in func.tags and len(tensors) <= 2
    takes_a_number = packet in TAKES_A_NUMBER or pointwise
    if not takes_a_number or any(tensor.dim() for tensor in outside):
        shapes = ", ".join(f"{tensor.device.type} {list(tensor.shape)}" for tensor in tensors)
        raise RuntimeError(f"{func}: expected all tensors on the same device, but got {shapes}")


def _count(packet: Any, args: Any, inside: list[StrictTensor], stays: bool) -> None:
    up = down = index_copies = masks = 0
    if packet in COPIES and packet is not aten._to_copy:
        into, source = args[:2] if packet is aten.copy_ else (args[1], args[0])
        if not isinstance(source, StrictTensor):
            up = source.nbytes
        elif not isinstance(into, StrictTensor):
            down = source.nbytes
    elif inside and not stays:
        down = sum(tensor.nbytes for tensor in inside)
    if packet in INDEXING and isinstance(args[0], StrictTensor):
        indices = [index for index in args[1] if index is not None]
        index_copies = sum(not isinstance(index, StrictTensor) for index in indices)
        masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
    for counts in _counts:
        counts.ops += 1
        counts.items += packet in WAITS
        counts.sizes += packet in SIZES or masks
        counts.index_copies += index_copies
        counts.up += up
        counts.down += down


@contextmanager
def counted() -> Iterator[Counts]:
    """Counts what happens on the device in this context."""
    counts = Counts()
    _counts.append(counts)
    try:
        yield counts
    finally:
        _counts.remove(counts)


@contextmanager
def available() -> Iterator[None]:
    """Makes torch find the device in this context; elsewhere it says that it is not available."""
    _on[0] = True
    made_by = {name: getattr(torch, name) for name in FROM_VALUES}
    for name, make in made_by.items():
        setattr(torch, name, _from_values(make))
    try:
        yield
    finally:
        _on[0] = False
        for name, make in made_by.items():
            setattr(torch, name, make)


def _from_values(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns torch.tensor or the like, which torch's dispatcher does not hand to the device."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(*args, device=device, **kwargs)
        return make(*args, device="cpu", **kwargs).to(device)

    return made


class _Stream:
    """The only stream of the device."""

    def synchronize(self) -> None:
        pass


def _module() -> ModuleType:
    """Returns what torch.cuda is for CUDA."""
    module, stream = ModuleType(f"torch.{NAME}"), _Stream()
    module.is_available = lambda: _on[0]
    module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed = module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.synchronize = lambda device=None: None
    module.empty_cache = lambda: None
    module.mem_get_info = lambda device=None: (MEMORY, MEMORY)
    module.max_memory_allocated = module.memory_allocated = lambda device=None: 0
    module.reset_peak_memory_stats = lambda device=None: None
    module.current_stream = lambda device=None: stream
    module.is_current_stream_capturing = lambda: False
    module.is_bf16_supported = lambda: True
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    return module


def _register() -> list[torch.library.Library]:
    """Makes the device known to torch, once in a process: this cannot be undone.

    It must be done before the first backward pass, which starts a thread for each known device.

    Returns registrations, which end when they are freed.
    """
    # torch notes which functions `with torch.device("meta")` changes when it first needs them. If
    # ours were noted, buffers of models would stay uninitialised: their values would vary from run
    # to run, and often be right as long as no freed memory is used again.
    _device_constructors()
    backend_registration._setup_privateuseone_for_python_backend(NAME, _module())
    everything, ours = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_compute, "PrivateUse1")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and all(
            torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
            for key in ("CPU", "CompositeImplicitAutograd", "Autograd")
        ):  # the CPU has a kernel, and torch would put several operations in its place elsewhere
            ours.impl(name.removeprefix("aten::"), _kernel(name), "PrivateUse1")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        ours.impl("scaled_dot_product_attention", attention, key)
    return [everything, ours]


def _compute(func: Any, *args: Any, **kwargs: Any) -> Any:
    return handle(func, args, kwargs)


def _kernel(name: str) -> Callable[..., Any]:
    packet, _, overload = name.removeprefix("aten::").partition(".")
    return partial(_compute, getattr(getattr(aten, packet), overload or "default"))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the kernel that the CPU would choose, which torch does not ask other devices."""
    inner = [_inner(tensor) for tensor in (query, key, value, attn_mask)]
    options = {"scale": scale, "enable_gqa": enable_gqa}
    with torch._C._AutoDispatchBelowAutograd():
        chosen = aten._fused_sdp_choice(*inner, dropout_p, is_causal, **options)
    if chosen != SDPBackend.FLASH_ATTENTION.value:
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, **options
        )[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
            ~attn_mask, -torch.inf
        )
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


_libraries = _register() if HAS_API else []
