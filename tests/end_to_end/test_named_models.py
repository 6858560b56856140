"""The models that users ask about first, in four methods, from quantize to generate.

All are small, random and stored in bfloat16, or as they are published in FP8 and MXFP4.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import image_text_zoo
import pytest
import quantized
import torch
from commands import call
from low_precision import store_in_fp8, store_in_mxfp4

import lowbit
from lowbit.checkpoint.low_precision import is_low_precision
from lowbit.checkpoint.reader import read_json
from lowbit.methods import GPTQ, RTN, Method, OmniQuant, QuIP

pytestmark = [pytest.mark.slow, pytest.mark.families]

Make = Callable[[], Any]
Store = Callable[[Path], Path]


def as_is(folder: Path) -> Path:
    return folder


def text(name: str, store: Store = as_is) -> tuple[Make, Store]:
    return lambda: families.make(name), store


def image_text(name: str) -> tuple[Make, Store]:
    return lambda: image_text_zoo.make(name), as_is


MODELS: dict[str, tuple[Make, Store]] = {
    "Qwen2.5-VL": image_text("qwen2_5_vl"),
    "Qwen3-VL": image_text("qwen3_vl"),
    "Qwen3-VL-MoE": image_text("qwen3_vl_moe"),
    "Qwen3.5": text("qwen3_5_text"),
    "Qwen3.5-MoE": text("qwen3_5_moe_text"),
    "Qwen3.5 with images": image_text("qwen3_5"),
    "GPT-2": text("gpt2"),
    "gpt-oss": text("gpt_oss", store_in_mxfp4),
    "Gemma 4": text("gemma4_text"),
    "Gemma 4 with images": image_text("gemma4"),
    "Gemma 3n": text("gemma3n_text"),
    "Mistral Small 3": image_text("mistral3"),
    "DeepSeek-V3, Kimi-K2": text("deepseek_v3", store_in_fp8),
    "DeepSeek-V3.2": text("deepseek_v32", store_in_fp8),
    "GLM-5": text("glm_moe_dsa"),
    "Qwen3-Next": text("qwen3_next"),
    "Llama 4": image_text("llama4"),
    "Granite 4-H": text("granitemoehybrid"),
    "Nemotron-H": text("nemotron_h"),
    "LFM2": text("lfm2"),
    "Falcon-H1": text("falcon_h1"),
}
METHODS: dict[str, Method] = {
    "rtn": RTN(bits=8, group_size=16),
    "gptq": GPTQ(bits=4, group_size=16, min_tokens=8),
    "omniquant": OmniQuant(bits=4, group_size=16, let=True, epochs=1, min_tokens=8),
    "quip": QuIP(codebook="HI", scale=2.9, row_scale="always", tune_iters=0, min_tokens=8),
}


@pytest.fixture(scope="module", params=MODELS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make, store = MODELS[request.param]
    folder = tmp_path_factory.mktemp("source")
    make().bfloat16().save_pretrained(folder)
    return quantized.add_tokenizer(store(folder))


@pytest.mark.parametrize("method", METHODS)
def test_from_quantize_to_generate(source: Path, method: str, tmp_path: Path) -> None:
    out = quantized.quantize(source, tmp_path / "out", METHODS[method], self_check=method == "rtn")
    model, _ = lowbit.load(out)
    tokens = families.tokens(1)
    with torch.no_grad():
        found = model(input_ids=tokens, use_cache=False).logits.float()
    assert found.isfinite().all()
    if not is_low_precision(read_json(source / "config.json").get("quantization_config")):
        wanted = quantized.logits(lowbit.load(source)[0], tokens).float()
        assert 0 < families.error(found, wanted) < 1.1
    (row,) = lowbit.evaluate([out], texts=[quantized.text()], seqlen=32, limit=4, reference=source)
    assert row.divergence is not None and row.perplexity
    said = call("generate", out, "abc", "--max-new-tokens", 8, "--device", "cpu").stdout
    assert len(said) > len("abc")
