"""Models of every family, and of architectures without a table, are quantized, loaded and run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
import zoo
from torch import Tensor

import lowbit
from lowbit.blocks.capture import call_block
from lowbit.blocks.walk import Step
from lowbit.checkpoint import CheckpointReader, QuantizedFolder
from lowbit.formats.base import QuantizedLinear
from lowbit.methods import OmniQuant
from lowbit.methods.result import BlockResult, too_few_tokens
from lowbit.models.source import SourceModel
from lowbit.pipeline.job import Job

pytestmark = pytest.mark.slow

FEW = OmniQuant(bits=3, group_size=16, epochs=1, min_tokens=12, rounding="nearest")


# Each family with one or two methods in `make test`, with all in `make test-exhaustive`.
PAIRS = [
    pytest.param(name, method, marks=() if (i + j) % 3 == 0 else pytest.mark.exhaustive)
    for i, name in enumerate([*zoo.ZOO, *zoo.DISCOVERED])
    for j, method in enumerate(quantized.METHODS)
]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_quantized_and_loaded(name: str, method: str) -> None:
    out, source = quantized.folder(name, method), SourceModel(quantized.source(name))
    model, tokenizer = lowbit.load(out)
    logits = quantized.logits(model)
    assert logits.isfinite().all()
    assert torch.equal(logits, quantized.logits(lowbit.load(out)[0]))
    linears = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert linears == {
        f"{block}.{linear}"
        for block in source.block_names
        for group in source.groups(block)
        for linear in group.linears
    }
    entries = QuantizedFolder(out).entries
    assert set(entries) == {source.disk_name(name) for name in linears}
    error = zoo.error(logits, quantized.logits(lowbit.load(quantized.source(name))[0]))
    assert 0.001 < error < 0.9


FLOAT32 = [(name, torch.float32) for name in (*zoo.ZOO, "gemma2", "olmoe")]
HALF = [("opt", torch.float16), ("llama, tied, biased", torch.bfloat16), ("mixtral", torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), FLOAT32 + HALF)
def test_what_is_saved_is_what_ran(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What entered each block is, bit for bit, what enters it in the loaded model; and each block
    was called as the float model calls it."""
    tokens: list[Tensor] = []
    entered: list[Tensor] = []
    left: list[Tensor] = []
    first_stream, quantize_block = SourceModel.first_stream, Job.quantize_block

    def spy_stream(self: SourceModel, batches: Any, *args: Any, **more: Any) -> Any:
        tokens.extend(batches)
        return first_stream(self, batches, *args, **more)

    def spy_block(self: Any, writer: Any, step: Step, log: Any) -> BlockResult:
        entered.extend(batch.hidden.clone() for batch in step.streams["quantized"])
        with torch.no_grad():
            left.extend(call_block(step.block, batch) for batch in step.streams["float"])
        return quantize_block(self, writer, step, log)

    monkeypatch.setattr(SourceModel, "first_stream", spy_stream)
    monkeypatch.setattr(Job, "quantize_block", spy_block)
    model = quantized.source(name, dtype)
    # The self-check would run windows of its own.
    out = quantized.quantize(model, tmp_path / "out", "omniquant", self_check=False)
    blocks = SourceModel(model).block_names
    assert len(tokens) == quantized.SAMPLES and len(entered) == 2 * len(tokens)
    ran = [before for before, _ in states(out, blocks, tokens)]
    assert all(map(torch.equal, ran, entered))
    whole = [after for _, after in states(model, blocks, tokens)]
    pairs = zip(whole, left, strict=True)  # its experts are fused, ours are not
    assert max(zoo.error(a, b) for a, b in pairs) < 1e-6


def states(folder: Path, blocks: list[str], batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What goes into a block of the loaded model and what comes out: for each block, each batch."""
    model, _ = lowbit.load(folder)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in blocks}

    def hook(name: str) -> Callable[..., None]:
        def see(module: Any, args: tuple[Tensor, ...], out: Any) -> None:
            seen[name].append((args[0], out[0] if isinstance(out, tuple) else out))

        return see

    for name in blocks:
        model.get_submodule(name).register_forward_hook(hook(name))
    for batch in batches:
        with torch.no_grad():
            model(batch, use_cache=False)
    return [pair for name in blocks for pair in seen[name]]


def test_names_on_disk_are_those_of_the_family() -> None:
    tensors = QuantizedFolder(quantized.folder("mixtral")).reader.tensors
    expert = "model.layers.1.block_sparse_moe.experts.3"
    parts = ("packed", "scale", "zero")
    found = {name for name in tensors if name.startswith(f"{expert}.")}
    assert found == {f"{expert}.{w}.{part}" for w in ("w1", "w2", "w3") for part in parts}
    assert "model.layers.1.block_sparse_moe.gate.weight" in tensors
    modules = quantized.section(quantized.folder("mixtral"))["modules"]
    assert sorted(modules) == [
        "model.layers.{0-1}.block_sparse_moe.experts.{0-3}.w1",
        "model.layers.{0-1}.block_sparse_moe.experts.{0-3}.w2",
        "model.layers.{0-1}.block_sparse_moe.experts.{0-3}.w3",
        *(f"model.layers.{{0-1}}.self_attn.{p}_proj" for p in "koqv"),
    ]


def test_an_expert_that_saw_too_little_is_named(tmp_path: Path) -> None:
    out = quantized.quantize(quantized.source("mixtral"), tmp_path / "out", FEW)
    report = json.loads((out / "report.json").read_text())
    wanted = {}
    for block, facts in report["blocks"].items():
        experts = {n: known for n, known in facts["linears"].items() if ".experts." in n}
        assert sum(known["tokens"] for n, known in experts.items() if n.endswith("w1")) == 64
        wanted |= {
            f"{block}.{name}": too_few_tokens(known["tokens"])
            for name, known in experts.items()
            if known["tokens"] < FEW.min_tokens
        }
    fallbacks = {n: t for n, t in report["fallbacks"].items() if ".experts." in n}
    assert fallbacks == wanted != {}
    assert len(wanted) < 24


def test_the_router_stays_float() -> None:
    for name, routers in {"mixtral": 2, "qwen3_moe": 1, "olmoe": 2, "qwen2_moe": 4}.items():
        report = json.loads((quantized.folder(name) / "report.json").read_text())
        assert len(report["left_float"]) == routers
        assert all("gate" in left for left in report["left_float"])


@pytest.mark.parametrize("method", quantized.METHODS)
def test_matrices_that_stay_float(method: str, tmp_path: Path) -> None:
    model, patterns = quantized.source("recurrent_gemma"), ("*.conv_1d", "*.rg_lru.*")
    out = quantized.quantize(model, tmp_path / "out", method, allow_float=patterns)
    block = "model.layers.0.temporal_block"
    gates = [f"rg_lru.{g}_gate_{p}" for g in ("input", "recurrent") for p in ("bias", "weight")]
    report = json.loads((out / "report.json").read_text())
    assert report["left_float"] == [f"{block}.{name}" for name in ("conv_1d", *gates)]
    before, after = CheckpointReader(model), CheckpointReader(out)
    left = [name for name in before.tensors if name.startswith(tuple(report["left_float"]))]
    assert len(left) == 6
    assert all(map(torch.equal, before.read(left).values(), after.read(left).values()))
    loaded, _ = lowbit.load(out)
    assert isinstance(loaded.get_submodule(f"{block}.linear_x"), QuantizedLinear)
    assert zoo.error(quantized.logits(loaded), quantized.logits(lowbit.load(model)[0])) < 0.9
