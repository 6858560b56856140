"""The precision of products: chosen for a run, and used only where code asks for it."""

import pytest
import torch

from lowbit.kernels.precision import computing, exact, faster

A = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) / 3
CPU = torch.device("cpu")


def test_products_are_less_precise_only_inside() -> None:
    whole = A @ A.T
    with computing("bfloat16", CPU):
        assert torch.equal(A @ A.T, whole)
        with faster():
            assert (A @ A.T).dtype == torch.bfloat16
            with exact():
                assert torch.equal(A @ A.T, whole)
        with faster(backward=True):
            assert torch.equal(A @ A.T, whole)
    with faster():
        assert torch.equal(A @ A.T, whole)


@pytest.mark.parametrize(("context", "allowed"), [(faster, True), (exact, False)])
def test_tf32_is_switched_and_switched_back(context, allowed: bool) -> None:
    flags = torch.backends.cuda.matmul
    for before in (False, True):
        flags.allow_tf32 = before
        try:
            with computing("tf32", torch.device("cuda")):
                assert flags.allow_tf32 == before
                with pytest.raises(ValueError, match="stop"), context():
                    assert flags.allow_tf32 == allowed
                    raise ValueError("stop")
                assert flags.allow_tf32 == before
        finally:
            flags.allow_tf32 = False
