import pytest
import torch
from torch import nn

from lowbit.blocks.install import install, replace_module


def block() -> nn.Module:
    inner = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    return nn.ModuleDict({"inner": inner, "norm": nn.LayerNorm(2)})


def test_a_result_is_put_into_its_block() -> None:
    target = block()
    kept, norm = target["inner"]["b"], target["norm"].weight
    linear = nn.Linear(2, 2)
    install(target, {"inner.a": linear}, {"norm.weight": torch.tensor([3.0, 4.0])}, {})
    assert target.get_submodule("inner.a") is linear
    assert target["inner"]["b"] is kept
    assert target["norm"].weight is norm and norm.tolist() == [3, 4]


def test_a_result_goes_where_the_block_is() -> None:
    target = block().to("meta")
    install(target, {"inner.a": nn.Linear(2, 2)}, {"norm.bias": torch.zeros(2)}, {})
    assert all(parameter.is_meta for parameter in target.parameters())


@pytest.mark.parametrize("name", ["norm.wieght", "inner.c.weight"])
def test_a_name_that_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(AttributeError):
        install(block(), {}, {name: torch.zeros(2)}, {})


def test_replace_module() -> None:
    target = block()
    new = nn.Identity()
    replace_module(target, "norm", new)
    replace_module(target, "inner.b", new)
    assert target["norm"] is new and target["inner"]["b"] is new
