"""Scales of channels that balance an input and the weights that read it."""

import pytest
import torch

from lowbit.blocks import Fold
from lowbit.solvers.balance import balanced_scale

SIZE = 32


def fold(**changes: object) -> Fold:
    fields = {"kind": "norm", "source": "norm", "readers": ("a", "router"), "size": SIZE} | changes
    return Fold(**fields)  # type: ignore[arg-type]


def drawn(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "norm.weight": torch.rand(SIZE, generator=draw) + 0.5,
        "a.weight": torch.randn(8, SIZE, generator=draw) * (torch.rand(SIZE, generator=draw) + 0.1),
        "router.weight": torch.randn(4, SIZE, generator=draw),
    }


def product(scale: torch.Tensor, squares: torch.Tensor, weight: torch.Tensor) -> float:
    """|D^-1 x|^2 |W D|^2"""
    return float((squares / scale.square()).sum() * (weight * scale).square().sum())


def test_no_other_scale_makes_the_product_of_energies_smaller() -> None:
    tensors = drawn()
    squares = tensors["norm.weight"].square() * 3
    scale = balanced_scale(fold(), tensors, {"a": squares}, {"a"})
    least = product(scale, squares, tensors["a.weight"])
    wanted = (squares.sqrt() * tensors["a.weight"].norm(dim=0)).sum().square()
    assert least == pytest.approx(float(wanted), rel=1e-4)
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = scale * torch.exp(0.1 * torch.randn(SIZE, generator=draw))
        assert product(other, squares, tensors["a.weight"]) > least


def test_what_a_norm_multiplies_and_the_weights_divide_does_not_matter() -> None:
    tensors, factor = drawn(), torch.ones(SIZE)
    factor[:3] = 8.0
    scale = balanced_scale(fold(), tensors, {}, {"a"})
    changed = tensors | {
        "norm.weight": tensors["norm.weight"] * factor,
        "a.weight": tensors["a.weight"] / factor,
    }
    found = balanced_scale(fold(), changed, {}, {"a"})
    ratio = found / scale / factor
    assert torch.allclose(ratio, ratio[0].expand(SIZE), rtol=0.05)


def test_channels_without_energy_get_a_finite_scale() -> None:
    tensors = drawn()
    tensors["norm.weight"][5], tensors["a.weight"][:, 7] = 0, 0
    for squares in ({}, {"a": torch.zeros(SIZE)}):
        scale = balanced_scale(fold(), tensors, squares, {"a"})
        assert scale.isfinite().all() and (scale > 0).all() and scale.max() / scale.min() < 2000


def test_columns_that_share_a_channel_count_together() -> None:
    tensors, twice = drawn(), torch.arange(SIZE).repeat(2)
    doubled = tensors | {"a.weight": tensors["a.weight"].repeat(1, 2)}
    plain = balanced_scale(fold(), tensors, {}, {"a"})
    found = balanced_scale(fold(reader_channels=twice), doubled, {}, {"a"})
    torch.testing.assert_close(found, plain)


def test_an_offset_is_a_part_of_the_norms_weight() -> None:
    tensors = drawn()
    shifted = tensors | {"norm.weight": tensors["norm.weight"] - 1}
    found = balanced_scale(fold(offset=1.0), shifted, {}, {"a"})
    torch.testing.assert_close(found, balanced_scale(fold(), tensors, {}, {"a"}))
