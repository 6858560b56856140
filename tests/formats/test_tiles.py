import pytest
import torch
from torch import Tensor

from lowbit.formats import tiles
from lowbit.formats.tiles import by_rows, product_dtype

CPU = torch.device("cpu")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[slice]:
    monkeypatch.setattr(tiles, "WEIGHTS_ON_CPU", 20)
    return []


def product(weight: Tensor, x: Tensor, seen: list[slice]) -> Tensor:
    def of(tile: slice, part: Tensor) -> Tensor:
        seen.append(tile)
        assert part.shape == (tile.stop - tile.start, weight.shape[1])
        return x @ part.copy_(weight[tile]).T

    return by_rows((weight.shape[0], weight.shape[1]), CPU, of)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (9, 4), (5, 20), (3, 50), (10, 4)])
def test_every_row_once(rows: int, columns: int, seen: list[slice]) -> None:
    weight, x = torch.randn(rows, columns), torch.randn(3, columns)
    with torch.no_grad():
        found = product(weight, x, seen)
    torch.testing.assert_close(found, x @ weight.T)
    assert [row for tile in seen for row in range(tile.start, tile.stop)] == list(range(rows))
    assert max(tile.stop - tile.start for tile in seen) == min(rows, max(1, 20 // columns))
    assert not found.is_inference()


def test_gradients_of_every_tile(seen: list[slice]) -> None:
    """Tiles have memory of their own then, and nothing that is saved for them is overwritten."""
    weight, x = torch.randn(9, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    target = torch.randn(3, 9)
    found = torch.autograd.grad((product(weight, x, seen) * target).sum(), [weight, x])
    wanted = torch.autograd.grad(((x @ weight.T) * target).sum(), [weight, x])
    assert len(seen) == 2
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("columns", [2048, 5632, 11008, 100, 10**6])
def test_tiles_of_wide_weights_stay_in_the_cache(columns: int) -> None:
    sizes = [tile.stop - tile.start for tile in tiles._tiles(4096, columns, CPU)]
    assert sum(sizes) == 4096
    assert sizes[0] == 1 or 4 * sizes[0] * columns <= 4 << 20  # bytes
    assert sizes[0] <= 16 or sizes[0] % 16 == 0


def test_half_precision_is_multiplied_in_float32_on_a_cpu() -> None:
    found = [product_dtype(torch.empty(0, dtype=dtype)) for dtype in (torch.half, torch.double)]
    assert found == [torch.float32, torch.float64]
    assert product_dtype(torch.empty(0, dtype=torch.half, device="meta")) == torch.float16
