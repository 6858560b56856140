"""The strict device itself: what it refuses, what it counts, and that it computes as the CPU."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from strict_device import Counts, StrictTensor, counted
from torch import Tensor, nn

from lowbit.device import (
    choose_device,
    current_stream,
    deterministic,
    device_kind,
    free_memory,
    is_recorded,
    peak_memory,
    synchronize,
)

DEVICE = "strict:0"  # torch knows no such name until the first test runs


def there(*shape: int) -> Tensor:
    return torch.rand(*shape).to(DEVICE)


REFUSED: dict[str, Callable[[], object]] = {
    "sum of both devices": lambda: there(3) + torch.ones(3),
    "product of both devices": lambda: there(3, 3) @ torch.ones(3, 3),
    "product by a CPU weight": lambda: nn.Linear(3, 2)(there(1, 3)),
    "cat of both devices": lambda: torch.cat([there(3), torch.ones(3)]),
    "stack with a number of the CPU": lambda: torch.stack([there(1)[0], torch.tensor(1.0)]),
    "strict index into a CPU tensor": lambda: torch.ones(3)[there(3).long()],
    "CPU values at an index": lambda: there(3).index_put_((there(2).long(),), torch.ones(2)),
    "CPU index of index_select": lambda: there(3).index_select(0, torch.tensor([1])),
    "CPU index of gather": lambda: there(3).gather(0, torch.tensor([1])),
    "out on the CPU": lambda: torch.mm(there(2, 2), there(2, 2), out=torch.ones(2, 2)),
    "generator of the CPU": lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
    "permutation by a generator of the CPU": lambda: torch.randperm(
        3, device=DEVICE, generator=torch.Generator()
    ),
    "numpy": lambda: there(3).numpy(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses(name: str) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[name]()


TAKEN: dict[str, Callable[[], Tensor]] = {
    "sum with a number of the CPU": lambda: there(3) + torch.tensor(1.0),
    "where with a number of the CPU": lambda: torch.where(
        there(3) > 0.5, there(3), torch.tensor(0.0)
    ),
    "tensor of values": lambda: torch.tensor([[1.0, 2.0]], device=DEVICE),
    "copy of a CPU tensor": lambda: torch.empty(3, device=DEVICE).copy_(torch.ones(3)),
    "as another": lambda: torch.zeros_like(torch.ones(3), device=DEVICE),
    "numbers": lambda: torch.arange(5, device=DEVICE),
    "identity": lambda: torch.eye(3, device=DEVICE),
    "drawn by the device": lambda: torch.randperm(5, device=DEVICE),
    "evenly spaced": lambda: torch.linspace(0, 1, 5, device=DEVICE),
    "a full one": lambda: there(3).new_full((2,), 7.0),
    "resized": lambda: torch.empty(0, device=DEVICE).resize_(4).fill_(1.0),
    "a view": lambda: there(4, 6).T[1:3].unflatten(1, (2, 2)),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_cuda_takes(name: str) -> None:
    made = TAKEN[name]()
    assert isinstance(made, StrictTensor) and made.device == torch.device(DEVICE)
    assert made.cpu().shape == made.shape and type(made.cpu()) is Tensor


COUNTED: dict[str, tuple[Callable[[Tensor], object], Counts]] = {
    "item": (lambda x: x.sum().item(), Counts(ops=2, items=1)),
    "float": (lambda x: float(x[0]), Counts(ops=2, items=1)),
    "bool": (lambda x: bool((x > 0).all()), Counts(ops=3, items=1)),
    "equal": (lambda x: torch.equal(x, x), Counts(ops=1, items=1)),
    "nonzero": (lambda x: x.nonzero(), Counts(ops=1, sizes=1)),
    "mask": (lambda x: x[x > 0], Counts(ops=2, sizes=1)),
    "index on the CPU": (lambda x: x[torch.tensor([0, 1])], Counts(ops=1, index_copies=1)),
    "index on the device": (lambda x: x[torch.zeros_like(x, dtype=torch.int64)], Counts(ops=2)),
    "down": (lambda x: x.cpu(), Counts(ops=1, down=16)),
    "list": (lambda x: x.tolist(), Counts(ops=1, down=16)),
    "up": (lambda x: torch.ones(2).to(x.device), Counts(ops=2, up=8)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_is_counted(name: str) -> None:
    x = there(4)
    compute, wanted = COUNTED[name]
    with counted() as counts:
        compute(x)
    assert counts == wanted


def _trained(device: str) -> tuple[list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 4))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    model = deepcopy(model.to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x = torch.randn(5, 8, generator=draw).to(device)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        out = model(x)
    return [parameter.detach().cpu() for parameter in model.parameters()], out.cpu()


def test_training_gives_the_bytes_of_the_cpu() -> None:
    for one, other in zip(*map(_trained, ("cpu", "strict")), strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_gives_the_bytes_of_the_cpu(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 7, 16, generator=draw).to(dtype) for _ in range(3))
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    attention = nn.functional.scaled_dot_product_attention
    wanted = attention(q, k, v, attn_mask=mask)
    found = attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), attn_mask=mask.to(DEVICE))
    assert torch.equal(found.cpu(), wanted)


def test_half_precision_does_not_vary() -> None:
    """Memory of results is used again at once, as in a model: nothing may read what was there."""
    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        for rows, columns, inner in ((1, 33, 17), (3, 48, 80), (23, 101, 48)):
            x = torch.randn(rows, inner, generator=draw).to(dtype)
            weight = torch.randn(columns, inner, generator=draw).to(dtype)
            wanted = nn.functional.linear(x, weight)
            for _ in range(20):
                torch.full((rows, columns), float("nan"), dtype=dtype)
                found = nn.functional.linear(x.to(DEVICE), weight.to(DEVICE)).cpu()
                assert torch.equal(found, wanted)


def test_what_is_not_deterministic_is_refused_in_a_run() -> None:
    x = there(4)
    with deterministic(x.device):
        assert x.long().cumsum(0).device == x.device
        with pytest.raises(RuntimeError, match="deterministic"):
            x.cumsum(0)
    x.cumsum(0)
    with pytest.raises(ValueError, match="use --device cpu"), deterministic(x.device):
        x.cumsum(0)


def test_lowbit_asks_the_module_of_the_device() -> None:
    assert choose_device("strict") == torch.device("strict")
    device = torch.device(DEVICE)
    assert free_memory(device) == 1 << 34 and peak_memory(device) == 0
    synchronize(device)
    assert current_stream(there(1)) is not None and not is_recorded(there(1))
    assert device_kind(device) == "strict"
