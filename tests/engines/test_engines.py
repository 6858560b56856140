"""Other programs compute with an exported folder what lowbit computes with its own."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import lowbit
from lowbit.exporters.gguf import GgufExporter
from lowbit.exporters.mlc.tensor_cache import CacheReader
from lowbit.load import load_model
from lowbit.methods import RTN

Ask = Callable[..., dict[str, Any]]
WIDE = zoo.GQA | {"hidden_size": 64, "head_dim": 32, "intermediate_size": 128}
MODELS = {
    "llama": zoo.Line("llama", WIDE),
    "llama, tied, biased": zoo.Line(
        "llama", WIDE | {"tie_word_embeddings": True, "attention_bias": True}
    ),
    "llama 3": zoo.Line("llama", WIDE | {"rope_parameters": zoo.LLAMA3}),
    "llama, 172 wide": zoo.Line("llama", WIDE | {"intermediate_size": 172}),
    "mistral": zoo.Line("mistral", WIDE | {"sliding_window": None}),
    "qwen2, biased": zoo.Line("qwen2", WIDE | {"head_dim": 16}),
    "qwen3": zoo.Line("qwen3", WIDE),
    "gemma2": zoo.Line(
        "gemma2",
        WIDE | {"sliding_window": 4096, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    ),
    "gemma3": zoo.Line(
        "gemma3_text",
        WIDE
        | {"sliding_window": 512, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
        | {"num_hidden_layers": 6},
    ),
    "phi3": zoo.Line("phi3", WIDE | {"head_dim": 16, "pad_token_id": 0, "sliding_window": None}),
}

# llama.cpp keeps keys and values in float16, which changes log-probabilities by up to 0.032. With
# the rows of q and k in the order of transformers they change by 0.5 and more.
KEPT_IN_FLOAT16 = 0.05


def prompts(vocabulary: int, count: int = 4) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randint(3, vocabulary, (5 + 3 * i,), generator=draw).tolist() for i in range(count)
    ]


def last_logits(folder: Path, asked: list[list[int]]) -> list[torch.Tensor]:
    """Logits of the quantized folder after each prompt, as lowbit computes them."""
    model = load_model(folder)
    with torch.no_grad(), lowbit.backend("reference"):
        return [model(torch.tensor([prompt])).logits[0, -1] for prompt in asked]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


def source(folder: Path, name: str) -> Path:
    made = folder / name
    return made if made.exists() else quantized.add_byte_tokenizer(zoo.write(MODELS[name], made))


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp(name: str, ask: Ask, sources: Path, tmp_path: Path) -> None:
    """Groups of 4 fit no block, so that all weights are float and nothing is rounded."""
    made = lowbit.quantize(source(sources, name), tmp_path / "made", RTN(bits=4, group_size=4))
    lowbit.export(made, tmp_path / "dest", "gguf", dtype="float32")
    asked = prompts(zoo.VOCABULARY)
    answer = ask("llama_cpp", tmp_path / "dest" / "dest.gguf", prompts=asked)
    for found, logits in zip(answer["next"], last_logits(made, asked), strict=True):
        wanted = logits.log_softmax(0)
        errors = [abs(value - float(wanted[int(token)])) for token, value in found.items()]
        assert max(errors) < KEPT_IN_FLOAT16


def test_rows_that_were_not_reordered_are_noticed(
    ask: Ask, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp loads such a file without a word, and computes something else."""
    monkeypatch.setattr(GgufExporter, "_rows", lambda self, name, rows: torch.arange(rows))
    made = lowbit.quantize(source(sources, "llama"), tmp_path / "made", RTN(bits=4, group_size=4))
    lowbit.export(made, tmp_path / "dest", "gguf", dtype="float32")
    asked = prompts(zoo.VOCABULARY)
    answer = ask("llama_cpp", tmp_path / "dest" / "dest.gguf", prompts=asked)
    errors = [
        abs(value - float(logits.log_softmax(0)[int(token)]))
        for found, logits in zip(answer["next"], last_logits(made, asked), strict=True)
        for token, value in found.items()
    ]
    assert max(errors) > 4 * KEPT_IN_FLOAT16


