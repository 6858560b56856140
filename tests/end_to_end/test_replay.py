"""--start-from: learned parameters are applied again with the same result, or trained further."""

import json
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
from safetensors.torch import load_file

from lowbit.events import BlockFinished, Event
from lowbit.methods import OmniQuant

pytestmark = pytest.mark.slow

METHOD = quantized.METHODS["omniquant"]


def shards(out: Path) -> dict[str, bytes]:
    return {n: b for n, b in quantized.contents(out).items() if n.endswith(".safetensors")}


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_no_epochs_replay_to_the_same_bytes(tmp_path: Path, name: str) -> None:
    first = quantized.folder(name, "omniquant")
    again = METHOD.model_copy(update={"epochs": 0})
    out = quantized.quantize(quantized.source(name), tmp_path / "out", again, start_from=first)
    assert shards(out) == shards(first)


def test_training_goes_on_where_it_ended(tmp_path: Path) -> None:
    first, losses = quantized.folder("llama", "omniquant"), {}

    def note(event: Event) -> None:
        if isinstance(event, BlockFinished) and event.index == 0:
            losses[event.block] = event.loss_after

    out = quantized.quantize(
        quantized.source(), tmp_path / "out", METHOD, start_from=first / "learned", on_event=note
    )
    learned = "learned/model-00002-of-00003.safetensors"
    before, after = load_file(first / learned), load_file(out / learned)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[n], after[n]) for n in before)
    (loss,) = losses.values()
    events = map(json.loads, (first / "events.jsonl").read_text().splitlines())
    (earlier,) = (e for e in events if e["kind"] == "finished" and e["index"] == 0)
    assert loss <= earlier["loss_after"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "rtn"}, "needs a method that learns parameters; rtn does not"),
    "groups": (
        {
            "method": OmniQuant(
                bits=3, group_size=8, let=True, min_tokens=8, init="minmax", rounding="nearest"
            )
        },
        r"model.layers.0: .*clip_low with shape \[48, 3\], but these settings need \[48, 6\]",
    ),
    "fields": (
        {
            "method": OmniQuant(
                bits=3, group_size=16, let=False, min_tokens=8, init="minmax", rounding="nearest"
            )
        },
        r"model.layers.0: the earlier run learned fold.*log_scale .*do not learn",
    ),
    "folder": (
        {"method": METHOD, "start_from": Path(__file__).parent},
        "lacks model-00002-of-00003",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str) -> None:
    options, message = REFUSED[name]
    options = {"start_from": quantized.folder("llama", "omniquant")} | options
    with pytest.raises(ValueError, match=message):
        quantized.quantize(quantized.source(), tmp_path / "out", **options)


def test_another_start_is_another_run(tmp_path: Path) -> None:
    first = quantized.folder("llama", "omniquant")
    out = quantized.quantize(quantized.source(), tmp_path / "out", METHOD)
    with pytest.raises(ValueError, match="differs in start_from"):
        quantized.quantize(quantized.source(), out, METHOD, start_from=first)
