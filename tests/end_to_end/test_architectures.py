"""Every causal language model of transformers works, or is listed with the reason.

`make test` runs one model of each kind and one in twenty of the rest, `make test-families` the
others.
"""

from pathlib import Path

import families
import pytest
import torch

import lowbit
from lowbit.load import load_model
from lowbit.load.model import stream
from lowbit.methods import GPTQ, Method, OmniQuant, QuIP, Trellis
from lowbit.models.generation import greedy

ALL = families.causal_types()
# Those of over 6 s are left to `make test-families`; others of their kind stay.
LONG = {"ernie4_5_moe", "kimi_linear", "longcat_flash"}
ALWAYS = {*families.KINDS.values(), *ALL[::20]} - LONG
WORKING = 129  # this number only goes up

METHODS: dict[str, Method] = {
    "gptq": GPTQ(bits=4, group_size=16, min_tokens=8),
    "gptq, output feedback": GPTQ(bits=4, group_size=16, min_tokens=8, output_feedback=True),
    "omniquant": OmniQuant(bits=4, group_size=16, let=True, epochs=1, min_tokens=8),
    "quip": QuIP(codebook="HI", scale=2.9, row_scale="always", tune_iters=0, min_tokens=8),
    "trellis": Trellis(rate=4, state_bits=9, min_tokens=8),
    "quip, merged signs": QuIP(codebook="HI", merge_suv=True, tune_iters=0, min_tokens=8),
}


def test_the_number_of_working_architectures_only_goes_up() -> None:
    assert set(families.NOT_WORKING) <= set(ALL)
    assert len(ALL) - len(families.NOT_WORKING) >= WORKING


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.families) for n in ALL]
)
def test_an_architecture(name: str, tmp_path: Path) -> None:
    outcome = families.outcome(name, tmp_path)
    if name in families.NOT_WORKING:
        # Whoever repairs it deletes its line from NOT_WORKING.
        assert families.NOT_WORKING[name] in f"{outcome.step}: {outcome.reason}"
    else:
        assert outcome.works, f"{outcome.step}: {outcome.reason}"


@pytest.mark.slow
@pytest.mark.families
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", families.KINDS)
def test_calibrated_methods_on_each_kind(kind: str, method: str, tmp_path: Path) -> None:
    model = families.make(families.KINDS[kind])
    model.save_pretrained(tmp_path / "float")
    rows = families.tokens(3, rows=4, length=16)
    out = lowbit.quantize(
        tmp_path / "float",
        tmp_path / "out",
        METHODS[method],
        rows,
        device="cpu",
        without_tokenizer=True,
    )
    quantized = load_model(out)
    batch = families.tokens(1)
    with torch.no_grad():
        wanted, found = (m(input_ids=batch, use_cache=False).logits for m in (model, quantized))
    assert 0 < families.error(found, wanted) < 1
    # What `eval --reference` computes block by block is what the loaded model computes.
    streamed = stream(out)
    (hidden,) = streamed.run([batch]).hidden()
    logits = streamed.without_blocks().logits(batch, hidden)
    assert families.error(logits, found) < families.TOLERANCE
    assert len(greedy(quantized, [5, 6, 7, 8, 9], 8)) == 8
