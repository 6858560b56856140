"""Rounded and rotated inputs of RTN, GPTQ and OmniQuant."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import zoo
from read_linear import unrounded, unrounded_with_loss
from torch import Tensor

from lowbit.blocks import BlockTask
from lowbit.blocks.capture import call_block
from lowbit.blocks.folding import apply_fold, load_changed, tensors_of
from lowbit.formats.uniform import UniformLinear
from lowbit.kernels.tokens import round_tokens
from lowbit.methods import GPTQ, RTN, OmniQuant
from lowbit.methods.activations import FLOAT_ATTENTION, ActivationMethod
from lowbit.methods.result import BlockResult

pytestmark = pytest.mark.slow

EXACT = 1e-5
A4: dict[str, Any] = {"bits": 4, "activation_bits": 4}
FEW: dict[str, Any] = {"min_tokens": 8}
METHODS: dict[str, Callable[..., ActivationMethod]] = {
    "rtn": RTN,
    "gptq": lambda **fields: GPTQ(**FEW, **fields),
    "gptq, self": lambda **fields: GPTQ(**FEW, match="self", **fields),
    "omniquant": lambda **fields: OmniQuant(**FEW, epochs=1, **fields),
    "omniquant, self": lambda **fields: OmniQuant(**FEW, epochs=0, match="self", **fields),
    "omniquant, let, nearest": lambda **fields: OmniQuant(
        **FEW, epochs=1, let=True, rounding="nearest", **fields
    ),
}
every_method = pytest.mark.parametrize("method", METHODS)
FAMILIES = [*zoo.ZOO, *zoo.DISCOVERED]


def output(task: BlockTask, result: BlockResult, stream: str = "float") -> Tensor:
    block = deepcopy(task.block)
    result.install(block)
    with torch.no_grad():
        return torch.cat([call_block(block, batch) for batch in task.streams[stream]])


def wanted(task: BlockTask) -> Tensor:
    with torch.no_grad():
        return torch.cat([call_block(task.block, batch) for batch in task.streams["float"]])


def branches_error(task: BlockTask, result: BlockResult) -> float:
    """Of what the block adds to its input."""
    hidden = torch.cat(task.streams["float"].hidden())
    return zoo.error(output(task, result) - hidden, wanted(task) - hidden)


@pytest.mark.parametrize("name", FAMILIES)
def test_rotations_alone_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of inputs, of heads, and of values within the weights, with scales that balance channels."""
    for place in ("lowbit.formats.activation", "lowbit.models.attention"):
        monkeypatch.setattr(f"{place}.round_tokens", lambda x, *args, **rounding: x)
    monkeypatch.setattr("lowbit.methods.rtn.pack", unrounded)
    monkeypatch.setattr("lowbit.methods.rtn.signal_to_noise", lambda weight, linear: 0.0)
    task = zoo.task(name)
    result = RTN(**A4, rotate=True).quantize(task)
    assert all(layer.reading.rotation is not None for layer in result.linears.values())  # type: ignore[attr-defined]
    assert branches_error(task, result) < EXACT
    rotations = [rounding.rotation for rounding in result.attention.values()]
    assert len(rotations) == len(task.attentions) and all(rotations)
    if name in zoo.ZOO:
        assert not any(rotation.values for rotation in rotations if rotation)
    else:  # of values that were found by experiment, the heads are not known
        assert all(rotation.values for rotation in rotations if rotation)
    assert (result.report.fallback == FLOAT_ATTENTION) == (not task.attentions)


