"""OmniQuant with rounded activations, from training to the loaded model."""

import json
import shutil
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import quantized
import torch
import zoo
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.blocks.attention import MARK
from lowbit.blocks.capture import call_block
from lowbit.blocks.folding import load_changed
from lowbit.blocks.hessian import input_hessians
from lowbit.blocks.statistics import input_statistics
from lowbit.blocks.walk import Step
from lowbit.checkpoint import QuantizedFolder
from lowbit.convert import dequantize
from lowbit.formats import uniform
from lowbit.formats.base import QuantizedLinear
from lowbit.load import stream
from lowbit.methods import OmniQuant
from lowbit.methods.omniquant.learner import Learner
from lowbit.models.source import SourceModel
from lowbit.pipeline.job import Job

pytestmark = pytest.mark.slow

W4A4: dict[str, Any] = {"bits": 4, "activation_bits": 4, "min_tokens": 8}
ROUNDING = {"bits": 4, "symmetric": False}
METHODS = {
    "trained": OmniQuant(**W4A4, let=True, epochs=1, rounding="nearest"),
    "nearest": OmniQuant(**W4A4, lwc=False, epochs=0, rounding="nearest"),
}
FAMILIES = ["opt", "llama", "mistral", "qwen3", "mixtral", "falcon rw", "gemma2"]
MASKED = FAMILIES[:-1]  # eager attention turns rows that see nothing to NaN in float64
every_family = pytest.mark.parametrize("name", FAMILIES)

_KEPT = TemporaryDirectory(prefix="lowbit-w4a4-", ignore_cleanup_errors=True)


@cache
def folder(name: str, method: str = "trained") -> Path:
    """A model of the zoo at W4A4; tests must not change the folder."""
    out = Path(_KEPT.name) / f"{name}-{method}"
    return quantized.quantize(quantized.source(name), out, METHODS[method])


def marks(model: nn.Module) -> dict[str, Any]:
    return {n: getattr(m, MARK) for n, m in model.named_modules() if hasattr(m, MARK)}


@pytest.mark.parametrize("name", [*zoo.ZOO, *zoo.DISCOVERED])
def test_every_family_rounds_what_its_linears_and_attentions_read(name: str) -> None:
    out, source = folder(name, "nearest"), SourceModel(quantized.source(name))
    model, _ = lowbit.load(out)
    linears = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert {(m.activation.bits, m.activation.symmetric) for m in linears} == {(4, False)}
    attentions = {f"{b}.{a}" for b in source.block_names for a in source.attentions(b)}
    assert marks(model) == dict.fromkeys(attentions, ROUNDING)
    assert set(QuantizedFolder(out).attention) == {source.disk_path(a) for a in attentions}
    fallbacks = json.loads((out / "report.json").read_text())["fallbacks"]
    if name.startswith("falcon"):
        assert not attentions and "attention" not in quantized.section(out)
        assert set(fallbacks) == set(source.block_names)
        assert all("only the inputs of linears" in reason for reason in fallbacks.values())
    else:
        assert len(quantized.section(out)["attention"]) == 1  # a range
        assert not any("queries" in reason for reason in fallbacks.values())
    assert quantized.logits(model).isfinite().all()


@pytest.mark.parametrize("name", ["opt", "mixtral"])
def test_plain_transformers_runs_the_same(name: str) -> None:
    logits = quantized.logits(lowbit.load(folder(name))[0])
    assert torch.equal(quantized.logits(AutoModelForCausalLM.from_pretrained(folder(name))), logits)
    error = zoo.error(logits, quantized.logits(lowbit.load(quantized.source(name))[0]))
    assert 0.01 < error < 1


@every_family
def test_what_is_trained_is_what_is_packed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uniform, "storable", lambda scale: scale.detach().float())
    task = zoo.task(name, batches=2)
    method = OmniQuant(**W4A4, let=True, rounding="nearest")
    seen = input_statistics(task.block, task.groups, task.streams["float"])
    learner = Learner(method, method.readings(task), seen, set())
    batch = task.streams["quantized"][0]
    rounding, packed = learner.readings.rounding_block(), deepcopy(task.block)
    with torch.no_grad():
        out = functional_call(rounding, learner.tensors(), (batch.hidden,), batch.kwargs)
        out = out[0] if isinstance(out, tuple) else out
        method.install(packed, learner.result({}, {}), "quantized")
        # A scale's last bit may send a value to the next code.
        assert zoo.error(call_block(packed, batch), out) < 0.01
        assert zoo.error(call_block(task.block, batch), out) > 0.03


