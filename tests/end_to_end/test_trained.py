"""The trained Llama, and the same function rewritten as a model of other families."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoint import CheckpointReader
from lowbit.eval.divergence import StreamedLogits, divergence
from lowbit.methods import GPTQ, RTN, Method, OmniQuant

pytestmark = pytest.mark.slow

LLAMA = zoo.MODELS / "llama-mini"
TEXT = zoo.MODELS.parent / "text"
METHODS: dict[str, Method] = {
    "rtn": RTN(bits=2),
    "omniquant": OmniQuant(bits=2, let=True, epochs=1, init="awq"),
}

_KEPT = TemporaryDirectory(prefix="lowbit-trained-", ignore_cleanup_errors=True)
_ROOT = Path(_KEPT.name)


@cache
def source(family: str) -> Path:
    return LLAMA if family == "llama" else zoo.rewrite(family, _ROOT / family)


@cache
def quantized(family: str, method: str = "rtn", device: str = "cpu") -> Path:
    text = str(TEXT / "calibration_stories.txt")
    windows = lowbit.Calibration(sources=(text,), samples=8, seqlen=64)
    out = _ROOT / f"{family}-{method}-{device}"
    return lowbit.quantize(source(family), out, METHODS[method], windows, device=device)


@cache
def tokens() -> Tensor:
    """(4, 256) tokens of stories that the model was not trained on."""
    text = (TEXT / "held_back_stories.txt").read_text()[:8000]
    ids = lowbit.load(LLAMA)[1](text, verbose=False)["input_ids"]
    return torch.tensor(ids[:1024]).view(4, 256)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens().to(model.device)).logits.cpu()


def loss(model: Any) -> float:
    return float(cross_entropy(logits(model)[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()))


@pytest.mark.exhaustive
def test_learning_pays() -> None:
    """Rounding to 2 bits increases the loss (nats per token); OmniQuant recovers a part of that."""
    whole, rounded, learned = (
        loss(lowbit.load(folder)[0])
        for folder in (LLAMA, quantized("llama"), quantized("llama", "omniquant"))
    )
    assert 1 < whole < learned < rounded - 0.05
    assert rounded - whole > 0.2


@pytest.mark.exhaustive
def test_output_feedback_comes_closer_to_the_float_model(tmp_path: Path) -> None:
    text = str(TEXT / "calibration_stories.txt")
    windows = lowbit.Calibration(sources=(text,), samples=8, seqlen=256)
    model, rows = LLAMA, list(tokens())
    wanted, found = StreamedLogits(model, rows), []
    for on in (False, True):
        method = GPTQ(bits=2, group_size=64, output_feedback=on)
        out = lowbit.quantize(model, tmp_path / str(on), method, windows, device="cpu")
        measured, _ = divergence(wanted, StreamedLogits(out, rows), range(len(rows)))
        found.append(measured.kl)
    assert found[1] < found[0]


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_the_same_function_in_another_family(family: str) -> None:
    ours, theirs = CheckpointReader(quantized("llama")), CheckpointReader(quantized(family))
    packed = [name for name in ours.tensors if name.endswith((".packed", ".scale", ".zero"))]
    assert len(packed) == 3 * 7 * 6
    assert all(map(torch.equal, ours.read(packed).values(), theirs.read(packed).values()))
    wanted = logits(lowbit.load(quantized("llama"))[0])
    assert zoo.error(logits(lowbit.load(quantized(family))[0]), wanted) < 1e-5


def test_experts_that_are_nearly_the_same() -> None:
    """Mixtral whose experts are copies of one MLP has the same loss as the model with that MLP."""
    model, _ = lowbit.load(quantized("mixtral"))
    assert loss(model) == pytest.approx(loss(lowbit.load(quantized("llama"))[0]), abs=0.1)


@pytest.mark.exhaustive
def test_a_story_goes_on() -> None:
    model, tokenizer = lowbit.load(quantized("llama", "omniquant"))
    start = tokenizer("Once upon a time", return_tensors="pt")
    out = model.generate(**start, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time") and len(text) > 40


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_on_a_gpu(family: str) -> None:
    wanted = logits(lowbit.load(quantized(family))[0])
    for load in (lambda f, **o: lowbit.load(f, **o)[0], AutoModelForCausalLM.from_pretrained):
        model = load(quantized(family), device_map="cuda:0", dtype=torch.float32)
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        assert zoo.error(logits(model), wanted) < 1e-3
        half = load(quantized(family), device_map="cuda:0")
        assert half.dtype == torch.float16  # the checkpoint's own
        assert zoo.error(logits(half).float(), wanted) < 0.05


@pytest.mark.gpu
def test_a_gpu_and_the_disk_together(tmp_path: Path) -> None:
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
    places |= {f"model.layers.{i}": ("disk", "cpu", 0)[i % 3] for i in range(6)}
    model, _ = lowbit.load(quantized("llama"), device_map=places, dtype=torch.float32)
    wanted = logits(lowbit.load(quantized("llama"))[0])
    assert zoo.error(logits(model), wanted) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_quantized_on_a_gpu(method: str) -> None:
    """The codes are nearly the same; learned parameters may differ a little."""
    ours, theirs = quantized("llama", method), quantized("llama", method, "cuda:0")
    costs = [loss(lowbit.load(folder)[0]) for folder in (ours, theirs)]
    assert costs[0] == pytest.approx(costs[1], abs=0.001 if method == "rtn" else 0.1)
