"""Losses and gradients of the student are those of the whole model, in memory and from disk."""

from pathlib import Path
from typing import Any

import pytest
import quantized
import zoo
from whole_gradients import compare_gradients

from lowbit.eval.divergence import StreamedLogits, divergence
from lowbit.methods import PTQ161, RTN, MixedQuant, OmniQuant
from lowbit.models import streamed
from lowbit.tuning.student import Student
from lowbit.tuning.teacher import most_likely

pytestmark = pytest.mark.slow

BINARY = PTQ161(epochs=0, alignment=4, salient_ratio=0.2, min_tokens=1)
SORTED = MixedQuant(group_size=16, salient_ratio=0.1, alignment=4, min_tokens=1)
HEAD = RTN(bits=3, group_size=16)
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
    "a quantized head": ("llama, tied, biased", HEAD),
}


def options(key: str) -> dict[str, Any]:
    return {"lm_head_bits": 4} if key == "a quantized head" else {}


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
                else quantized.quantize(quantized.source(name), out, method, **options(key))
            )
        return quantized.source(name), made[key]

    return folder


def targets(source: Path) -> list[Any]:
    model = StreamedLogits(source, list(TOKENS))
    return [most_likely(model(row, slice(0, TOKENS.shape[1] - 1))) for row in range(len(TOKENS))]


SAMPLE = ("uniform", "lattice", "experts")  # `make test-exhaustive` runs all


@pytest.mark.parametrize(
    "key", [pytest.param(k, marks=() if k in SAMPLE else pytest.mark.exhaustive) for k in FOLDERS]
)
def test_gradients_are_those_of_the_whole_model(
    folders: Any, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "LOGITS", 5 * zoo.VOCABULARY)  # the head runs in pieces
    source, folder = folders(key)
    wanted = targets(source)
    for place in (None, tmp_path / "inputs"):
        student = Student(folder, place=place)
        student.add_gradients(TOKENS, wanted)
        assert compare_gradients(student, TOKENS, wanted) > 10
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