@every_family
def test_what_is_saved_is_what_ran(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What entered the last block in the run, and what enters it in the loaded model."""
    tokens: list[Tensor] = []
    entered: list[Tensor] = []
    first_stream, quantize_block = SourceModel.first_stream, Job.quantize_block

    def spy_stream(self: SourceModel, batches: Any, *args: Any, **more: Any) -> Any:
        tokens.extend(batches)
        return first_stream(self, batches, *args, **more)

    def spy_block(self: Any, writer: Any, step: Step, log: Any) -> Any:
        entered[:] = [batch.hidden.clone() for batch in step.streams["quantized"]]
        return quantize_block(self, writer, step, log)

    monkeypatch.setattr(SourceModel, "first_stream", spy_stream)
    monkeypatch.setattr(Job, "quantize_block", spy_block)
    source = quantized.source(name)
    # The self-check would run windows of its own.
    out = quantized.quantize(source, tmp_path / "out", METHODS["trained"], self_check=False)
    model, _ = lowbit.load(out)
    found: list[Tensor] = []
    last = SourceModel(quantized.source(name)).block_names[-1]
    model.get_submodule(last).register_forward_pre_hook(lambda m, args: found.append(args[0]))
    for batch in tokens:
        quantized.logits(model, batch)
    assert len(found) == len(tokens) > 0 and all(map(torch.equal, found, entered))


def double(name: str) -> Any:
    """In float64 the order of additions does not change the rounded codes."""
    return lowbit.load(folder(name))[0].double()


EXACT = 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MASKED)
def test_rows_of_a_padded_batch_are_the_rows_alone(name: str, side: str) -> None:
    model, lengths = double(name), [zoo.TOKENS, 14, 9]
    tokens = zoo.tokens(rows=3)
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    places: dict[str, Any] = {"attention_mask": mask}
    if not name.startswith(("opt", "falcon")):  # which count from the mask themselves
        places["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(tokens, **places).logits
        unmasked = model(tokens).logits
    for row, length in enumerate(lengths):
        kept = mask[row].bool()
        alone = quantized.logits(model, tokens[row : row + 1, kept])[0]
        assert zoo.error(together[row, kept], alone) < EXACT
        if side == "left" and length < zoo.TOKENS:
            assert zoo.error(unmasked[row, kept], alone) > 0.01


@every_family
def test_token_by_token_with_a_cache_is_the_whole_at_once(name: str) -> None:
    model, tokens = double(name), zoo.tokens()
    with torch.no_grad():
        out = model(tokens[:, :5], use_cache=True)
        parts = [out.logits]
        for place in range(5, zoo.TOKENS):
            new = tokens[:, place : place + 1]
            out = model(new, past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    assert zoo.error(torch.cat(parts, 1), quantized.logits(model, tokens)) < EXACT


def test_a_resumed_run_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second block is quantized behind the first as its shard says it is."""

    def stop(self: Any, writer: Any, step: Step, log: Any) -> Any:
        if step.index == 1:
            raise KeyboardInterrupt
        return quantize_block(self, writer, step, log)

    quantize_block = Job.quantize_block
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Job, "quantize_block", stop)
        quantized.quantize(quantized.source(), tmp_path / "out", METHODS["trained"])
    quantized.quantize(quantized.source(), tmp_path / "out", METHODS["trained"])
    assert quantized.contents(tmp_path / "out") == quantized.contents(folder("llama"))


def test_learned_shifts_and_scales_are_replayed(tmp_path: Path) -> None:
    method = METHODS["trained"].model_copy(update={"epochs": 0})
    for name in ("opt", "llama"):
        wanted = folder(name)
        out = quantized.quantize(quantized.source(name), tmp_path / name, method, start_from=wanted)
        for shard in out.glob("*.safetensors"):
            assert shard.read_bytes() == (wanted / shard.name).read_bytes()