@pytest.mark.parametrize("method", ["gptq", "gptq, self", "omniquant, self"])
def test_no_method_changes_the_block_beside_rounding(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("lowbit.formats.activation", "lowbit.models.attention"):
        monkeypatch.setattr(f"{place}.round_tokens", lambda x, *args, **rounding: x)
    file = (
        "lowbit.methods.gptq" if method.startswith("gptq") else "lowbit.methods.omniquant.learner"
    )
    monkeypatch.setattr(f"{file}.pack", unrounded)
    monkeypatch.setattr(f"{file}.pack_with_feedback", unrounded_with_loss)
    monkeypatch.setattr(f"{file}.signal_to_noise", lambda weight, linear: 0.0)
    task = zoo.task("llama", noise=0.0)
    result = METHODS[method](**A4, rotate=True).quantize(task)
    assert branches_error(task, result) < EXACT


@cache
def quantized(method: str, rotate: bool, name: str = "llama", outliers: bool = False) -> float:
    """The error of a block at W4A4."""
    task = with_outliers(zoo.task(name)) if outliers else zoo.task(name)
    return branches_error(task, METHODS[method](**A4, rotate=rotate).quantize(task))


def with_outliers(task: BlockTask) -> BlockTask:
    """The same block, whose norms multiply a few channels by 64."""
    tensors = tensors_of(task.block)
    for fold in task.folds:
        if fold.kind == "norm":
            scale = torch.ones(fold.size)
            scale[:3] = 1 / 64
            tensors = apply_fold(tensors, fold, scale)
    block = deepcopy(task.block)
    load_changed(block, tensors)
    return replace(task, block=block)


@every_method
@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_outliers_of_norms_lose_nothing(method: str, name: str) -> None:
    plain, outliers = (quantized(method, True, name, each) for each in (False, True))
    assert outliers < 1.15 * plain
    if "let" not in method:
        assert quantized(method, False, name, True) > 2 * outliers


@every_method
def test_layers_of_a_group_share_what_is_rotated(method: str) -> None:
    task = zoo.task("llama")
    method_ = METHODS[method](**A4, rotate=True, overrides={"v_proj": {"activation_bits": 8}})
    result = method_.quantize(task)
    shares = {name: layer.shares for name, layer in result.linears.items()}
    assert {n: s for n, s in shares.items() if s is not None} == {
        "self_attn.k_proj": "self_attn.q_proj",
        "mlp.up_proj": "mlp.gate_proj",
    }
    q, k, v = (result.linears[f"self_attn.{name}_proj"] for name in "qkv")
    assert k.owner is q and v.owner is v
    assert isinstance(q, UniformLinear) and isinstance(v, UniformLinear)
    assert q.rotation == v.rotation and q.activation != v.activation
    x = torch.randn(3, q.in_features)
    assert k.prepared(x) is q.prepared(x) and not torch.equal(v.prepared(x), q.prepared(x))


@every_method
def test_only_some_linears_are_rotated(method: str) -> None:
    task = zoo.task("llama")
    method_ = METHODS[method](**A4, overrides={"down_proj": {"rotate": True}})
    result = method_.quantize(task)
    rotated = {n for n, x in result.linears.items() if x.entry().get("rotation")}
    assert rotated == {"mlp.down_proj"}
    assert all(rounding.rotation is None for rounding in result.attention.values())


def test_gptq_sees_what_its_layers_will_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hessian of each group is that of the rotated and rounded input."""
    seen: list[Tensor] = []

    def spy(matrix: Tensor, *args: Any) -> Any:
        seen.append(matrix)
        return factor(matrix, *args)

    factor = __import__("lowbit.methods.gptq", fromlist=["x"]).ordered_factor
    monkeypatch.setattr("lowbit.methods.gptq.ordered_factor", spy)
    task = zoo.task("llama")
    result = GPTQ(**A4, **FEW, rotate=True).quantize(task)
    q = result.linears["self_attn.q_proj"]
    block = deepcopy(task.block)
    result.install(block)
    reads: list[Tensor] = []
    block.self_attn.q_proj.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda module, args: reads.append(args[0])
    )
    for batch in task.streams["quantized"]:
        call_block(block, batch)
    prepared = torch.cat([q.prepare(x).flatten(0, -2) for x in reads])
    assert all(len(row.unique()) <= 16 for row in prepared[:5])
    torch.testing.assert_close(seen[0], prepared.T @ prepared / len(prepared), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rounded", [False, True])
def test_attention_is_rounded_only_if_asked(rounded: bool) -> None:
    task = zoo.task("llama")
    result = RTN(**A4, round_attention=rounded, rotate=True).quantize(task)
    assert bool(result.attention) == rounded and result.report.fallback is None


def test_values_are_rotated_when_they_are_read_if_their_outputs_are_weighed() -> None:
    """The Hessians of outputs are those of the values that the float model makes."""
    task = zoo.task("llama")
    for weighed in (False, True):
        method = GPTQ(**A4, output_feedback=weighed, rotate=True)
        (rounding,) = method.readings(task).attentions.values()
        assert rounding.rotation is not None and rounding.rotation.values == weighed


def test_weights_alone_can_be_rotated() -> None:
    task = zoo.task("llama")
    result = RTN(bits=4, rotate=True).quantize(task)
    assert not result.attention
    assert all(not layer.entry().get("activation") for layer in result.linears.values())
    assert branches_error(task, result) < branches_error(task, RTN(bits=3).quantize(task))


def test_the_seed_chooses_the_signs() -> None:
    task = zoo.task("llama")
    first, second = (
        RTN(bits=4, rotate=True, rotation_seed=seed).quantize(task).linears for seed in (0, 1)
    )
    name = "mlp.down_proj"
    assert second[name].entry()["rotation"] == {"kind": "hadamard", "seed": 1}
    assert not torch.equal(
        first[name].get_parameter("packed"), second[name].get_parameter("packed")
    )


def test_symmetric_activations_need_bits() -> None:
    with pytest.raises(ValueError, match="activation_symmetric needs activations"):
        RTN(activation_symmetric=True)


def test_rounding_a_rotated_outlier_loses_less() -> None:
    """What the transform is for, in numbers: one channel of 64 is 50 times as large."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(100, 64, generator=draw)
    x[:, 3] *= 50
    reading = RTN(bits=4, activation_bits=4, rotate=True).reading(64)
    assert zoo.error(reading.seen(x), x) < zoo.error(round_tokens(x, 4), x)
    others = torch.arange(64) != 3
    assert zoo.error(reading.seen(x)[:, others], x[:, others]) < 0.8 * zoo.error(
        round_tokens(x, 4)[:, others], x[:, others]
    )
