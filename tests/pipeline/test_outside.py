"""embedding_bits and lm_head_bits in every family: tied, streamed, planned and exported."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoint import CheckpointReader, QuantizedFolder
from lowbit.checkpoint.output import size_of
from lowbit.formats.embedding import QuantizedEmbedding, TiedLinear
from lowbit.formats.uniform import UniformLinear
from lowbit.load import load_model, stream
from lowbit.methods import RTN
from lowbit.models.source import SourceModel
from lowbit.pipeline.options import RunOptions
from lowbit.pipeline.outside import GROUPS, outside_blocks, rounded_tables, table_names

pytestmark = pytest.mark.slow

# The families, and whether the output layer is tied to the table.
FAMILIES = {
    "llama": False,
    "llama, tied, biased": True,
    "opt": True,
    "gemma2": False,
    "gpt2": True,
    "falcon 40b": True,
    "mixtral": False,
    "gpt_neox": False,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("tables")

    @cache
    def made(name: str, bits: int, head: int | None = None) -> Path:
        out = root / f"{name} {bits} {head}".replace(",", "")
        return lowbit.quantize(
            quantized.source(name),
            out,
            RTN(bits=4, group_size=16),
            embedding_bits=bits,
            lm_head_bits=head,
            without_tokenizer=True,
        )

    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_is_packed_and_loads(folders: Any, name: str) -> None:
    out = folders(name, 8)
    folder = QuantizedFolder(out)
    folder.verify()
    [(disk, entry)] = [(n, e) for n, e in folder.entries.items() if e["format"] == "embedding"]
    assert entry["bits"] == 8 and entry["group_size"] == GROUPS[8]
    model, source = load_model(out), AutoModelForCausalLM.from_pretrained(quantized.source(name))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, QuantizedEmbedding)
    assert isinstance(head, TiedLinear) == FAMILIES[name]
    wanted = source.get_input_embeddings().weight
    assert ((table.dequantize() - wanted).abs() <= 1.01 * table.scale.float()).all()
    # The table is stored once, and the float one nowhere.
    stored = set(folder.reader.tensors)
    assert {f"{disk}.packed", f"{disk}.scale"} <= stored
    assert not any(n.startswith("lm_head.p") for n in stored)
    batch = zoo.tokens()
    with torch.no_grad():
        found = model(batch).logits
        plain = AutoModelForCausalLM.from_pretrained(out)(batch).logits
        assert torch.equal(found, plain)
        # The vectors are those that the class of the model makes of the rounded table.
        old = source.get_input_embeddings()
        old.weight.copy_(table.dequantize())
        torch.testing.assert_close(table(batch), old(batch))


@pytest.mark.parametrize("name", ["llama, tied, biased", "opt", "gemma2", "gpt2"])
def test_streamed_as_loaded_and_as_dequantized(folders: Any, name: str, tmp_path: Path) -> None:
    out = folders(name, 6)
    batch = zoo.tokens()
    with torch.no_grad():
        whole = load_model(out)(batch).logits
        model = stream(out)
        last = model.run([batch])
        streamed = model.without_blocks().logits(batch, last[0].hidden)
        lowbit.dequantize(out, tmp_path / "float")
        restored = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)
        assert zoo.error(streamed, whole) < 1e-5
        assert zoo.error(restored(batch).logits, whole) < 1e-5


def test_bits_of_the_whole_model_count_the_table(folders: Any) -> None:
    out, plain = folders("opt", 4), quantized.folder("opt")
    found, before = size_of(out), size_of(plain)
    assert found.model < before.model and found.bytes < before.bytes
    table = QuantizedFolder(out).layer(_table(out))
    weights = sum(
        p.numel()
        for p in AutoModelForCausalLM.from_pretrained(quantized.source("opt")).parameters()
    )
    assert found.model == pytest.approx(8 * QuantizedFolder(out).reader.stored_bytes / weights)
    assert 8 * table.weight_bytes() / table.dequantize().numel() < 5.1


def _table(folder: Path) -> str:
    entries = QuantizedFolder(folder).entries
    return next(n for n, e in entries.items() if e["format"] == "embedding")


def test_an_output_layer_with_bits_of_its_own_is_untied(folders: Any) -> None:
    out = folders("llama, tied, biased", 8, 4)
    model = load_model(out)
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    assert model.get_output_embeddings().spec.bits == 4
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_positions_stay_float(folders: Any) -> None:
    model = load_model(folders("opt", 8))
    assert isinstance(model.model.decoder.embed_positions.weight, nn.Parameter)
    assert table_names(SourceModel(quantized.source("opt"))) == ["model.decoder.embed_tokens"]


@pytest.mark.parametrize("token", [-1, zoo.VOCABULARY])
def test_a_token_outside_the_table_is_refused(folders: Any, token: int) -> None:
    table = load_model(folders("llama", 8)).get_input_embeddings()
    with pytest.raises(IndexError, match=f"token {token} is not in the table"):
        table(torch.tensor([[3, token]]))


def test_code_that_reads_the_weight_directly(folders: Any) -> None:
    table = load_model(folders("llama", 8)).get_input_embeddings()
    float_table, tokens = table.dequantize(), torch.tensor([[5, 0], [7, 7]])
    assert table.weight.shape == float_table.shape and table.weight.dtype == torch.float32
    torch.testing.assert_close(functional.embedding(tokens, table.weight), float_table[tokens])
    torch.testing.assert_close(table.weight[tokens], float_table[tokens])
    torch.testing.assert_close(table.weight[-1], float_table[-1])
    torch.testing.assert_close(table.weight[2:4], float_table[2:4])
    x = torch.randn(3, table.in_features)
    torch.testing.assert_close(functional.linear(x, table.weight), x @ float_table.T)
    torch.testing.assert_close(table(x), x @ float_table.T, rtol=1e-4, atol=1e-4)


def test_dtypes_and_copies(folders: Any) -> None:
    model = load_model(folders("gemma2", 8), dtype=torch.bfloat16)
    table = model.get_input_embeddings()
    assert table(torch.tensor([1])).dtype == torch.bfloat16 and table.scale.dtype != torch.bfloat16


def test_the_quantized_stream_begins_with_the_rounded_table() -> None:
    source = SourceModel(quantized.source("llama"))
    options = RunOptions(embedding_bits=4)
    [(name, table)] = rounded_tables(source, options).items()
    plain = source.first_stream([zoo.tokens()])[0].hidden
    changed = source.first_stream([zoo.tokens()], changed={name: table})[0].hidden
    torch.testing.assert_close(changed, table[zoo.tokens()])
    assert not torch.equal(plain, changed)


def with_two_tables(place: Path, tied: bool, shift: float) -> Path:
    """A model whose output layer is its embeddings plus a number. tied: what config.json says."""
    folder = Path(shutil.copytree(quantized.source("llama"), place))
    quantized.edit_json(folder / "config.json", lambda c: {**c, "tie_word_embeddings": tied})
    held = load_file(folder / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"] + shift
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("tied", "shift", "refused"), [(True, 1.0, True), (True, 0.0, False), (False, 1.0, False)]
)
def test_two_tables_that_are_stated_to_be_one(
    tied: bool, shift: float, refused: bool, tmp_path: Path
) -> None:
    """transformers does not tie tables that differ, so storing one of them is another model."""
    folder = with_two_tables(tmp_path / "model", tied, shift)
    source = SourceModel(folder)
    if refused:
        with pytest.raises(ValueError, match=r"are one table, but .*set tie_word_embeddings to fa"):
            outside_blocks(source, RunOptions(embedding_bits=8))
    else:
        tensors, _ = outside_blocks(source, RunOptions(embedding_bits=8))
        assert ("lm_head.weight" in tensors) == (not tied)


@pytest.mark.parametrize(
    ("tied", "shift", "states"), [(True, 1.0, False), (True, 0.0, True), (False, 1.0, False)]
)
def test_a_second_table_is_not_lost(
    tied: bool, shift: float, states: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Programs that go by config.json, and the export to them, would leave it out."""
    folder = with_two_tables(tmp_path / "model", tied, shift)
    out = quantized.quantize(folder, tmp_path / "out", RTN(bits=8))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == states
    assert ("two tables with different values" in caplog.text) == (tied and not states)
    head = lowbit.load(out)[0].get_output_embeddings().weight
    assert torch.equal(head, load_file(folder / "model.safetensors")["lm_head.weight"])
    assert quantized.quantize(folder, out, RTN(bits=8)) == out  # nothing is made again