def with_the_output_layer_alone(folder: Path) -> None:
    """Stores the tied table of a model as lm_head.weight, as some models do."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path, metadata={"format": "pt"})


READERS = {"gguf": "llama_cpp", "mlx": "mlx_lm_alone", "ct": "transformers_alone"}


# transformers does not read the output layer, which has zero points, beside layers without any.
TIED = [(to, head) for to in READERS for head in (None, 8) if (to, head) != ("ct", 8)]


@pytest.mark.parametrize(("to", "head"), TIED)
def test_a_tied_table(to: str, head: int | None, ask: Ask, tmp_path: Path) -> None:
    """It is stored as lm_head alone; or the output layer is quantized, so that it is untied."""
    line = zoo.Line("llama", WIDE | {"tie_word_embeddings": True})
    folder = quantized.add_byte_tokenizer(zoo.write(line, tmp_path / "source"))
    with_the_output_layer_alone(folder)
    method = RTN(bits=4, symmetric=True, group_size=4 if to == "gguf" else 32)
    made = lowbit.quantize(folder, tmp_path / "made", method, lm_head_bits=head)
    lowbit.export(made, tmp_path / "dest", to, dtype="float32", allow_lossy=True)
    asked = prompts(zoo.VOCABULARY)
    dest = tmp_path / "dest" / "dest.gguf" if to == "gguf" else tmp_path / "dest"
    answer = ask(READERS[to], dest, prompts=asked)
    for number, logits in enumerate(last_logits(made, asked)):
        if to == "gguf":
            found, wanted = answer["next"][number], logits.log_softmax(0)
            errors = [abs(value - float(wanted[int(token)])) for token, value in found.items()]
            assert max(errors) < KEPT_IN_FLOAT16
        else:
            assert zoo.error(torch.tensor(answer["logits"][number]), logits) < 2e-3


BLOCKS = {"Q4_0": (4, True), "Q4_1": (4, False), "Q5_0": (5, True), "Q8_0": (8, True)}


@pytest.mark.parametrize(("bits", "symmetric"), BLOCKS.values(), ids=BLOCKS)
def test_blocks_of_llama_cpp(bits: int, symmetric: bool, ask: Ask, tmp_path: Path) -> None:
    """llama.cpp rounds inputs to 8 bits; without the order of rows of q and k KL is 0.18."""
    method = RTN(bits=bits, symmetric=symmetric, group_size=32)
    made = lowbit.quantize(zoo.MODELS / "llama-mini", tmp_path / "made", method)
    lowbit.export(made, tmp_path / "dest", "gguf", allow_lossy=True)
    asked = prompts(2048, count=8)
    answer = ask("llama_cpp", tmp_path / "dest" / "dest.gguf", prompts=asked)
    for found, logits in zip(answer["next"], last_logits(made, asked), strict=True):
        wanted = logits.log_softmax(0)
        likely = {int(t): v for t, v in found.items() if v > -7}
        divergence = sum(2.718281828**v * (v - float(wanted[t])) for t, v in likely.items())
        assert abs(divergence) < 1e-2


@pytest.mark.parametrize("name", [n for n in MODELS if n != "llama, 172 wide"])
@pytest.mark.parametrize("bits", [3, 4])
def test_mlx(name: str, bits: int, ask: Ask, sources: Path, tmp_path: Path) -> None:
    made = lowbit.quantize(source(sources, name), tmp_path / "made", RTN(bits=bits, group_size=32))
    lowbit.export(made, tmp_path / "dest", "mlx", dtype=None)
    asked = prompts(zoo.VOCABULARY)
    answer = ask("mlx_lm_alone", tmp_path / "dest", prompts=asked)
    for found, wanted in zip(answer["logits"], last_logits(made, asked), strict=True):
        assert zoo.error(torch.tensor(found), wanted) < 1e-3


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transformers(bits: int, symmetric: bool, ask: Ask, sources: Path, tmp_path: Path) -> None:
    method = RTN(bits=bits, symmetric=symmetric, group_size=32)
    made = lowbit.quantize(source(sources, "qwen3"), tmp_path / "made", method)
    lowbit.export(made, tmp_path / "dest", "ct")
    asked = prompts(zoo.VOCABULARY)
    answer = ask("transformers_alone", tmp_path / "dest", prompts=asked)
    for found, wanted in zip(answer["logits"], last_logits(made, asked), strict=True):
        # The reader multiplies scale and code in float16, the dtype of the scales.
        assert zoo.error(torch.tensor(found), wanted) < 2e-3


@pytest.mark.parametrize("name", ["llama, 172 wide", "llama, tied", "qwen2, biased", "qwen3"])
def test_tvm(name: str, ask: Ask, tmp_path: Path) -> None:
    """TVM reads the names, shapes and bytes that were written; MLC itself is in no registry."""
    line = MODELS.get(name, zoo.Line("llama", WIDE | {"tie_word_embeddings": True}))
    folder = quantized.add_byte_tokenizer(zoo.write(line, tmp_path / "source"))
    method = RTN(bits=3, symmetric=True, group_size=32)
    made = lowbit.quantize(folder, tmp_path / "made", method)
    lowbit.export(made, tmp_path / "dest", "mlc")
    cache = CacheReader(tmp_path / "dest")
    wanted = {key: cache.read(key) for key in cache.records}
    assert ask("tvm_tensor_cache", tmp_path / "dest") == {
        key: [
            list(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            hashlib.sha256(tensor.numpy().tobytes()).hexdigest(),
        ]
        for key, tensor in wanted.items()
    }


TEXTS = [
    "Once upon a time there was a fox.",
    "  two  spaces,\ttabs\nand\n\n\nlines  ",
    "It's 2026: 12,345.678 % isn't 1000000",
    "caf\u00e9 na\u00efve \u00fcber",
    "\u4f60\u597d \u3053\u3093\u306b\u3061\u306f \U0001f98a\U0001f98a",
    "def f(x):\n    return x**2  # comment",
    "MIXED Case AND 'quotes' \"here\"",
    "e\u0301 combining, \u200b zero width",
    "a",
    "</s> is special, <0x0A> is not",
    "\u0430\u0431\u0432 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    " ",
    "\n",
    "<s>begins</s><s>again",
    "http://example.org/a_b?c=d&e=%20f",
    "it's we'll they'VE I'd",
    "one\u00a0hard space, a tab\tand\r\nwindows",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\u00bd \u2460 \u0664\u0662 3\u00b2",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!",
]


@pytest.mark.parametrize("model", ["llama-mini", "opt-mini"])
def test_tokens(model: str, ask: Ask, tmp_path: Path) -> None:
    """opt-mini has a tokenizer of another kind; a Llama stands for its model in llama.cpp."""
    folder = zoo.MODELS / model
    if model == "opt-mini":
        folder = zoo.write(zoo.Line("llama", WIDE | {"vocab_size": 2048}), tmp_path / "llama")
        for path in (zoo.MODELS / model).glob("*token*"):
            shutil.copy(path, folder)
    made = lowbit.quantize(folder, tmp_path / "made", RTN(bits=4, symmetric=True, group_size=32))
    lowbit.export(made, tmp_path / "dest", "gguf", allow_lossy=True)
    found = ask("llama_cpp", tmp_path / "dest" / "dest.gguf", texts=TEXTS)["tokens"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert found == [tokenizer(text)["input_ids"] for text in TEXTS]
