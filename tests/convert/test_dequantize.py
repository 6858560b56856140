"""transformers computes the same with a dequantized folder as lowbit with the quantized one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.convert import dequantize
from lowbit.load import load_model

pytestmark = pytest.mark.slow

FAMILIES = ["opt", "llama", "qwen2", "falcon 7b", "mixtral", "qwen3_moe", "gpt2"]


@pytest.fixture
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    method = lowbit.methods.RTN(bits=4, group_size=16)
    return lowbit.quantize(
        zoo.folder(request.param), tmp_path / "out", method, without_tokenizer=True
    )


@pytest.mark.parametrize("quantized", FAMILIES, indirect=True)
def test_same_logits_without_lowbit(quantized: Path, tmp_path: Path) -> None:
    dense = dequantize(quantized, tmp_path / "dense")
    tokens = zoo.tokens()
    with torch.no_grad():
        wanted = load_model(quantized)(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(tokens).logits
    # The source is float32, so nothing is rounded again; fused experts add up in another order.
    assert zoo.error(found, wanted) < 1e-5
    assert "quantization_config" not in (dense / "config.json").read_text()


@pytest.mark.exhaustive
@pytest.mark.parametrize("quantized", ["llama"], indirect=True)
def test_a_process_that_never_imports_lowbit(quantized: Path, tmp_path: Path) -> None:
    dense = dequantize(quantized, tmp_path / "dense")
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M\n"
        f"M.from_pretrained({str(dense)!r}); assert 'lowbit' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("quantized", ["llama"], indirect=True)
def test_a_damaged_folder_leaves_nothing(quantized: Path, tmp_path: Path) -> None:
    shard = sorted(quantized.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=shard.name):
        dequantize(quantized, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