@pytest.mark.parametrize("bits", [5, 3, 16])
def test_other_widths_are_refused(bits: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="embedding_bits"):
        lowbit.quantize(
            quantized.source("llama"),
            tmp_path / "out",
            RTN(),
            embedding_bits=bits,
            without_tokenizer=True,
        )


WIDE = zoo.GQA | {
    "hidden_size": 64,
    "head_dim": 32,
    "intermediate_size": 128,
    "tie_word_embeddings": True,
}
# What the table becomes in each target; None: it is written in float, with a note.
TARGETS = {
    "dense": "float32",
    "ct": None,
    "gptq": None,
    "mlx": "affine, 8 bits, groups of 64, float16 scales",
    "gguf": "Q8_0",
    "mlc": None,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wide")
    source = quantized.add_byte_tokenizer(zoo.write(zoo.Line("llama", WIDE), root / "source"))
    method = RTN(bits=4, symmetric=True, group_size=32)
    return lowbit.quantize(source, root / "made", method, embedding_bits=8)


@pytest.mark.parametrize("target", TARGETS)
def test_exports(wide: Path, target: str, tmp_path: Path) -> None:
    """Each export is read back and compared; here also what became of the table."""
    plan = lowbit.export(wide, tmp_path / "out", target)
    layers = {layer.name: layer for layer in plan.layers}
    name = _table(wide)
    if TARGETS[target] is None:
        assert name not in layers and any(f"table {name} is written" in n for n in plan.notes)
    else:
        assert layers[name].container == TARGETS[target] and layers[name].error == 0
    wanted = QuantizedFolder(wide).layer(name).dequantize()
    if target in ("dense", "ct", "gptq"):
        found = CheckpointReader(tmp_path / "out").read([f"{name}.weight"])[f"{name}.weight"]
        assert torch.equal(found.float(), wanted)


def test_a_plan_knows_the_size(tmp_path: Path) -> None:
    source, method = quantized.source("llama, tied, biased"), RTN(bits=4, group_size=16)
    found = lowbit.plan(source, method, embedding_bits=8, without_tokenizer=True)
    out = lowbit.quantize(
        source, tmp_path / "out", method, embedding_bits=8, without_tokenizer=True
    )
    size = size_of(out)
    assert found.linears == pytest.approx(size.linears)
    assert found.model == pytest.approx(size.model)
    assert found.bytes == pytest.approx(size.bytes, rel=0.02)


HEADS = ["llama", "llama, tied, biased", "opt", "falcon 40b", "mixtral", "gpt_neox"]


@pytest.mark.parametrize("name", HEADS)
def test_the_output_layer_is_packed_and_loads(tmp_path: Path, name: str) -> None:
    source = quantized.source(name)
    out = quantized.quantize(source, tmp_path / "out", lm_head_bits=8)
    plain = quantized.folder(name)
    assert len(QuantizedFolder(out).entries) == len(QuantizedFolder(plain).entries) + 1
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    model, _ = lowbit.load(out)
    head = model.get_output_embeddings()
    assert isinstance(head, UniformLinear) and head.spec.bits == 8
    wanted = AutoModelForCausalLM.from_pretrained(source).get_output_embeddings().weight
    assert ((head.dequantize() - wanted).abs() <= head.scale.float()).all()
    before, _ = lowbit.load(plain)
    batch = zoo.tokens()
    assert torch.equal(model.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert 0 < zoo.error(model(batch).logits, before(batch).logits) < 0.02


def test_no_bits_leave_the_head_alone() -> None:
    model, _ = lowbit.load(quantized.folder("llama"))
    assert isinstance(model.get_output_embeddings(), torch.nn.Linear)
