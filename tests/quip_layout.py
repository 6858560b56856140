"""The layout of QuIP-for-all and AutoQuIP in plain Python: words, layers and whole checkpoints."""

import json
from collections.abc import Callable
from functools import cache, reduce
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HALVES = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 045 067 "
    "057 047 056 046 014 237"
)
POSITIONS = [7, 5, 6, 4, 3, 1, 2, 0]


@cache
def all_e8p() -> Tensor:
    sizes = sorted(p for p in product((0.5, 1.5, 2.5), repeat=8) if sum(v * v for v in p) <= 10)
    assert len(sizes) == 227
    for halves in HALVES.split():
        size = [1.5] * 8
        for place in halves:
            size[int(place)] = 0.5
        sizes.append(tuple(size))
    words = []
    for code in range(2**16):
        size, low = sizes[code >> 8], code & 255
        parity = low.bit_count() & 1
        word = [-v if (low ^ parity) >> POSITIONS[i] & 1 else v for i, v in enumerate(size)]
        if sum(size) % 2:
            word[7] = -word[7]
        words.append([v + 0.25 - parity / 2 for v in word])
    return torch.tensor(words)


@cache
def all_e8() -> Tensor:
    whole = [p for p in product(range(-1, 2), repeat=8) if sum(v * v for v in p) in (0, 2)]
    halves = [p for p in product((-0.5, 0.5), repeat=8) if sum(p) % 2 == 0]
    assert (len(whole), len(halves)) == (113, 128)
    plus = [[2.0 * (i == j) for j in range(8)] for i in range(8)]
    minus = [[-2.0 * (i == j) for j in range(8)] for i in range(7)]
    return torch.tensor([*sorted(whole), *sorted(halves), *plus, *minus]).float()


# The magnitudes of the 32 patterns of D4, doubled.
D4 = (
    "1111 3333 1133 3311 1313 3131 1331 3113 3111 1311 1131 1113 1333 3133 3313 3331 "
    "5111 1511 1151 1115 3511 5311 5131 5113 3151 1351 1531 1513 3115 1315 1135 1153"
).split()


@cache
def all_d4() -> Tensor:
    words = []
    for code in range(256):
        word = [int(digit) / 2 for digit in D4[code & 31]]
        word[2] *= -1 if code & 32 else 1
        word[1] *= -1 if code & 64 else 1
        word[3] *= -1 if sum(word) % 2 else 1
        words.append([-v for v in word] if code & 128 else word)
    return torch.tensor(words)


def words(codebook: str, stored: Tensor, ratio: float = 1.0) -> Tensor:
    """C, the weights over sigma: (out, in).  ratio: of the second stage"""
    rows = len(stored)
    if codebook == "HI":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        made = torch.empty(rows, stored.shape[1], 8)
        for i, element in enumerate(order):
            made[..., element] = (stored.long() >> 4 * i & 15) - 7.5
        return made.view(rows, -1)
    if codebook == "D4":
        return all_d4()[stored.long()].view(rows, -1)
    if codebook == "E8P12":
        return all_e8p()[stored.long() & 0xFFFF].view(rows, -1)
    if codebook == "E8P12RVQ4B":
        first, second = all_e8p()[stored.long() >> 16 & 0xFFFF], all_e8p()[stored.long() & 0xFFFF]
    else:
        triple = stored.contiguous().view(torch.uint8).long().view(rows, -1, 3)
        first = all_e8p()[triple[..., 1] + 256 * triple[..., 2]]
        second = all_e8()[triple[..., 0]]
    return (first + torch.tensor(ratio).float() * second).view(rows, -1)


STORED = {  # dtype, and numbers for each weight of a row
    "E8P12": (torch.int16, 1 / 8),
    "E8P12RVQ3B": (torch.int32, 3 / 32),
    "E8P12RVQ4B": (torch.int32, 1 / 8),
    "D4": (torch.uint8, 1 / 4),
    "HI": (torch.int32, 1 / 8),
}


def odd(width: int) -> int:
    return width // (width & -width)


def layer(codebook: str, rows: int, columns: int, draw: torch.Generator) -> dict[str, Tensor]:
    """A layer of random codes; factors where a width needs one."""
    dtype, share = STORED[codebook]
    limits = torch.iinfo(dtype)
    size = (rows, round(columns * share))
    made = {
        "Qidxs": torch.randint(limits.min, limits.max + 1, size, generator=draw).to(dtype),
        "SU": signs(columns, draw).half(),
        "SV": signs(rows, draw).half(),
        "Wscale": torch.rand((), generator=draw) * 0.1 + 0.05,
        "weight": torch.zeros(()),
    }
    for name, order in (("had_left", odd(columns)), ("had_right", odd(rows))):
        if order > 1:
            gaussian = torch.randn(order, order, generator=draw)
            made[name] = torch.linalg.qr(gaussian).Q.contiguous().half()
    return made


def signs(size: int, draw: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (size,), generator=draw) * 2.0 - 1


def run(parts: dict[str, Tensor], codebook: str, x: Tensor, ratio: float = 1.0) -> Tensor:
    """What their layer computes, in float64.  x: (tokens, in)  ->  (tokens, out)"""
    product = words(codebook, parts["Qidxs"], ratio).double()
    rows, columns = product.shape
    sigma = parts["Wscale"].double().reshape(-1, 1)
    left = dense(columns, parts.get("had_left"))
    right = dense(rows, parts.get("had_right"))
    x = x.double() * parts.get("SU", torch.ones(())).double()
    y = right @ (sigma * product) @ left.T @ x.T
    y = y.T * parts.get("SV", torch.ones(())).double()
    return y + parts["bias"].double() if "bias" in parts else y


def dense(width: int, factor: Tensor | None) -> Tensor:
    """B: a row as K x p, Sylvester's matrix along p, then the factor along K."""
    power = width & -width
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double() / 2**0.5
    sylvester = reduce(torch.kron, [two] * (power.bit_length() - 1), torch.ones(1, 1).double())
    return sylvester if factor is None else torch.kron(factor.double(), sylvester)


Edit = Callable[[str, dict[str, Tensor]], None]


def rewrite(
    folder: Path, codebook: str, edit: Edit = lambda name, parts: None, **section: Any
) -> dict[str, dict[str, Tensor]]:
    """Makes a float folder one of theirs, in place: every matrix in its blocks is random codes.

    edit: changes the parts of a layer.  ->  the parts of every layer
    """
    state = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    layers: dict[str, dict[str, Tensor]] = {}
    for name in [n for n in state if ".layers." in n and n.endswith("_proj.weight")]:
        owner = name.removesuffix(".weight")
        parts = layer(codebook, *state.pop(name).shape, draw)
        if f"{owner}.bias" in state:
            parts["bias"] = state.pop(f"{owner}.bias")
        edit(owner, parts)
        layers[owner] = parts
        state |= {f"{owner}.{part}": tensor for part, tensor in parts.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "QUiP",
        "rescale_WH": False,
        "use_rand": True,
        "codebook": codebook,
        "codesz": {"D4": 4, "HI": 1}.get(codebook, 8),
        "idx_dtype": str(STORED[codebook][0]),
        "merge_suv": False,
        "per_channel": False,
        "opt_resid_scale": -1,
        "modules_to_not_convert": None,
    } | section
    (folder / "config.json").write_text(json.dumps(config))
    return layers
