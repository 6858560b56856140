"""Codes are never taken for weights; what float models hold is never taken for codes."""

from typing import Any

import pytest
import torch

from lowbit.checkpoint import TensorInfo
from lowbit.checkpoint.other_programs import codes_in, program_of, stated_quantization

WEIGHT = {"a.weight": torch.bfloat16}
FP8, U8, I32, F32 = torch.float8_e4m3fn, torch.uint8, torch.int32, torch.float32
CODES: dict[str, tuple[dict[str, torch.dtype], str]] = {
    "gptq": ({"a.qweight": I32, "a.scales": torch.float16}, "a.qweight"),
    "awq zeros": (WEIGHT | {"a.qzeros": I32}, "a.qzeros"),
    "compressed-tensors": ({"a.weight_packed": I32, "a.weight_scale": F32}, "a.weight_packed"),
    "fp8": ({"a.weight": FP8}, "a.weight"),
    "e5m2": ({"a.weight": torch.float8_e5m2}, "a.weight"),
    "int8": ({"a.weight": torch.int8}, "a.weight"),
    "uint8": ({"a.weight": U8}, "a.weight"),
    "deepseek": (WEIGHT | {"a.weight_scale_inv": F32}, "a.weight_scale_inv"),
    "scale of a weight": (WEIGHT | {"a.weight_scale": F32}, "a.weight_scale"),
    "modelopt": (WEIGHT | {"a.weight_scale_2": F32}, "a.weight_scale_2"),
    "static inputs": (WEIGHT | {"a.input_scale": F32}, "a.input_scale"),
    "zero point": (WEIGHT | {"a.weight_zero_point": I32}, "a.weight_zero_point"),
    "mxfp4": ({"e.down_proj_blocks": U8, "e.down_proj_scales": U8}, "e.down_proj_scales"),
    "fused experts": ({"e.down_proj": F32, "e.down_proj_scale": F32}, "e.down_proj_scale"),
    "bitsandbytes": (WEIGHT | {"a.weight.absmax": F32}, "a.weight.absmax"),
    "int8 of bitsandbytes": (WEIGHT | {"a.SCB": F32}, "a.SCB"),
    "hqq": ({"a.W_q": U8}, "a.W_q"),
    "quip": ({"a.Qidxs": torch.int16}, "a.Qidxs"),
    "at the top": ({"weight": FP8}, "weight"),
}
FLOAT: dict[str, dict[str, torch.dtype]] = {
    "plain": WEIGHT | {"a.bias": F32},
    "mask": {"h.0.attn.bias": U8, "h.0.attn.masked_bias": F32},
    "positions": {"embeddings.position_ids": torch.int64},
    "scale of a norm": {"norm.scale": F32, "logit_scale": F32, "layer_scale": F32},
    "scale of something else": {"a.attn_scale": F32, "a.gate_scales": F32},
    "keys and values": {"attn.k_scale": F32, "attn.k_proj.weight": F32},
    "float64": {"a.weight": torch.float64},
}


def infos(tensors: dict[str, torch.dtype]) -> dict[str, TensorInfo]:
    return {name: TensorInfo("f", (1,), dtype) for name, dtype in tensors.items()}


@pytest.mark.parametrize(("tensors", "named"), CODES.values(), ids=CODES)
def test_codes(tensors: dict[str, torch.dtype], named: str) -> None:
    found = codes_in(infos(tensors))
    assert found is not None and found.name == named


@pytest.mark.parametrize("tensors", FLOAT.values(), ids=FLOAT)
def test_no_codes(tensors: dict[str, torch.dtype]) -> None:
    assert codes_in(infos(tensors)) is None


GPTQ = {"quant_method": "gptq"}
STATED: dict[str, tuple[dict[str, Any], str | None]] = {
    "absent": ({}, None),
    "null": ({"quantization_config": None}, None),
    "empty": ({"quantization_config": {}, "text_config": {"quantization_config": {}}}, None),
    "there": ({"quantization_config": GPTQ}, "GPTQ"),
    "in capitals": ({"quantization_config": {"quant_method": "GPTQ"}}, "GPTQ"),
    "one level deeper": ({"text_config": {"quantization_config": GPTQ}}, "GPTQ"),
    "below an empty one": (
        {"quantization_config": None, "text_config": {"quantization_config": GPTQ}},
        "GPTQ",
    ),
    "text_config is a list": ({"text_config": [GPTQ]}, None),
    "old name": ({"compression_config": {"quant_method": "sparseml"}}, "compressed-tensors"),
    "old bitsandbytes": ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
    "lowbit": ({"quantization_config": {"quant_method": "lowbit"}}, "lowbit"),
    "unknown": ({"quantization_config": {"quant_method": "zap"}}, "'zap'"),
    "no method": ({"quantization_config": {"bits": 4}}, "another program"),
    "a number": ({"quantization_config": {"quant_method": 4}}, "another program"),
    "a list": ({"quantization_config": [4]}, "another program"),
}


@pytest.mark.parametrize(("config", "program"), STATED.values(), ids=STATED)
def test_who_wrote_it(config: dict[str, Any], program: str | None) -> None:
    section = stated_quantization(config)
    assert (None if section is None else program_of(section)) == program
