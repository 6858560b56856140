"""Gradients block by block are those of the whole model, in many families."""

from pathlib import Path

import families
import image_text_zoo
import pytest
from torch import Tensor
from whole_gradients import compare_gradients

import lowbit
from lowbit.eval.divergence import StreamedLogits
from lowbit.methods import RTN
from lowbit.tuning.student import Student
from lowbit.tuning.teacher import most_likely

pytestmark = pytest.mark.families

# State that blocks hand on, blocks with common linears, recurrences, norms before the blocks.
MORE = ("gemma3n_text", "zaya", "zamba2", "mamba", "mamba2", "bloom", "rwkv", "phi", "cohere")


METHOD = RTN(bits=3, group_size=16)


def check(source: Path, out: Path) -> None:
    folder = lowbit.quantize(source, out, METHOD, device="cpu", without_tokenizer=True)
    tokens: Tensor = families.tokens(1, rows=2, length=12).clamp(max=93)  # no image tokens
    model = StreamedLogits(source, list(tokens))
    target = [most_likely(model(row, slice(0, 11))) for row in range(2)]
    student = Student(folder)
    before = student.divergence([tokens], [target])
    assert student.add_gradients(tokens, target) == pytest.approx(before, rel=1e-4)
    assert compare_gradients(student, tokens, target) > 4


@pytest.mark.parametrize("model_type", sorted({*families.KINDS.values(), *MORE}))
def test_gradients_of_a_family(model_type: str, tmp_path: Path) -> None:
    families.make(model_type).save_pretrained(tmp_path / "float")
    check(tmp_path / "float", tmp_path / "out")


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl", "llava", "llama4"])
def test_of_models_with_images_the_language_part(name: str, tmp_path: Path) -> None:
    check(image_text_zoo.folder(name), tmp_path / "out")
