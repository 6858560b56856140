"""A streamed model computes what the whole model computes, float and quantized."""

from pathlib import Path

import pytest
import quantized
import torch
import zoo
from torch import Tensor

from lowbit.blocks import Stream
from lowbit.load import load_model, stream
from lowbit.methods import OmniQuant
from lowbit.models.config import load_config
from lowbit.models.streamed import StreamedModel

pytestmark = pytest.mark.slow

NAMES = ("llama", "llama, tied, biased", "opt", "mixtral", "falcon rw", "falcon 7b", "qwen3")
BATCHES = [zoo.tokens(0), zoo.tokens(1), zoo.tokens(2, rows=1, length=9)]


def logits(model: StreamedModel, hidden: Stream, piece: int) -> list[Tensor]:
    """The logits of every batch, computed in pieces of `piece` tokens."""
    around = model.without_blocks()
    return [
        torch.cat(
            [
                around.logits(
                    tokens[:, i : i + piece], hidden[number].hidden[..., i : i + piece, :]
                )
                for i in range(0, tokens.shape[1], piece)
            ],
            dim=1,
        )
        for number, tokens in enumerate(BATCHES)
    ]


@pytest.mark.parametrize("make", [quantized.source, quantized.folder], ids=["float", "quantized"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_whole_models(name: str, make: object) -> None:
    folder = make(name)
    model, whole = stream(folder), load_model(folder)
    hidden = model.run(BATCHES)
    for piece in (zoo.TOKENS, 5):
        for found, tokens in zip(logits(model, hidden, piece), BATCHES, strict=True):
            # Experts are summed in another order where they are fused: measured 2e-7.
            assert zoo.error(found, whole(tokens).logits) < 1e-6


# Blocks 2 and 3 read the keys and values that blocks 0 and 1 have written into a shared dict.
SHARED_KEYS = zoo.GQA | {
    "num_hidden_layers": 4,
    "head_dim": 12,
    "vocab_size_per_layer_input": zoo.VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": zoo.WINDOW,
    "altup_num_inputs": 2,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * 4,
}


def test_state_that_blocks_share_belongs_to_each_batch(tmp_path: Path) -> None:
    folder = zoo.write(zoo.Line("gemma3n_text", SHARED_KEYS), tmp_path)
    model, whole = stream(folder), load_model(folder)
    for found, tokens in zip(logits(model, model.run(BATCHES), 5), BATCHES, strict=True):
        assert zoo.error(found, whole(tokens).logits) < 1e-6


def test_half_precision_is_computed_in_float32_and_codes_stay_codes() -> None:
    model = stream(quantized.folder("llama", dtype=torch.float16))
    block = model.load_block(model.block_names[0])
    packed = block.mlp.up_proj.state_dict()
    stored = model.reader.read(f"{model.block_names[0]}.mlp.up_proj.{key}" for key in packed)
    assert [t.dtype for t in packed.values()] == [t.dtype for t in stored.values()]
    assert torch.uint8 in {tensor.dtype for tensor in packed.values()}
    assert block.input_layernorm.weight.dtype == torch.float32
    whole = load_model(quantized.folder("llama", dtype=torch.float16))
    (found, *_) = logits(model, model.run(BATCHES), zoo.TOKENS)
    assert zoo.error(found, whole(BATCHES[0]).logits) < 1e-6


def test_rounded_inputs_and_attention(tmp_path: Path) -> None:
    method = OmniQuant(bits=4, activation_bits=4, epochs=0)
    folder = quantized.quantize(quantized.source("llama"), tmp_path / "out", method)
    (found, *_) = logits(stream(folder), stream(folder).run(BATCHES), zoo.TOKENS)
    assert zoo.error(found, load_model(folder)(BATCHES[0]).logits) < 1e-6


def test_a_quantized_output_layer(tmp_path: Path) -> None:
    folder = quantized.quantize(
        quantized.source("llama, tied, biased"), tmp_path / "out", lm_head_bits=8
    )
    (found, *_) = logits(stream(folder), stream(folder).run(BATCHES), zoo.TOKENS)
    assert zoo.error(found, load_model(folder)(BATCHES[0]).logits) < 1e-6


def test_hidden_states_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    model, steps = zoo.source("qwen3"), []
    on_disk = model.run(BATCHES, folder=tmp_path, progress=lambda *step: steps.append(step))
    assert len(list(tmp_path.iterdir())) == len(BATCHES)
    for a, b in zip(on_disk, model.run(BATCHES), strict=True):
        assert torch.equal(a.hidden, b.hidden)
    assert steps == [(i + 1, 6) for i in range(6)]


def test_a_token_beyond_the_vocabulary_is_no_end_of_the_batches() -> None:
    with pytest.raises(IndexError):
        zoo.source("llama").first_stream([BATCHES[0], BATCHES[1] + zoo.VOCABULARY])


def test_without_blocks_can_be_used_again_and_forget() -> None:
    model = zoo.source("opt")
    hidden = model.run(BATCHES)
    around = model.without_blocks()
    first = around.logits(BATCHES[0], hidden[0].hidden)
    around.logits(BATCHES[1], hidden[1].hidden)
    assert torch.equal(around.logits(BATCHES[0], hidden[0].hidden), first)
    assert not any(stub.calls for stub in around.stubs) and around.last.hidden is None
    calls = around.calls(BATCHES[0])
    assert torch.equal(calls[0].hidden, calls[1].hidden)  # passed on, not replaced


def test_a_quantized_folder_lacks_the_float_models_tensors() -> None:
    """Without `prepare`, which replaces its linears, it is refused."""
    folder = quantized.folder("llama")
    with pytest.raises(
        ValueError, match="is missing.*: the model that config.json describes needs it"
    ):
        StreamedModel(folder, load_config(folder))
