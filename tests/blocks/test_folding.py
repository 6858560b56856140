"""Exactness on whole blocks is in tests/models/test_models.py; here, every kind by hand."""

import pytest
import torch
from torch import Tensor, nn

from lowbit.blocks import Fold
from lowbit.blocks.folding import Tensors, apply_fold, apply_folds, load_changed, tensors_of

GQA = torch.tensor([0, 1, 0, 1])  # one key head of two channels, read by two query heads
S = torch.tensor([2.0, 4.0])


def tensors(seed: int = 0, **shapes: tuple[int, ...]) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {n.replace("__", "."): torch.randn(s, generator=draw) for n, s in shapes.items()}


def check(before: Tensors, after: Tensors, wanted: Tensors) -> None:
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, wanted.get(name, before[name]), msg=name)


def test_a_norm_and_its_readers() -> None:
    t = tensors(n__weight=(2,), n__bias=(2,), a__weight=(3, 2), b__weight=(1, 2), c__weight=(2, 2))
    wanted = {
        "n.weight": t["n.weight"] / S,
        "n.bias": t["n.bias"] / S,
        "a.weight": t["a.weight"] * S,
        "b.weight": t["b.weight"] * S,
    }
    check(t, apply_fold(t, Fold("norm", "n", ("a", "b"), 2), S), wanted)


def test_a_shift_moves_into_the_biases() -> None:
    t = tensors(n__weight=(2,), n__bias=(2,), a__weight=(3, 2), a__bias=(3,))
    shift = torch.tensor([0.5, -1.0])
    wanted = {
        "n.weight": t["n.weight"] / S,
        "n.bias": (t["n.bias"] - shift) / S,
        "a.weight": t["a.weight"] * S,
        "a.bias": t["a.bias"] + t["a.weight"] @ shift,
    }
    fold = Fold("norm", "n", ("a",), 2, shiftable=True)
    check(t, apply_fold(t, fold, S, shift), wanted)
    with pytest.raises(ValueError, match="fold n>a cannot absorb a shift: .* has no bias"):
        apply_fold(t, Fold("norm", "n", ("a",), 2), S, shift)


def test_values_into_the_output_of_grouped_query_attention() -> None:
    t = tensors(v__weight=(2, 3), v__bias=(2,), o__weight=(3, 4), o__bias=(3,))
    shift = torch.tensor([0.5, -1.0])
    wanted = {
        "v.weight": t["v.weight"] / S[:, None],
        "v.bias": (t["v.bias"] - shift) / S,
        "o.weight": t["o.weight"] * S[GQA],
        "o.bias": t["o.bias"] + t["o.weight"] @ shift[GQA],
    }
    fold = Fold("values", "v", ("o",), 2, reader_channels=GQA, shiftable=True)
    check(t, apply_fold(t, fold, S, shift), wanted)


def test_rows_of_a_fused_matrix() -> None:
    t = tensors(qkv__weight=(6, 3), qkv__bias=(6,), o__weight=(3, 2), o__bias=(3,))
    rows, shift = torch.tensor([5, 2]), torch.tensor([0.5, -1.0])
    weight, bias = t["qkv.weight"].clone(), t["qkv.bias"].clone()
    weight[rows] /= S[:, None]
    bias[rows] = (bias[rows] - shift) / S
    wanted = {
        "qkv.weight": weight,
        "qkv.bias": bias,
        "o.weight": t["o.weight"] * S,
        "o.bias": t["o.bias"] + t["o.weight"] @ shift,
    }
    fold = Fold("values", "qkv", ("o",), 2, source_rows=rows, shiftable=True)
    check(t, apply_fold(t, fold, S, shift), wanted)


def test_queries_against_keys() -> None:
    t = tensors(q__weight=(4, 3), q__bias=(4,), k__weight=(2, 3))
    fold = Fold("rotary", "q", ("k",), 2, source_channels=GQA, reader_channels=torch.tensor([0, 1]))
    wanted = {
        "q.weight": t["q.weight"] / S[GQA][:, None],
        "q.bias": t["q.bias"] / S[GQA],
        "k.weight": t["k.weight"] * S[:, None],
    }
    check(t, apply_fold(t, fold, S), wanted)


