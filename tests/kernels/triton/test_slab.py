"""A slab rounded in one kernel is the one that torch rounds column by column."""

import pytest
import torch
from torch import Tensor

from lowbit.kernels.triton.slab import SlabGrid, round_slab


def by_torch(
    weight: Tensor, target: Tensor, factor: Tensor, grid: SlabGrid
) -> tuple[Tensor, Tensor]:
    """The definition in float64, rounding each column of the same targets."""
    codes, error = torch.zeros_like(weight), torch.zeros_like(weight)
    for k in range(weight.shape[1] - 1, -1, -1):
        group = int(grid.group_of[k])
        scale, zero = grid.scale[:, group].double(), grid.zero[:, group].double()
        wanted = target[:, k] + error[:, k + 1 :] @ factor[k + 1 :, k]
        fraction = zero % 1
        codes[:, k] = ((wanted / scale + fraction).round() + zero - fraction).clamp(0, grid.top)
        error[:, k] = weight[:, k] - scale * (codes[:, k] - zero)
    return codes, weight - error


@pytest.mark.parametrize(
    ("rows", "columns", "size"), [(16, 128, 32), (21, 37, 16), (1, 1, 1), (5, 20, 20)]
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_definition(rows: int, columns: int, size: int, bits: int) -> None:
    draw = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=draw)
    target = weight + 0.1 * torch.randn(rows, columns, generator=draw)
    factor = 0.1 * torch.randn(columns, columns, generator=draw).tril(-1) + torch.eye(columns)
    groups = -(-columns // size)
    top = 2**bits - 1
    grid = SlabGrid(
        4 * (torch.rand(rows, groups, generator=draw) + 0.5) / top,
        torch.randint(0, 4 * top, (rows, groups), generator=draw) / 4,
        (torch.arange(columns) // size).int()[torch.randperm(columns, generator=draw)],
        top,
    )
    codes, values = round_slab(weight, target, factor, grid)
    wanted, of_torch = by_torch(weight.double(), target.double(), factor.double(), grid)
    same = (codes == wanted).float().mean()
    assert same > 0.99, float(same)
    rows_alike = (codes == wanted).all(1)
    assert rows_alike.any()
    torch.testing.assert_close(
        values[rows_alike].double(), of_torch[rows_alike], rtol=1e-5, atol=1e-5
    )
    each = grid.group_of.long()
    shown = grid.scale[:, each] * (codes.float() - grid.zero[:, each])
    torch.testing.assert_close(values, shown, rtol=1e-6, atol=1e-6)
