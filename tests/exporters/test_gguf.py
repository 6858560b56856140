"""GGUF files: which block holds which grid, how exactly, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
import zoo

import lowbit
from lowbit.exporters.gguf.architectures import rope_freqs
from lowbit.exporters.gguf.blocks import CODE_BITS, encode
from lowbit.exporters.gguf.tokenizer import SPLITS, tokenizer_keys
from lowbit.exporters.grid import Grid
from lowbit.methods import RTN

pytestmark = pytest.mark.slow

gguf = pytest.importorskip("gguf")
WIDE = zoo.GQA | {"hidden_size": 64, "head_dim": 32, "intermediate_size": 128}


def grid(bits: int, symmetric: bool) -> Grid:
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (5, 96), generator=draw, dtype=torch.uint8)
    scale = (torch.rand(5, 3, generator=draw) + 0.01).half()
    zero = torch.randint(0, 2**bits, (5, 3), generator=draw).int()
    if symmetric:
        zero = torch.full_like(zero, 2 ** (bits - 1))
    return Grid(codes, scale, zero, bits, 32)


KINDS = {
    f"{bits} bits, {'symmetric' if symmetric else 'asymmetric'}": (bits, symmetric, kind)
    for symmetric, kinds in (
        (True, ("Q4_0", "Q4_0", "Q4_0", "Q5_0", "Q8_0", "Q8_0", "Q8_0")),
        (False, ("Q4_1", "Q4_1", "Q4_1", "Q5_1")),
    )
    for bits, kind in enumerate(kinds, 2)
}


@pytest.mark.parametrize(("bits", "symmetric", "kind"), KINDS.values(), ids=KINDS)
def test_blocks_are_those_of_the_gguf_package(bits: int, symmetric: bool, kind: str) -> None:
    wanted = grid(bits, symmetric)
    stored = encode(wanted, kind).numpy()
    found = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])
    error = wanted.error(torch.from_numpy(found))
    assert error == 0 if symmetric else error < 2**-11 * 2 ** CODE_BITS[kind]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "source"
    return quantized.add_byte_tokenizer(zoo.write(zoo.Line("llama", WIDE), folder))


def test_rows_of_queries_and_keys_are_reordered(source: Path, tmp_path: Path) -> None:
    """Rows i and i + half of a head become neighbours; all other layers keep their order."""
    method = RTN(bits=8, symmetric=True, group_size=32)
    made = lowbit.quantize(source, tmp_path / "made", method)
    lowbit.export(made, tmp_path / "dest", "gguf")
    reader = gguf.GGUFReader(tmp_path / "dest" / "dest.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name, ordered in (("attn_q", False), ("attn_k", False), ("attn_v", True)):
        tensor = stored[f"blk.0.{name}.weight"]
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        layer = f"model.layers.0.self_attn.{name[-1]}_proj"
        wanted = lowbit.load(made)[0].get_submodule(layer).dequantize()
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1 if ordered else 16])
        assert torch.equal(found[2], wanted[2 if ordered else 1])


REFUSED = {
    "asymmetric codes of 6 bits": (RTN(bits=6, group_size=32), "no block for asymmetric codes"),
    "asymmetric codes": (RTN(bits=4, group_size=32), "off by up to .* --allow-lossy"),
}


@pytest.mark.parametrize(("method", "message"), REFUSED.values(), ids=REFUSED)
def test_what_needs_allow_lossy(method: RTN, message: str, source: Path, tmp_path: Path) -> None:
    made = lowbit.quantize(source, tmp_path / "made", method)
    with pytest.raises(ValueError, match=message):
        lowbit.export(made, tmp_path / "dest", "gguf")
    assert not (tmp_path / "dest").exists()
    plan = lowbit.export(made, tmp_path / "dest", "gguf", allow_lossy=True)
    assert all(0 < layer.error < 0.05 for layer in plan.layers)


def test_groups_that_are_not_blocks_stay_float(source: Path, tmp_path: Path) -> None:
    made = lowbit.quantize(source, tmp_path / "made", RTN(bits=4, group_size=8))
    plan = lowbit.export(made, tmp_path / "dest", "gguf")
    assert {layer.container for layer in plan.layers} == {"F32"}


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    made = lowbit.quantize(quantized.source("opt"), tmp_path / "made", RTN(bits=4, group_size=16))
    with pytest.raises(ValueError, match="this model is 'opt'"):
        lowbit.export(made, tmp_path / "dest", "gguf")


LONG = {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}


def test_factors_of_llama_3() -> None:
    factors = rope_freqs({"head_dim": 64, "rope_parameters": zoo.LLAMA3 | LONG})
    assert factors is not None and factors.shape == (32,)
    assert float(factors[0]) == 1 and float(factors[-1]) == 8
    assert torch.equal(factors, factors.sort().values)


# Ids of added tokens beyond the rows of the embedding, by name, and tokens of the file.
ADDED: dict[str, dict[str, int]] = {
    "none": {},
    "one": {"<|im_start|>": 0},
    "two": {"<|im_start|>": 0, "<|im_end|>": 1},
    "padding": {"[PAD]": 0},
}


@pytest.mark.parametrize("name", ADDED)
def test_added_tokens_without_a_row_are_left_out(name: str, source: Path, tmp_path: Path) -> None:
    """llama.cpp takes the number of tokens for the number of rows, and refuses to load others."""
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    more: list[Any] = [
        {"id": rows + i, "content": token, "special": True, **plain}
        for token, i in ADDED[name].items()
    ]
    quantized.edit_json(folder / "tokenizer.json", lambda whole: whole["added_tokens"].extend(more))
    if "[PAD]" in ADDED[name]:
        quantized.edit_json(
            folder / "tokenizer_config.json", lambda value: value.update(pad_token="[PAD]")
        )
    keys = tokenizer_keys(folder, rows, {})
    assert len(keys["tokenizer.ggml.tokens"]) == len(keys["tokenizer.ggml.token_type"]) == rows
    assert all(value < rows for key, value in keys.items() if key.endswith("_id"))
    out = quantized.quantize(folder, tmp_path / "out", RTN(bits=8, group_size=32, symmetric=True))
    notes = " ".join(lowbit.export(out, tmp_path / "exported", "gguf").notes)
    assert (f"{len(more)} added tokens, for which the model has no row" in notes) == bool(more)
    with pytest.raises(ValueError, match="copy the tokenizer of this model"):
        tokenizer_keys(folder, rows - 1, {})


def test_a_tokenizer_that_splits_words_in_another_way(tmp_path: Path) -> None:
    folder = quantized.add_byte_tokenizer(tmp_path)
    known = tokenizer_keys(folder, zoo.VOCABULARY, {})
    assert known["tokenizer.ggml.pre"] == "gpt-2" and len(known["tokenizer.ggml.tokens"]) == 101

    def split(expression: str) -> None:
        parts = [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]
        quantized.edit_json(
            folder / "tokenizer.json",
            lambda whole: whole.update(pre_tokenizer={"type": "Sequence", "pretokenizers": parts}),
        )

    for expression, name in SPLITS.items():
        split(expression)
        assert tokenizer_keys(folder, zoo.VOCABULARY, {})["tokenizer.ggml.pre"] == name
    split(r"\w+")
    with pytest.raises(ValueError, match="would silently tokenize wrongly"):
        tokenizer_keys(folder, zoo.VOCABULARY, {})
