"""Widths for a budget, and plans: what they keep, what they follow and what they refuse."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import quantized

import lowbit
from lowbit import Allocation
from lowbit.checkpoint.output import size_of
from lowbit.methods import GPTQ, RTN, Method, MixedQuant, OmniQuant, QuIP, Trellis

pytestmark = pytest.mark.slow

G16: dict[str, Any] = {"group_size": 16}
FEW: dict[str, Any] = {"min_tokens": 8}


def mixed(method: Method, budget: float | str, name: str = "llama", **options: Any) -> Allocation:
    text = options.pop("calibration", quantized.calibration())
    found = lowbit.mix(
        quantized.source(name), budget, method, calibration=text, device="cpu", **options
    )
    assert isinstance(found, Allocation)
    return found


@cache
def plan(method: Method = RTN(**G16), budget: float | str = 4.5, name: str = "llama") -> Path:
    path = quantized._ROOT / f"plan-{name}-{method.name}-{budget}.yaml"
    mixed(method, budget, name).write(path)
    return path


def quantize(out: Path, method: Method, name: str = "llama", **options: Any) -> Path:
    return quantized.quantize(quantized.source(name), out, method, **options)


# model, method, budget, options of the run
BUDGETS: dict[str, tuple[str, Method, str, dict[str, Any]]] = {
    "rtn": ("llama", RTN(**G16), "4.5", {}),
    "gptq": ("opt", GPTQ(**G16, **FEW), "4.7", {}),
    "omniquant": ("llama", OmniQuant(**G16, **FEW, epochs=1, let=True), "4.5", {}),
    "trellis": ("llama", Trellis(**FEW, state_bits=9), "3.8", {}),
    "trellis, tuned": ("llama", Trellis(**FEW, state_bits=9, finetune_epochs=1), "5", {}),
    "quip": ("llama", QuIP(**FEW), "4.2", {}),
    "mixedquant": ("llama", MixedQuant(alignment=4, smooth=0.5), "7", {}),
    "experts": ("mixtral", RTN(**G16), "4.5", {}),
    "one matrix for q, k and v": ("falcon 40b", GPTQ(**G16, **FEW), "4.5", {}),
    "a size": ("llama", RTN(**G16), "0.075MB", {}),
    "an output layer": ("llama", RTN(**G16), "5.3", {"lm_head_bits": 8, "skip": ("k_proj",)}),
    "a size with tables": ("llama, tied, biased", RTN(**G16), "50kB", {"embedding_bits": 8}),
}


@pytest.mark.parametrize("case", BUDGETS)
def test_a_plan_keeps_its_budget(case: str, tmp_path: Path) -> None:
    name, method, budget, options = BUDGETS[case]
    found = mixed(method, budget, name, **options)
    assert len(found.layers) > 1
    found.write(tmp_path / "plan.yaml")
    out = quantize(tmp_path / "out", method, name, plan=tmp_path / "plan.yaml", **options)
    size = size_of(out)
    assert size.bytes <= found.bytes
    if budget.endswith("B"):
        unit = {"MB": 10**6, "kB": 10**3}[budget[-2:]]
        assert 0.9 < size.bytes / (float(budget[:-2]) * unit) <= 1
    else:
        assert 0.9 * float(budget) < size.linears <= float(budget)
    tight = case not in ("trellis, tuned", "mixedquant")  # their sizes are upper bounds
    assert size.linears == pytest.approx(found.linears, rel=1e-5 if tight else 0.1)


FUSED = {
    "llama": ("q_proj|k_proj|v_proj", "o_proj", "gate_proj|up_proj", "down_proj"),
    "opt": ("q_proj|k_proj|v_proj", "out_proj", "fc1", "fc2"),
    "mixtral": ("q_proj|k_proj|v_proj", "o_proj", "experts"),
    "falcon 40b": ("query_key_value", "dense|dense_h_to_4h", "dense_4h_to_h"),
}
