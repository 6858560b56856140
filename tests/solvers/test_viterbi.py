"""The Viterbi encoder: the best of all rings, equal bits on all machines."""

import itertools
from functools import cache

import pytest
import torch
from torch import Tensor

from lowbit.kernels.native import available, viterbi
from lowbit.solvers.viterbi import encode

# shift, values
RATES = {"1": (1, 1), "1.5": (3, 2), "2": (2, 1), "2.5": (5, 2), "3": (3, 1), "4": (4, 1)}
every_rate = pytest.mark.parametrize(("shift", "values"), RATES.values(), ids=RATES)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decoded(codes: Tensor, table: Tensor, shift: int) -> Tensor:
    """The values of each sequence, one bit after the other."""
    bits = (codes.unsqueeze(-1) >> torch.arange(8) & 1).flatten(1).long()
    state_bits, count = table.shape[1].bit_length() - 1, bits.shape[1]
    starts = torch.arange(0, count, shift)
    states = sum(bits[:, (starts + i) % count] << i for i in range(state_bits))
    return torch.cat([values[states] for values in table], 1)


def every_ring(table: Tensor, shift: int, weights: int) -> Tensor:
    """The values of all bit strings."""
    octets = weights // len(table) * shift // 8
    codes = torch.tensor(list(itertools.product(range(256), repeat=octets)), dtype=torch.uint8)
    return decoded(codes, table, shift)


SMALL = {  # shift, values, state_bits, weights
    "1 bit": (1, 1, 4, 16),
    "2 bits": (2, 1, 4, 8),
    "1 bit of two values": (2, 2, 4, 16),
}


@pytest.mark.parametrize("case", ["1 bit", "2 bits", "1 bit of two values"])
def test_near_the_best_of_all_rings(case: str) -> None:
    """The ring is closed by a guess, which is right for most sequences and never far off."""
    shift, values, state_bits, weights = SMALL[case]
    table = random(values, 2**state_bits)
    target = random(40, weights, seed=1)
    rings = every_ring(table, shift, weights)
    least = torch.cdist(target, rings).square().amin(1)
    found = decoded(encode(target, table, shift), table, shift)
    lost = (found - target).square().sum(1)
    assert (lost >= least * (1 - 1e-5)).all()
    assert (lost <= least * (1 + 1e-5)).float().mean() > 0.5
    assert lost.sum() < 1.1 * least.sum()


def test_what_a_ring_holds_is_found_again() -> None:
    table = random(1, 2**10)
    codes = torch.randint(0, 256, (20, 64), generator=torch.Generator().manual_seed(2))
    target = decoded(codes.to(torch.uint8), table, 2)
    assert torch.equal(decoded(encode(target, table, 2), table, 2), target)


@every_rate
def test_weights_that_do_not_matter(shift: int, values: int) -> None:
    """NaN leaves the rest more freedom."""
    table, target = random(values, 2**7), random(8, 256)
    both = torch.stack([target, target])
    both[1, :, ::2] = torch.nan
    found = decoded(encode(both.flatten(0, 1), table, shift), table, shift).view(2, 8, -1)
    lost = (found - target)[:, :, 1::2].square().sum((1, 2))
    assert lost[1] < 0.9 * lost[0]


def hard() -> Tensor:
    """Sequences with equal costs, without weights that matter, and with large costs."""
    target = random(5, 256)
    target[1] = target[1].round()
    target[2, 5:77] = torch.nan
    target[3] = 0
    target[4] = 1e20
    return target


def table_of(values: int, state_bits: int) -> Tensor:
    table = random(values, 2**state_bits, seed=3)
    table[:, ::3] = table[:, ::3].round()
    return table


@cache
def by_torch(shift: int, values: int, state_bits: int) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowbit.solvers.viterbi.why_not", lambda: "forced")
        return encode(hard(), table_of(values, state_bits), shift)


@pytest.mark.slow
@pytest.mark.kernels
@every_rate
@pytest.mark.parametrize("instruction_set", available())
def test_the_library_gives_equal_bytes(instruction_set: str, shift: int, values: int) -> None:
    for state_bits in (6, 10):
        found = viterbi.encode(hard(), table_of(values, state_bits), shift, instruction_set)
        assert torch.equal(found, by_torch(shift, values, state_bits))


@pytest.mark.kernels
def test_parts_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    if not available():
        pytest.skip("needs a compiler: the kernels were not compiled")
    table, target = random(1, 2**8), random(9, 256)
    whole = viterbi.encode(target, table, 2)
    with torch.no_grad():
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(viterbi.encode(target, table, 2), whole)
        finally:
            torch.set_num_threads(threads)
    monkeypatch.setattr("lowbit.solvers.viterbi.why_not", lambda: "forced")
    monkeypatch.setattr("lowbit.solvers.viterbi.COSTS_AT_ONCE", 4 * 2**8)
    assert torch.equal(encode(target, table, 2), whole)
