"""lowbit.bench: random models, what of them is measured, and the peer."""

import sys
from pathlib import Path

import pytest
import quantized
import torch
import zoo

import lowbit
from lowbit.bench import llama_cpp, measure
from lowbit.bench.copying import copy_bandwidth
from lowbit.bench.linears import record, stored_bytes, weights
from lowbit.bench.llama_cpp import LlamaCpp, nearest_type, write_random
from lowbit.bench.random_model import random_float, random_quantized
from lowbit.bench.shapes import DEFAULTS, OWNERS, SHAPES, parse_format, parse_shape
from lowbit.bench.subject import of_folder
from lowbit.formats import FORMATS
from lowbit.formats.base import QuantizedLinear
from lowbit.models.generation import greedy

SMALL = "tinyllama:layers=2,vocabulary=96,hidden=256,wide=512,heads=4,kv_heads=2"
FORMS = {name: name for name in DEFAULTS} | {
    "nested master": "nested:resident=master",
    "lattice of two stages": "lattice:codebook=E8P12RVQ3B",
    "lattice D4": "lattice:codebook=D4",
    "int8 beside": "sorted_group:salient_dtype=int8,group_size=64",
    "8 bits by rows": "uniform:bits=8,group_size=none",
}


def test_all_formats_can_be_measured() -> None:
    assert DEFAULTS.keys() == FORMATS.keys() - {"embedding"}  # of tables, not of linears


@pytest.mark.kernels
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_random_model_of_every_format(form: str) -> None:
    """Every linear is recorded once, in order, and those of one input together."""
    shape = parse_shape(SMALL)
    model = random_quantized(shape, form)
    steps, named = record(model), {m: n for n, m in model.named_modules()}
    blocks = [f"model.layers.{i}.{name}" for i in range(2) for name in shape.linears]
    assert [named[layer] for step in steps for layer in step.layers] == [*blocks, "lm_head"]
    assert [len(step.layers) for step in steps] == [3, 1, 2, 1] * 2 + [1]
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert stored_bytes(steps) == sum(layer.weight_bytes() for layer in layers)
    assert weights(steps) == sum(n * k for n, k in shape.linears.values()) * 2 + 96 * 256
    assert len(greedy(model, [1], 3)) == 3  # logits are finite
    for layer in layers:
        layer.check_values({n: t for n, t in layer.state_dict().items() if n in layer.limited})


def test_linears_that_share_name_their_owner() -> None:
    model = random_quantized(parse_shape(SMALL), "lattice")
    for name, owner in OWNERS.items():
        block = model.model.layers[1]
        assert block.get_submodule(name).owner is block.get_submodule(owner)


def test_speed_in_numbers() -> None:
    model = random_float(parse_shape(SMALL), torch.float32)

    class Peer:
        calls: list[tuple[int, int, int]] = []

        def seconds(self, tokens: int, threads: int, together: int = 1) -> list[float]:
            self.calls.append((tokens, threads, together))
            return [1.0] * tokens

    peer, before = Peer(), torch.get_num_threads()
    found = measure.measure(model, threads=1, rounds=2, peer=peer).to_json()
    assert peer.calls == [(measure.PASSES, 1, 1)] * 2 and torch.get_num_threads() == before
    best = found["linears_ms"]["best"]
    assert found["peer_over_linears"] == pytest.approx(1000 / best)
    assert found["bytes_per_second"] == pytest.approx(1000 * found["stored_bytes"] / best)
    assert best <= found["linears_ms"]["tenth"] <= found["linears_ms"]["median"]
    assert found["bandwidth"] is None and found["backends"] == []  # kernels are off in this test
    prompt = measure.measure(model, threads=1, tokens=5, rounds=1, peer=peer).to_json()
    assert peer.calls[-1] == (1, 1, 5) and "generation_ms" not in prompt
    assert prompt["operations_per_second"] == pytest.approx(
        10 * weights(record(model)) / prompt["linears_ms"]["best"] * 1000
    )