def test_queries_against_keys_in_one_matrix() -> None:
    t = tensors(qkv__weight=(5, 3), qkv__bias=(5,))
    fold = Fold(
        "rotary",
        "qkv",
        ("qkv",),
        1,
        source_rows=torch.tensor([0, 2]),
        source_channels=torch.tensor([0, 0]),
        reader_rows=torch.tensor([3, 1]),
        reader_channels=torch.tensor([0, 0]),
    )
    factor = torch.tensor([0.5, 2, 0.5, 2, 1])
    wanted = {"qkv.weight": t["qkv.weight"] * factor[:, None], "qkv.bias": t["qkv.bias"] * factor}
    check(t, apply_fold(t, fold, S[:1]), wanted)


def test_queries_against_keys_through_their_norms() -> None:
    t = tensors(q_norm__weight=(4,), k_norm__weight=(4,))
    pairs = torch.tensor([0, 1, 0, 1])
    fold = Fold("rotary", "q_norm", ("k_norm",), 2, source_channels=pairs, reader_channels=pairs)
    wanted = {
        "q_norm.weight": t["q_norm.weight"] / S[pairs],
        "k_norm.weight": t["k_norm.weight"] * S[pairs],
    }
    check(t, apply_fold(t, fold, S), wanted)


def test_nothing_that_is_given_changes() -> None:
    t = tensors(n__weight=(2,), n__bias=(2,), a__weight=(3, 2), a__bias=(3,))
    kept = {name: tensor.clone() for name, tensor in t.items()}
    fold = Fold("norm", "n", ("a",), 2, shiftable=True)
    folds = {fold.name: fold}
    for found in (
        apply_fold(t, fold, S, S),
        apply_folds(t, folds, {fold.name: S}, {fold.name: S}),
        apply_folds(t, folds, {}),
    ):
        assert found is not t
        found.clear()
    assert all(torch.equal(t[name], kept[name]) for name in kept)


def test_folds_that_share_a_matrix_in_any_order() -> None:
    """A norm scales the columns of v, v into o its rows."""
    t = tensors(n__weight=(3,), v__weight=(2, 3), o__weight=(3, 4))
    folds = {
        f.name: f
        for f in (Fold("norm", "n", ("v",), 3), Fold("values", "v", ("o",), 2, reader_channels=GQA))
    }
    scales = {"n>v": torch.tensor([2.0, 0.5, 3.0]), "v>o": S}
    wanted = apply_fold(apply_fold(t, folds["n>v"], scales["n>v"]), folds["v>o"], S)
    for names in (list(scales), list(scales)[::-1]):
        check(t, apply_folds(t, folds, {n: scales[n] for n in names}), wanted)


def test_gradients_pass_to_scale_and_shift() -> None:
    t = tensors(n__weight=(2,), n__bias=(2,), a__weight=(3, 2), a__bias=(3,))
    fold = Fold("norm", "n", ("a",), 2, shiftable=True)

    def outputs(scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        doubled = {name: tensor.double() for name, tensor in t.items()}
        return tuple(apply_fold(doubled, fold, scale, shift).values())

    arguments = (S.double().requires_grad_(), torch.zeros(2).double().requires_grad_())
    assert torch.autograd.gradcheck(outputs, arguments)


def test_tensors_of_a_block_and_back() -> None:
    block = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))
    t = tensors_of(block)
    assert list(t) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert not any(tensor.requires_grad for tensor in t.values())
    addresses = [parameter.data_ptr() for parameter in block.parameters()]
    new = {name: tensor + 1 for name, tensor in t.items()}
    load_changed(block, new)
    assert all(torch.equal(p, new[name]) for name, p in block.named_parameters())
    assert addresses == [parameter.data_ptr() for parameter in block.parameters()]
