"""Losses and gradients of the student are those of the whole model, in memory and from disk."""

from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
import zoo
from torch import nn

from lowbit.eval.divergence import StreamedLogits, divergence
from lowbit.formats import use_backend
from lowbit.formats.base import QuantizedLinear
from lowbit.load import load_model
from lowbit.methods import PTQ161, MixedQuant, OmniQuant
from lowbit.models.skeleton import unfuse_experts
from lowbit.tuning import student as module
from lowbit.tuning.student import Student
from lowbit.tuning.teacher import loss, most_likely
from lowbit.tuning.vectors import store_vectors, vectors_in

pytestmark = pytest.mark.slow

BINARY = PTQ161(epochs=0, alignment=4, salient_ratio=0.2, min_tokens=1)
SORTED = MixedQuant(group_size=16, salient_ratio=0.1, alignment=4, min_tokens=1)
ROUNDED = OmniQuant(bits=4, activation_bits=4, epochs=0, min_tokens=1, init="minmax")
# A family, and what quantized it: every format, rounded inputs, experts, a tied and a biased head.
FOLDERS: dict[str, tuple[str, Any]] = {
    "uniform": ("llama", "rtn"),
    "lattice": ("llama", "quip"),
    "nested": ("llama", "matquant"),
    "binary": ("llama", BINARY),
    "sorted_group, rounded inputs": ("llama", SORTED),
    "rounded inputs and attention": ("llama, tied, biased", ROUNDED),
    "experts": ("mixtral", "gptq"),
    "norms behind": ("opt, norms behind", "rtn"),
}
TOKENS = zoo.tokens(3, rows=2, length=12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def folder(key: str) -> tuple[Path, Path]:
        name, method = FOLDERS[key]
        if key not in made:
            out = tmp_path_factory.mktemp("quantized") / "out"
            made[key] = (
                quantized.folder(name, method)
                if isinstance(method, str)
                else quantized.quantize(quantized.source(name), out, method)
            )
        return quantized.source(name), made[key]

    return folder


def targets(source: Path) -> list[Any]:
    model = StreamedLogits(source, list(TOKENS))
    return [most_likely(model(row, slice(0, TOKENS.shape[1] - 1))) for row in range(len(TOKENS))]


@use_backend("reference")
def whole_gradients(folder: Path, wanted: list[Any], widths: Any) -> dict[str, torch.Tensor]:
    """The gradients by the values of vectors, of the whole model as transformers runs it."""
    model: Any = load_model(folder, dtype=torch.float32)
    unfuse_experts(model)
    store_vectors(model)
    found: dict[str, nn.Parameter] = {}
    for path, inside, name in list(vectors_in(model)):
        value = nn.Parameter(inside.get_parameter(name).detach().float())
        inside.register_parameter(name, value)
        layer = isinstance(inside, QuantizedLinear)
        found[f"{inside.stored_as if layer else path}.{name}"] = value
    total = torch.zeros(())
    for bits in widths:
        for layer in model.modules() if bits else ():
            if isinstance(layer, QuantizedLinear):
                layer.set_bits(bits)
        logits = model(TOKENS, use_cache=False).logits[:, :-1]
        losses = [loss(*pair) for pair in zip(logits, wanted, strict=True)]
        total = total + torch.stack(losses).mean() / len(widths)
    total.backward()  # type: ignore[no-untyped-call]
    return {name: value.grad for name, value in found.items() if value.grad is not None}


SAMPLE = ("uniform", "lattice", "experts")  # `make test-exhaustive` runs all


@pytest.mark.parametrize(
    "key", [pytest.param(k, marks=() if k in SAMPLE else pytest.mark.exhaustive) for k in FOLDERS]
)
def test_gradients_are_those_of_the_whole_model(
    folders: Any, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGITS", 5 * zoo.VOCABULARY)  # the head runs in pieces
    source, folder = folders(key)
    wanted = targets(source)
    for place in (None, tmp_path / "inputs"):
        student = Student(folder, place=place)
        student.add_gradients(TOKENS, wanted)
        whole = whole_gradients(folder, wanted, student.widths)
        found = {n: v.change.grad for n, v in student.vectors.items() if v.change.grad is not None}
        assert found.keys() == whole.keys() and len(found) > 10
        for name, gradient in found.items():
            vector = student.vectors[name]
            error = zoo.error(gradient, whole[name] * vector._unit)
            assert error < 1e-4 or whole[name].abs().max() < 1e-7, name
        assert not (tmp_path / "inputs").exists()


@pytest.mark.parametrize("key", ["uniform", "lattice", "experts"])
def test_the_loss_is_what_eval_measures(folders: Any, key: str) -> None:
    source, folder = folders(key)
    rows = list(TOKENS)
    measured, _ = divergence(StreamedLogits(source, rows), StreamedLogits(folder, rows), range(2))
    student = Student(folder)
    wanted = targets(source)
    found = student.divergence([TOKENS], [wanted])
    # 64 of 101 tokens and the rest: most of the divergence, and never more.
    assert 0.9 * measured.kl < found <= measured.kl + 1e-5
    assert student.add_gradients(TOKENS, wanted) == pytest.approx(found, abs=1e-6)
    apart = student.divergence([TOKENS[:1], TOKENS[1:]], [wanted[:1], wanted[1:]])
    assert apart == pytest.approx(found, abs=1e-6)


def test_what_no_gradient_reaches_is_no_vector(folders: Any) -> None:
    """OPT's embeddings are projected before the blocks; only the norm behind them is reached."""
    student = Student(quantized.folder("opt", "rtn"))
    outside = {name for name in student.vectors if ".layers." not in name}
    assert outside == {
        "model.decoder.final_layer_norm.weight",
        "model.decoder.final_layer_norm.bias",
    }


def test_widths_are_those_that_were_trained(folders: Any) -> None:
    assert Student(folders("nested")[1]).widths == (2, 4, 8)
    assert Student(folders("uniform")[1]).widths == (None,)
