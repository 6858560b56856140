"""A model in memory and calibration as token ids: the same bytes as from a folder."""

from pathlib import Path

import pytest
import quantized
import torch
import zoo
from quantized import METHODS

import lowbit
from lowbit import TokenIds

pytestmark = pytest.mark.slow

IDS = torch.randint(0, zoo.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["rtn", "gptq", "omniquant"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "llama, tied, biased"])
def test_the_bytes_are_those_of_its_folder(name: str, method: str, tmp_path: Path) -> None:
    model, tokenizer = lowbit.load(quantized.source(name))
    a = lowbit.quantize(model, tmp_path / "a", METHODS[method], IDS, tokenizer=tokenizer)
    b = lowbit.quantize(quantized.source(name), tmp_path / "b", METHODS[method], IDS)
    shards = sorted(path.name for path in b.rglob("*.safetensors"))
    assert shards and all(
        (a / path.relative_to(b)).read_bytes() == path.read_bytes()
        for path in b.rglob("*.safetensors")
    )
    assert sorted(tmp_path.iterdir()) == [a, b]  # nothing is left of the temporary folder
    loaded, found = lowbit.load(a)
    assert torch.equal(quantized.logits(loaded), quantized.logits(lowbit.load(b)[0]))
    assert found("abc")["input_ids"] == tokenizer("abc")["input_ids"]


def test_without_a_tokenizer(tmp_path: Path) -> None:
    model, _ = lowbit.load(quantized.source())
    out = lowbit.quantize(model, tmp_path / "out", METHODS["gptq"], IDS.tolist())
    loaded, tokenizer = lowbit.load(out)
    assert tokenizer is None and quantized.logits(loaded).isfinite().all()
    made_by = quantized.section(out)["made_by"]
    assert made_by["calibration"]["sources"][0]["name"] == "token ids"
    assert made_by["source"] == quantized.source().name  # a name, no path
    with pytest.raises(ValueError, match="has no tokenizer"):
        lowbit.evaluate([out], texts=(quantized.text(),), seqlen=16)
    with pytest.raises(ValueError, match="give the model with its tokenizer"):
        lowbit.quantize(model, tmp_path / "other", METHODS["gptq"], quantized.calibration())


def test_the_same_call_continues_and_other_ids_are_another_run(tmp_path: Path) -> None:
    model, _ = lowbit.load(quantized.source())
    out, kinds = tmp_path / "out", []
    lowbit.quantize(model, out, METHODS["gptq"], IDS)
    lowbit.quantize(model, out, METHODS["gptq"], IDS, on_event=lambda e: kinds.append(e.kind))
    assert kinds == ["complete"]
    for other in (IDS.flip(0), TokenIds(IDS, seed=1)):
        with pytest.raises(ValueError, match="holds a run that differs in (calibration|seed)"):
            lowbit.quantize(model, out, METHODS["gptq"], other)


def test_a_plan_of_it() -> None:
    model, _ = lowbit.load(quantized.source())
    found = lowbit.plan(model, METHODS["gptq"], IDS)
    wanted = lowbit.plan(quantized.source(), METHODS["gptq"], IDS)
    assert (found.linears, found.bytes) == (wanted.linears, wanted.bytes)


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer is for a model in memory"):
        lowbit.quantize(quantized.source(), tmp_path / "out", METHODS["rtn"], tokenizer=object())
    with pytest.raises(ValueError, match=f"allowed are 0 to {zoo.VOCABULARY - 1}"):
        lowbit.quantize(quantized.source(), tmp_path / "out", METHODS["gptq"], IDS + 50)
    assert not list(tmp_path.iterdir())
