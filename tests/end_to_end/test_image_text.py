"""Models that read images and text: the language model is quantized, everything else is not."""

import json
from pathlib import Path
from typing import Any

import image_text_zoo
import pytest
import quantized
import torch
import zoo
from transformers import AutoModelForImageTextToText

import lowbit
from lowbit.checkpoint import CheckpointReader, QuantizedFolder
from lowbit.formats.base import QuantizedLinear
from lowbit.methods import RTN
from lowbit.models.auto_class import auto_class
from lowbit.models.config import load_config
from lowbit.models.source import SourceModel

pytestmark = pytest.mark.slow

BARE: dict[str, Any] = {"device": "cpu", "without_tokenizer": True}


def test_the_number_of_working_families_only_goes_up() -> None:
    assert len(image_text_zoo.IMAGE_TEXT) >= 12


@pytest.mark.parametrize("name", image_text_zoo.IMAGE_TEXT)
def test_the_language_model_is_quantized(name: str, tmp_path: Path) -> None:
    model = image_text_zoo.folder(name)
    out = lowbit.quantize(model, tmp_path / "out", RTN(bits=8, group_size=16), **BARE)
    loaded, _ = lowbit.load(out)
    whole, _ = lowbit.load(model)
    assert type(loaded) is type(whole) is type(image_text_zoo.make(name))
    found, wanted = quantized.logits(loaded), quantized.logits(whole)
    assert torch.equal(found, quantized.logits(AutoModelForImageTextToText.from_pretrained(out)))
    coarse = lowbit.quantize(model, tmp_path / "coarse", RTN(bits=4, group_size=16), **BARE)
    assert zoo.error(found, wanted) < 0.03
    assert zoo.error(found, wanted) < zoo.error(quantized.logits(lowbit.load(coarse)[0]), wanted)
    linears = [n for n, module in loaded.named_modules() if isinstance(module, QuantizedLinear)]
    blocks = SourceModel(model).block_names
    assert linears and all(n.startswith(tuple(f"{block}." for block in blocks)) for n in linears)
    before, after = CheckpointReader(model), CheckpointReader(out)
    replaced = {f"{n}.weight" for n in QuantizedFolder(out).entries}
    # The experts of Llama 4 and Qwen3-VL-MoE are stacked in one tensor before, but not after.
    kept = [n for n in before.tensors if n not in replaced and ".experts." not in n]
    assert sum("vis" in n for n in kept) > 10  # the vision tower
    floats, stored = before.read(kept), after.read(kept)
    assert all(torch.equal(stored[n], floats[n]) for n in kept)
    assert (out / "preprocessor_config.json").read_text() == "{}"
    assert json.loads((out / "config.json").read_text())["architectures"] == [type(loaded).__name__]


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["gptq", "omniquant", "quip"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_calibrated_with_text(name: str, method: str, tmp_path: Path) -> None:
    model = quantized.add_tokenizer(image_text_zoo.make_folder(name, tmp_path / "model"))
    out = quantized.quantize(model, tmp_path / "out", method)
    loaded, tokenizer = lowbit.load(out)
    assert tokenizer is not None
    assert zoo.error(quantized.logits(loaded), quantized.logits(lowbit.load(model)[0])) < 0.9
    (found,) = lowbit.evaluate([out], texts=[quantized.text()], seqlen=16, reference=model)
    assert found.divergence is not None


CLASSES = {  # model_type, architectures, the class that is built
    "the whole of Gemma 3": ("gemma3", ["Gemma3ForConditionalGeneration"], "ImageTextToText"),
    "Gemma 3's text alone": ("gemma3_text", ["Gemma3ForCausalLM"], "CausalLM"),
    "a whole model in its text class": ("gemma3", ["Gemma3ForCausalLM"], "CausalLM"),
    "no other class": ("llava", None, "ImageTextToText"),
    "text": ("llama", ["LlamaForCausalLM"], "CausalLM"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_class_that_is_built(name: str, tmp_path: Path) -> None:
    model_type, architectures, built = CLASSES[name]
    config = {"model_type": model_type, "architectures": architectures}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert auto_class(load_config(tmp_path)).__name__ == f"AutoModelFor{built}"
