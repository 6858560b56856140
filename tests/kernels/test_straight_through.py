import torch

from lowbit.kernels.straight_through import round_ste


def test_round_ste() -> None:
    x = torch.tensor([-1.5, 0.4, 0.5, 2.6], requires_grad=True)
    y = round_ste(x)
    assert y.tolist() == [-2, 0, 0, 3]  # ties to even, as torch.round
    y.backward(torch.tensor([1.0, 2, 3, 4]))
    assert x.grad.tolist() == [1, 2, 3, 4]
