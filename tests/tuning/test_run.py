"""What lowbit tune writes: the same codes, other vectors, a folder that verifies and loads."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import lowbit
from lowbit.calibration import Calibration
from lowbit.checkpoint import CheckpointReader, QuantizedFolder
from lowbit.events import Event, TrainingStep
from lowbit.formats import FORMATS
from lowbit.methods import PTQ161, MixedQuant
from lowbit.tuning import Tuned
from lowbit.tuning.student import Student

pytestmark = pytest.mark.slow

VERSION_1 = Path(__file__).parents[1] / "checkpoint" / "version_1"
SMALL: dict[str, Any] = {"steps": 4, "batch": 2, "measure_every": 2, "rate": 1e-2}
BINARY = PTQ161(epochs=0, alignment=4, salient_ratio=0.2, min_tokens=1)
SORTED = MixedQuant(group_size=16, salient_ratio=0.1, alignment=4, min_tokens=1)
# What quantized a Llama, and the learning rate: most formats improve in any direction that helps.
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "uniform": ("rtn", {}),
    "lattice": ("quip", {}),
    "nested": ("matquant", {"rate": 1e-3}),
    "binary": (BINARY, {}),
    "sorted_group": (SORTED, {}),
}


def tune(folder: Path, out: Path, log: Any = lambda event: None, **options: Any) -> Tuned:
    text = Calibration(sources=(quantized.text(),), samples=8, seqlen=16)
    reference = options.pop("reference", quantized.source())
    given = {"device": "cpu"} | SMALL | options
    return lowbit.tune(folder, out, reference, text, **given, on_event=log)


def weights(folder: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(folder)
    return reader.read(reader.tensors)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        method = RUNS[name][0]
        if name not in made:
            out = tmp_path_factory.mktemp("quantized") / "out"
            known = isinstance(method, str)
            made[name] = (
                quantized.folder("llama", method)
                if known
                else quantized.quantize(quantized.source(), out, method)
            )
        return made[name]

    return folder


def some(cases: Any, few: tuple[Any, ...]) -> list[Any]:
    """All cases, of which `make test` runs a few."""
    return [pytest.param(c, marks=() if c in few else pytest.mark.exhaustive) for c in cases]


@pytest.mark.parametrize("name", some(RUNS, ("uniform", "lattice")))
def test_codes_stay_and_vectors_move(llamas: Any, name: str, tmp_path: Path) -> None:
    folder, out = llamas(name), tmp_path / "out"
    done = tune(folder, out, **RUNS[name][1])
    assert done.better and done.after < done.before and done.out == out
    before, after = weights(folder), weights(out)
    signs = {n for n in after if n.rpartition(".")[2] in ("sign_in", "sign_out")}
    assert after.keys() - signs == before.keys() and bool(signs) == (name == "lattice")
    moved = {n for n, tensor in before.items() if not torch.equal(tensor, after[n])}
    vectors = {f"{n}.{v}" for n in QuantizedFolder(out).entries for v in FORMATS[name].vectors}
    norms = {n for n in before if n.endswith("norm.weight")}
    assert moved <= vectors | norms and len(moved) > 10 and norms & moved
    assert {n: t.dtype for n, t in before.items()} == {n: after[n].dtype for n in before}
    QuantizedFolder(out).verify()
    tokens = torch.tensor([[3, 4, 5, 6]])
    ours = lowbit.load(out)[0](tokens).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(tokens).logits, ours)
    assert not torch.equal(lowbit.load(folder)[0](tokens).logits, ours)
    assert not (tmp_path / "out.work").exists()


def test_how_it_was_made_is_recorded_and_the_rest_stays(llamas: Any, tmp_path: Path) -> None:
    folder, out = llamas("lattice"), tmp_path / "out"
    done = tune(folder, out)
    before, after = quantized.section(folder), quantized.section(out)
    tuned = after["made_by"].pop("tuned")
    assert after["made_by"] == before["made_by"]
    assert tuned["divergence"] == {"before": done.before, "after": done.after}
    assert tuned["checked"] == "hash" and tuned["reference"] == quantized.source().name
    assert (tuned["steps"], tuned["tokens"]) == (4, 4 * 2 * 16)
    assert tuned["course"].keys() == {"0", "2", "4"} and tuned["held_out"] == 1
    entries = after["modules"].items()
    assert {n: e | {"signs": "seed"} for n, e in entries} == before["modules"]
    again = tune(out, tmp_path / "again")
    assert quantized.section(again.out)["made_by"]["tuned"]["earlier"] == tuned
    assert again.before == pytest.approx(done.after, abs=1e-6)  # what was measured was written


def test_a_result_that_is_not_better_is_a_copy(llamas: Any, tmp_path: Path) -> None:
    folder, out = llamas("lattice"), tmp_path / "out"
    done = tune(folder, out, rate=0.9, steps=2)
    assert not done.better and done.after == done.before and done.best_step == 0
    assert weights(folder).keys() == weights(out).keys()
    assert all(torch.equal(t, weights(out)[n]) for n, t in weights(folder).items())
    assert quantized.section(out)["made_by"] == quantized.section(folder)["made_by"]
    QuantizedFolder(out).verify()


@pytest.mark.parametrize("moment", some(["teacher", "training", 2, 3, 4], (2,)))
def test_stopped_anywhere_the_same_call_goes_on_to_the_same_bytes(
    llamas: Any, tmp_path: Path, moment: str | int
) -> None:
    def stop(event: Event) -> None:
        if moment in (event.kind, getattr(event, "step", None)):
            raise KeyboardInterrupt

    folder = llamas("lattice")
    options = {"steps": 6, "measure_every": 1 if moment == 3 else 2}
    with pytest.raises(KeyboardInterrupt):
        tune(folder, tmp_path / "out", stop, **options)
    assert not (tmp_path / "out").exists()
    steps: list[int] = []
    tune(folder, tmp_path / "out", lambda e: steps.append(getattr(e, "step", 0)), **options)
    assert (2 in steps) == (moment in ("teacher", "training"))
    whole = tune(folder, tmp_path / "whole", **options)
    assert quantized.contents(tmp_path / "out") == quantized.contents(whole.out)


def test_blocks_on_disk_lead_to_the_same_bytes(llamas: Any, tmp_path: Path) -> None:
    places = ("memory", "disk")
    for place in places:
        tune(llamas("lattice"), tmp_path / place, blocks=place, steps=2)
    one, other = (weights(tmp_path / place) for place in places)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_what_is_wrong_is_refused_before_any_work(llamas: Any, tmp_path: Path) -> None:
    folder = llamas("uniform")
    with pytest.raises(ValueError, match="is not the model from which .* was quantized: the hash"):
        tune(folder, tmp_path / "out", reference=quantized.source(seed=1))
    with pytest.raises(ValueError, match="was quantized by lowbit|float model"):
        tune(folder, tmp_path / "out", reference=folder)
    with pytest.raises(ValueError, match="was not quantized by lowbit|is a float model"):
        tune(quantized.source(), tmp_path / "out")
    with pytest.raises(ValueError, match="seqlen is 1,000 tokens: the model's context is 64"):
        text = Calibration(sources=(quantized.text(),), seqlen=1000)
        lowbit.tune(folder, tmp_path / "out", quantized.source(), text)
    with pytest.raises(ValueError, match="use fewer samples or more text"):
        text = Calibration(sources=(quantized.text(),), samples=1000, seqlen=16)
        lowbit.tune(folder, tmp_path / "out", quantized.source(), text)
    with pytest.raises(ValueError, match="samples is 1, of which 1 are held out"):
        text = Calibration(sources=(quantized.text(),), samples=1, seqlen=16)
        lowbit.tune(folder, tmp_path / "out", quantized.source(), text)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists already"):
        tune(folder, tmp_path / "out")


def test_another_run_in_the_folder_of_work_is_refused(llamas: Any, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, TrainingStep):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(llamas("uniform"), tmp_path / "out", stop)
    with pytest.raises(ValueError, match="out.work holds a run that differs in rate"):
        tune(llamas("uniform"), tmp_path / "out", rate=1e-4)
    assert tune(llamas("uniform"), tmp_path / "out", rate=1e-4, restart=True).out.exists()


def test_a_loss_that_is_not_finite_ends_the_run(
    llamas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Student, "add_gradients", lambda *given: math.nan)
    with pytest.raises(ValueError, match=r"loss at step 1 is not finite .*: lower the learning"):
        tune(llamas("uniform"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["uniform", "lattice"])
def test_a_folder_of_version_1_without_a_hash(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(VERSION_1 / name, tmp_path / "old"))
    quantized.edit_json(folder / "config.json", without_hash)
    letters_of(32).save_pretrained(folder)
    dense = lowbit.dequantize(folder, tmp_path / "dense")
    draw = torch.Generator().manual_seed(0)
    for file in CheckpointReader(dense).files:  # the float model is not quite the quantized one
        stored = load_file(dense / file)
        noisy = {
            n: t + 0.02 * torch.randn(t.shape, generator=draw).to(t) for n, t in stored.items()
        }
        save_file(noisy, dense / file, metadata={"format": "pt"})
    done = tune(folder, tmp_path / "out", reference=dense)
    section = quantized.section(done.out)
    assert done.better and section["version"] == 1
    assert section["made_by"]["tuned"]["checked"] == "shapes"
    QuantizedFolder(done.out).verify()
    assert lowbit.load(done.out)[0](torch.tensor([[3, 4]])).logits.isfinite().all()


def letters_of(count: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer whose tokens are letters; those folders have few rows for tokens."""
    vocabulary = {"?": 0} | {chr(ord("a") + i - 1): i for i in range(1, min(count, 27))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def without_hash(config: dict[str, Any]) -> None:
    del config["quantization_config"]["made_by"]["model"]
    config["quantization_config"].pop("digest", None)