def edited(out: Path, attention: Any) -> Path:
    shutil.copytree(folder("llama"), out)

    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["attention"] = attention

    quantized.edit_json(out / "config.json", change)
    quantized.seal(out)
    return out


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"model.layers.{0-2}.self_attn": ROUNDING}, "model.layers.2.self_attn.*does not have"),
        ({"model.layers.0.mlp": ROUNDING}, "model.layers.0.mlp.*LlamaMLP"),
        ({"model.layers.0.self_attn": ROUNDING | {"bits": 9}}, "0.self_attn: bits"),
        ({"model.layers.0.self_attn": {"bit": 4, "symmetric": True}}, "did you mean 'bits'"),
        ({"model.layers.{3-1}.self_attn": ROUNDING}, "quantization_config.attention.*names 0"),
        ([], "attention must map"),
    ],
)
def test_a_section_that_cannot_be(attention: Any, message: str, tmp_path: Path) -> None:
    out = edited(tmp_path / "out", attention)
    for load in (lowbit.load, AutoModelForCausalLM.from_pretrained, stream):
        with pytest.raises(ValueError, match=message):
            load(out)


def test_only_some_linears(tmp_path: Path) -> None:
    """An attention whose linears all stay float is not rounded, and not reported as a fallback."""
    model = quantized.source()
    method = OmniQuant(
        **W4A4, epochs=0, rounding="nearest", overrides={"down_proj": {"activation_bits": 8}}
    )
    out = quantized.quantize(model, tmp_path / "out", method, only=("mlp.*", "layers.1.*"))
    loaded, _ = lowbit.load(out)
    assert set(marks(loaded)) == {"model.layers.1.self_attn"}
    bits = {n: m.activation.bits for n, m in loaded.named_modules() if hasattr(m, "activation")}
    assert {n for n, b in bits.items() if b == 8} == {n for n in bits if n.endswith("down_proj")}
    fallbacks = json.loads((out / "report.json").read_text())["fallbacks"]
    assert not any("queries" in reason for reason in fallbacks.values())


@pytest.mark.parametrize("name", ["opt", "mixtral"])
def test_gptq_sees_rounded_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = zoo.task(name)
    method = OmniQuant(**W4A4, let=True, rounding="gptq")
    seen = input_statistics(task.block, task.groups, task.streams["float"])
    learner = Learner(method, method.readings(task), seen, set())
    blocks: list[nn.Module] = []

    def spy(block: nn.Module, *args: Any) -> Any:
        blocks.append(block)
        return input_hessians(block, *args)

    monkeypatch.setattr("lowbit.methods.learned.input_hessians", spy)
    student = deepcopy(task)
    student.block = learner.readings.rounding_block()
    method.factors(student, learner, {"quantized": 1.0})
    wanted = deepcopy(task.block)
    load_changed(wanted, learner.folded())
    reads: dict[str, Tensor] = {}
    for linear in learner.linears:
        module = wanted.get_submodule(linear)
        module.register_forward_pre_hook(lambda m, args, n=linear: reads.setdefault(n, args[0]))
    call_block(wanted, task.streams["quantized"][0])
    found: dict[str, Tensor] = {}
    for linear in learner.linears:
        module = blocks[0].get_submodule(linear)
        module.register_forward_pre_hook(lambda m, args, n=linear: found.setdefault(n, args[0]))
    call_block(blocks[0], task.streams["quantized"][0])
    for group in task.groups:
        for row in found[group.linears[0]].flatten(0, -2)[:5]:
            assert len(row.unique()) <= 16
        assert len(reads[group.linears[0]].flatten(0, -2)[0].unique()) > 16


def test_dequantized_it_rounds_no_more_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = dequantize(folder("llama"), tmp_path / "dense")
    assert "will not round activations" in caplog.text
    weights_only, _ = lowbit.load(folder("llama"))
    for module in weights_only.modules():
        if isinstance(module, QuantizedLinear):
            module.activation = None
        if hasattr(module, MARK):
            delattr(module, MARK)
    found = quantized.logits(lowbit.load(dense)[0])
    assert zoo.error(found, quantized.logits(weights_only)) < 1e-5
    caplog.clear()
    dequantize(quantized.folder(), tmp_path / "plain")
    assert not caplog.text


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_streamed_for_eval_it_computes_the_same(name: str) -> None:
    streamed, tokens = stream(folder(name)), zoo.tokens()
    hidden = streamed.run([tokens])[0].hidden
    found = streamed.without_blocks().logits(tokens, hidden)
    assert torch.equal(found, quantized.logits(lowbit.load(folder(name))[0]))
