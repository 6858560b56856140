"""That unfused experts compute what fused ones do is in tests/models/test_skeleton.py."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from lowbit.blocks.experts import Expert, ExpertNames, UnfusedExperts, layout_of, unfuse

NAMES = ExpertNames("w1", "w3", "w2")
COUNT, HIDDEN, INNER = 3, 4, 6


class Fused(nn.Module):
    """transformers' layout, as far as it matters."""

    def __init__(self, **marks: bool) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(COUNT, 2 * INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.empty(COUNT, HIDDEN, INNER))
        self.act_fn = nn.SiLU()
        standard = {"is_concatenated": True, "has_gate": True}
        standard |= {"is_transposed": False, "has_bias": False}
        for name, mark in (standard | marks).items():
            setattr(self, name, mark)
        zoo.randomise(self)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return direct(self, hidden, index, weights)


def direct(fused: Fused, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Token by token."""
    total = torch.zeros_like(hidden)
    for token, place in zip(*torch.where(index < COUNT), strict=True):
        number = index[token, place]
        gate, up = (fused.gate_up_proj[number] @ hidden[token]).chunk(2)
        out = fused.down_proj[number] @ (nn.functional.silu(gate) * up)
        total[token] += weights[token, place] * out
    return total


def test_a_token_gets_the_weighted_sum_of_its_experts() -> None:
    fused = Fused()
    hidden, weights = torch.randn(5, HIDDEN), torch.rand(5, 2)
    # Expert 1 sees nothing; COUNT marks a place without an expert.
    index = torch.tensor([[0, 2], [2, 0], [2, COUNT], [0, 2], [COUNT, COUNT]])
    found = unfuse(fused, NAMES)(hidden, index, weights)
    torch.testing.assert_close(found, direct(fused, hidden, index, weights))
    assert not found[4].any()


def one_after_another(
    experts: UnfusedExperts, hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Adds each expert's rows by index_add_."""
    total = torch.zeros_like(hidden)
    for number in index.unique().tolist():
        token, choice = torch.where(index == number)
        if number < COUNT:
            out = experts[number](hidden[token])
        elif experts.identity:
            out = hidden[token]
        else:
            continue
        total.index_add_(0, token, (out * weights[token, choice, None]).to(total.dtype))
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize(("tokens", "choices"), [(0, 2), (1, 1), (7, 2), (40, 5)])
def test_sums_have_the_bytes_of_index_add(
    tokens: int, choices: int, identity: bool, dtype: torch.dtype
) -> None:
    """Some choices are no expert. None is made twice by a token, as by any router."""
    draw = torch.Generator().manual_seed(tokens)
    experts = unfuse(Fused(), NAMES).to(dtype)
    experts.identity = identity
    index = torch.rand(tokens, COUNT + 2, generator=draw).argsort(1)[:, :choices]
    results = []
    for way in (experts, lambda *given: one_after_another(experts, *given)):
        draw.manual_seed(1)
        hidden = torch.randn(tokens, HIDDEN, generator=draw).to(dtype).requires_grad_()
        weights = torch.rand(tokens, choices, generator=draw).requires_grad_()
        out = way(hidden, index, weights)
        if out.requires_grad:
            out.float().square().sum().backward()
        gradients = (torch.zeros_like(t) if t.grad is None else t.grad for t in (hidden, weights))
        results.append((out, *gradients))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_matrices_by_their_names_on_disk() -> None:
    fused = Fused()
    experts = unfuse(fused, NAMES)
    assert isinstance(experts, UnfusedExperts) and len(experts) == COUNT
    assert [name for name, _ in experts.named_parameters()] == [
        f"{i}.{name}.weight" for i in range(COUNT) for name in ("w1", "w3", "w2")
    ]
    for i, expert in enumerate(experts):
        assert isinstance(expert, Expert)
        assert torch.equal(expert.w1.weight, fused.gate_up_proj[i, :INNER])
        assert torch.equal(expert.w3.weight, fused.gate_up_proj[i, INNER:])
        assert torch.equal(expert.w2.weight, fused.down_proj[i])
        assert (expert.w1.in_features, expert.w1.out_features) == (HIDDEN, INNER)
        assert (expert.w2.in_features, expert.w2.out_features) == (INNER, HIDDEN)
    experts[0].w1.weight.zero_()  # a copy
    assert fused.gate_up_proj[0, :INNER].any()


def test_a_meta_module_stays_on_meta() -> None:
    experts = unfuse(Fused().to("meta"), NAMES)
    assert all(parameter.is_meta for parameter in experts.parameters())


@pytest.mark.parametrize(
    ("gated", "transposed"),
    [(True, False), (True, True), (False, False)],
    ids=["gated", "gated, transposed", "without gate"],
)
def test_shapes_tell_the_layout_of_a_class_that_does_not_state_it(
    gated: bool, transposed: bool
) -> None:
    fused = nn.Module()
    shapes = [(INNER * (1 + gated), HIDDEN), (HIDDEN, INNER)]
    reader, down = (
        nn.Parameter(torch.empty(COUNT, *(shape[::-1] if transposed else shape)))
        for shape in shapes
    )
    fused.register_parameter("gate_up_proj" if gated else "up_proj", reader)
    fused.register_parameter("down_proj", down)
    layout = layout_of(fused)
    assert layout is not None
    found = (layout.transposed, layout.gated, layout.inner, layout.hidden)
    assert found == (transposed, gated, INNER, HIDDEN)


LAYOUTS: dict[str, dict[str, bool]] = {
    "transposed": {"is_transposed": True},
    "interleaved": {"is_concatenated": False},
    "biased": {"has_bias": True},
    "without gate": {"has_gate": False},
    "transposed, biased, interleaved": {
        "is_transposed": True,
        "has_bias": True,
        "is_concatenated": False,
    },
}


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_computes_the_same(options: dict[str, bool]) -> None:
    gated = options.get("has_gate", True)
    transposed = options.get("is_transposed", False)
    concatenated = options.get("is_concatenated", True)
    rows = INNER * (1 + gated)
    draw = torch.Generator().manual_seed(0)

    def stack(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=draw), requires_grad=False)

    fused: Any = nn.Module()
    first = "gate_up_proj" if gated else "up_proj"
    reader = stack(COUNT, rows, HIDDEN)
    down = stack(COUNT, HIDDEN, INNER)
    biases = [torch.zeros(COUNT, rows), torch.zeros(COUNT, HIDDEN)]
    setattr(fused, first, nn.Parameter(reader.transpose(1, 2)) if transposed else reader)
    fused.down_proj = nn.Parameter(down.transpose(1, 2)) if transposed else down
    if options.get("has_bias"):
        biases = [stack(COUNT, rows), stack(COUNT, HIDDEN)]
        setattr(fused, f"{first}_bias", biases[0])
        fused.down_proj_bias = biases[1]
    fused.is_transposed, fused.is_concatenated = transposed, concatenated
    fused.act_fn = nn.functional.silu
    fused.forward = lambda hidden, index, weights: hidden
    experts = unfuse(fused, NAMES)
    x = torch.randn(5, HIDDEN, generator=draw)
    for number, expert in enumerate(experts):
        read = x @ reader[number].T + biases[0][number]
        inner = nn.functional.silu(read)
        if gated:
            step = slice(0, None, 2) if not concatenated else slice(0, INNER)
            other = slice(1, None, 2) if not concatenated else slice(INNER, None)
            inner = nn.functional.silu(read[:, step]) * read[:, other]
        wanted = inner @ down[number].T + biases[1][number]
        torch.testing.assert_close(expert(x), wanted)


