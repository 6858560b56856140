"""One table for float and quantized models."""

import json
import shutil
from pathlib import Path

import pytest
import zoo

import lowbit
from lowbit.eval import EvalOptions, evaluate

LLAMA = zoo.MODELS / "llama-mini"
STORIES = Path(__file__).parents[2] / "examples" / "text" / "held_back_stories.txt"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    method = lowbit.methods.RTN(bits=3, group_size=64)
    return lowbit.quantize(LLAMA, tmp_path_factory.mktemp("eval") / "out", method)


def test_rows(quantized: Path) -> None:
    options = EvalOptions(texts=(str(STORIES),), seqlen=64, limit=4)
    whole, small = evaluate([LLAMA, quantized], options)
    assert (whole.method, small.method) == ("float", "rtn")
    assert 1 < whole.perplexity[str(STORIES)] < small.perplexity[str(STORIES)] < 60
    assert whole.bits_per_weight == {"linears": 16.0, "model": 16.0}
    # 3 bits, and per 64 weights a scale of 16 and a zero of 3
    assert small.bits_per_weight["linears"] == pytest.approx(3 + 19 / 64, abs=1e-3)
    assert small.size_bytes == sum(f.stat().st_size for f in quantized.glob("*.safetensors"))
    for row in (whole, small):
        wanted = {"perplexity", "bits_per_weight", "size_bytes", "seqlen", "windows"}
        assert wanted <= row.to_json().keys()
        assert row.windows == {str(STORIES): 4} and row.seqlen == 64


def test_per_document(quantized: Path) -> None:
    options = EvalOptions(texts=(str(STORIES),), seqlen=64, limit=3, per_document=True)
    [row] = evaluate([quantized], options)
    assert row.per_document and row.windows == {str(STORIES): 3}


def test_a_context_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="context of 512 tokens; --seqlen 1024"):
        evaluate([LLAMA], EvalOptions(texts=(str(STORIES),), seqlen=1024))


def test_models_of_different_contexts_need_one_seqlen(tmp_path: Path) -> None:
    short = shutil.copytree(LLAMA, tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 128}
    (short / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="name one --seqlen for all"):
        evaluate([LLAMA, short], EvalOptions(texts=(str(STORIES),), limit=1))
