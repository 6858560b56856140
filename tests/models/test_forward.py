"""A model whose own code fails is named, in the same words, wherever it is run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch

from lowbit.eval.perplexity import losses_of
from lowbit.load import load_model, stream
from lowbit.models.forward import forward_pass
from lowbit.models.generation import greedy
from lowbit.models.self_check import check_streaming

# Factors for another number of channels than a head has: transformers finds that in the middle.
ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0],
    "long_factor": [1.0, 2.0],
    "original_max_position_embeddings": 64,
}
TOKENS = torch.arange(3, 8)
PATHS: dict[str, Callable[[Path], Any]] = {
    "generate": lambda folder: greedy(load_model(folder), TOKENS.tolist(), 2),
    "eval": lambda folder: losses_of(load_model(folder), [TOKENS]),
    "self-check": lambda folder: check_streaming(stream(folder)),
}


@pytest.mark.parametrize("name", PATHS)
def test_every_path_names_the_model(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized.source(), tmp_path / "model"))

    def stretch(config: dict[str, Any]) -> dict[str, Any]:
        config.pop("rope_parameters", None)
        return {**config, "rope_scaling": ROPE}

    quantized.edit_json(folder / "config.json", stretch)
    with pytest.raises(ValueError, match=r"model: the forward pass of \w+ in transformers fails"):
        PATHS[name](folder)


@pytest.mark.parametrize("error", [MemoryError("x"), torch.OutOfMemoryError("x")])
def test_too_little_memory_stays_that(error: Exception) -> None:
    with pytest.raises(type(error)), forward_pass(torch.nn.Identity(), TOKENS):
        raise error


def test_a_sentence_of_ours_stays_as_it_is() -> None:
    with (
        pytest.raises(ValueError, match="^/nowhere is not a folder$"),
        forward_pass(torch.nn.Identity(), TOKENS),
    ):
        load_model(Path("/nowhere"))