def test_the_rows_of_dbrx() -> None:
    config = SimpleNamespace(
        hidden_size=HIDDEN, ffn_hidden_size=INNER, moe_num_experts=COUNT, ffn_act_fn={}
    )
    fused = DbrxExperts(config).requires_grad_(False)
    zoo.randomise(fused)
    hidden, weights = torch.randn(2, 2, HIDDEN), torch.rand(4, 2)
    index = torch.tensor([[0, 2], [2, 0], [2, 1], [0, 2]])
    wanted = fused(hidden, index, weights)
    torch.testing.assert_close(unfuse(fused, NAMES)(hidden, index, weights), wanted)


def test_equal_parts_of_llama_4() -> None:
    config = SimpleNamespace(
        num_local_experts=COUNT, hidden_size=HIDDEN, intermediate_size=INNER, hidden_act="silu"
    )
    fused = Llama4TextExperts(config).requires_grad_(False)
    zoo.randomise(fused)
    x = torch.randn(COUNT * 5, HIDDEN)
    torch.testing.assert_close(unfuse(fused, NAMES)(x), fused(x))


def test_the_products_of_jetmoe() -> None:
    fused = JetMoeParallelExperts(COUNT, HIDDEN, INNER).requires_grad_(False)
    zoo.randomise(fused)
    x = torch.randn(5, HIDDEN)
    experts = unfuse(fused, NAMES)
    torch.testing.assert_close(experts(x, [2, 0, 3]), fused(x, [2, 0, 3]))
    assert experts.zeros(x, [2, 0, 3]).shape == (5, INNER)
    assert experts.zeros(x[None], [2, 0, 3]).shape == (1, 5, INNER)
    assert [name for name, _ in experts.named_parameters()] == [
        f"{i}.linear.weight" for i in range(COUNT)
    ]


NOT_KNOWN: dict[str, Callable[[], Any]] = {
    "with a norm": lambda: Fused(has_post_expert_norm=True),
    "a linear": lambda: nn.Linear(2, 2),
    "two dimensions": lambda: SimpleNamespace(
        gate_up_proj=nn.Parameter(torch.ones(2, 2)), down_proj=nn.Parameter(torch.ones(2, 2))
    ),
}


def test_the_layout_of_mixtral() -> None:
    layout = layout_of(zoo.make(zoo.ZOO["mixtral"]).model.layers[0].mlp.experts)
    assert layout is not None and layout.gated
    assert not (layout.transposed or layout.interleaved or layout.biased)


@pytest.mark.parametrize("make", NOT_KNOWN.values(), ids=NOT_KNOWN)
def test_what_is_not_known_is_left_alone(make: Callable[[], Any]) -> None:
    assert layout_of(make()) is None
