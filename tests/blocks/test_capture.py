from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit.blocks import Batch
from lowbit.blocks.capture import BlockStub, Stopped, call_block, observed

HIDDEN = torch.ones(1, 2, 3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_type = "sliding_attention"
        self.layer_idx = 3
        self.inner = nn.Linear(3, 3)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, flag: bool = False, **kwargs: Any
    ) -> Tensor:
        return self.inner(hidden_states)


@pytest.mark.parametrize(
    "call",
    [
        lambda block: block(HIDDEN, None, flag=True, positions=4),
        lambda block: block(HIDDEN, None, True, positions=4),
        lambda block: block(positions=4, flag=True, hidden_states=HIDDEN, mask=None),
    ],
    ids=["mixed", "by place", "by name"],
)
@pytest.mark.parametrize("tuple_output", [False, True])
def test_a_stub_records_how_a_block_is_called(call: Any, tuple_output: bool) -> None:
    stub = BlockStub(Block(), tuple_output)
    out = call(stub)
    assert isinstance(out, tuple) == tuple_output
    assert (out[0] if tuple_output else out) is HIDDEN
    (recorded,) = stub.calls
    assert recorded.hidden.data_ptr() == HIDDEN.data_ptr()
    assert recorded.kwargs == {"mask": None, "flag": True, "positions": 4}
    # What is recorded calls the block in the same way.
    block = Block()
    assert torch.equal(call_block(block, recorded), call(block))


def test_a_stub_looks_like_its_block_but_has_no_parameters() -> None:
    stub = BlockStub(Block(), False)
    assert (stub.attention_type, stub.layer_idx) == ("sliding_attention", 3)
    assert not list(stub.parameters()) and not stub.state_dict()
    with pytest.raises(AttributeError, match="nothing"):
        _ = stub.nothing


def test_a_stub_may_stop_the_pass() -> None:
    stub = BlockStub(Block(), False, stop=True)
    with pytest.raises(Stopped):
        nn.Sequential(nn.Identity(), stub, Block())(HIDDEN)
    assert len(stub.calls) == 1


def test_call_block_takes_the_hidden_states_out_of_a_tuple() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, add: int) -> tuple[Tensor, str]:
            return x + add, "weights"

    assert (call_block(Pair(), Batch(HIDDEN, {"add": 2})) == 3).all()


def test_observed_inputs_and_no_hook_left_behind() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    seen: dict[str, Tensor] = {}
    with pytest.raises(KeyError), observed(model, ["0", "2"], seen.__setitem__):
        model(HIDDEN)
        raise KeyError
    assert list(seen) == ["0", "2"] and torch.equal(seen["0"], HIDDEN)
    assert torch.equal(seen["2"], model[1](model[0](HIDDEN)))
    seen.clear()
    model(HIDDEN)
    assert not seen