FAMILIES = ["llama", "opt", "mixtral", "falcon 7b", "gpt2"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_folders_of_any_family(family: str) -> None:
    subject = of_folder(str(quantized.folder(family)), 8)
    steps = record(subject.model)
    called = {id(layer) for step in steps for layer in step.layers}
    quantized_layers = [m for m in subject.model.modules() if isinstance(m, QuantizedLinear)]
    assert called & {id(layer) for layer in quantized_layers}
    assert all(layer.input_bits == 8 for layer in quantized_layers)
    if family != "mixtral":  # its router leaves experts out
        assert {id(layer) for layer in quantized_layers} <= called
    measure.measure(subject.model, threads=1, rounds=1)
    if family == "llama":
        config = subject.model.config
        assert subject.shape_for_peer().wide == config.intermediate_size
    else:
        with pytest.raises(ValueError, match="has other linears than a Llama"):
            subject.shape_for_peer()


TYPES = {"uniform": [(8.0, "Q8_0"), (4.2, "Q4_0"), (3.2, "Q3_K"), (2.1, "Q2_K")]} | {
    "lattice": [(2.0, "IQ2_XXS"), (3.0, "IQ3_XXS"), (4.0, "Q4_0")],
    "trellis": [(1.5, "IQ1_S"), (2.0, "IQ2_XXS"), (3.0, "IQ3_XXS")],
    "binary": [(1.6, "IQ1_S")],
}


@pytest.mark.parametrize("form", TYPES)
def test_the_nearest_type(form: str) -> None:
    assert all(nearest_type(form, bits) == name for bits, name in TYPES[form])


@pytest.mark.parametrize("kind", llama_cpp.SCALES)
def test_a_file_for_the_peer_has_finite_weights(kind: str, tmp_path: Path) -> None:
    import gguf

    write_random(tmp_path / "x.gguf", kind, parse_shape(SMALL))
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    tensors = {t.name: t for t in reader.tensors}
    assert len(tensors) == 2 + 1 + 2 * (2 + 7)
    found = tensors["blk.1.ffn_down.weight"]
    assert found.tensor_type.name == kind and list(found.shape) == [512, 256]
    values = gguf.quants.dequantize(found.data, found.tensor_type)
    assert abs(values).max() < 10 and values.std() > 0


MISTAKES = {
    "shape": (lambda: parse_shape("gpt"), "--shape: 'gpt' is not a shape"),
    "field of a shape": (lambda: parse_shape("tinyllama:depth=2"), "'depth' is not a field"),
    "value of a shape": (lambda: parse_shape("tinyllama:layers=two"), "layers is 'two': allowed"),
    "heads": (lambda: parse_shape("tinyllama:kv_heads=5"), "must be a multiple of kv_heads"),
    "no value": (lambda: parse_shape("tinyllama:layers"), "allowed is NAME or NAME:FIELD=VALUE"),
    "format": (lambda: parse_format("unifrom"), "'unifrom' is not a format"),
    "field of a format": (lambda: parse_format("uniform:bit=4"), "bit"),
    "value of a format": (lambda: parse_format("uniform:bits=9"), "bits"),
    "codebook": (lambda: parse_format("lattice:codebook=E9"), "E9"),
    "folder": (lambda: of_folder("/no/where", 16), "/no/where: there is no such folder"),
    "float model": (lambda: of_folder(str(zoo.MODELS / "llama-mini"), 16), "is a float model"),
}


@pytest.mark.parametrize(("call", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, sentence: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        call()
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_libraries_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        LlamaCpp(tmp_path / "none")
    with pytest.raises(ValueError, match="it has no libggml: name the folder"):
        LlamaCpp(tmp_path)
    for name in ("libggml.so", "libllama.so"):
        (tmp_path / name).write_text("no library")
    with pytest.raises(ValueError, match="libraries cannot be used"):
        LlamaCpp(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'lowbit\[gguf\]'"):
        write_random(tmp_path / "x", "Q4_0", SHAPES["tinyllama"])


def test_a_model_that_was_loaded_is_not_changed() -> None:
    model, _ = lowbit.load(quantized.folder())
    before = quantized.logits(model)
    measure.measure(model, threads=1, rounds=1)
    assert torch.equal(quantized.logits(model), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_copy_reads_and_writes_at_least_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((1.0, 1.5))
    monkeypatch.setattr("lowbit.bench.copying.time.perf_counter", lambda: next(clock))
    assert copy_bandwidth(torch.device("cpu"), 1000, least=3000) == 2 * 3000 / 0.5
