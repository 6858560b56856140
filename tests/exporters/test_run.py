"""What an export refuses, and what it leaves behind."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import gguf
import pytest
import quantized
import torch
import zoo
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoint import CheckpointReader, QuantizedFolder
from lowbit.exporters import TARGETS, Exporter, Step
from lowbit.exporters.compressed_tensors import CompressedTensorsExporter
from lowbit.methods import PTQ161, RTN, MixedQuant, QuIP, Trellis

pytestmark = pytest.mark.slow

LATTICE = QuIP(codebook="HI", scale=2.9, row_scale="always", tune_iters=0, min_tokens=8)
TRELLIS = Trellis(rate=1.5, state_bits=9, min_tokens=8, scale=1.1, row_scale="never")
NO_GRID = {
    "lattice": LATTICE,
    "trellis": TRELLIS,
    "binary": PTQ161(epochs=0, min_tokens=1),
    "sorted_group": MixedQuant(group_size=16, min_tokens=1),
    "rotated": RTN(bits=4, group_size=16, rotate=True),
}


WIDE = {"hidden_size": 64, "tie_word_embeddings": True, "intermediate_size": 128}
SYMMETRIC = RTN(bits=4, symmetric=True, group_size=32)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model whose rows are multiples of 32, as most targets want them."""
    line = zoo.Line("llama", zoo.GQA | WIDE | {"num_hidden_layers": 1})
    return quantized.add_byte_tokenizer(zoo.write(line, tmp_path_factory.mktemp("wide") / "source"))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    source = quantized.add_byte_tokenizer(zoo.write(zoo.ZOO["llama"], tmp_path / "source"))
    return lowbit.quantize(source, tmp_path / "made", RTN(bits=4, group_size=16))


def nothing_was_written(folder: Path) -> bool:
    return not any(folder.glob("dest*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NO_GRID)
def test_formats_without_a_grid_go_out_in_float_only(name: str, tmp_path: Path) -> None:
    source = quantized.source("llama")
    folder = quantized.quantize(source, tmp_path / "made", NO_GRID[name])
    reason = "it rotates its inputs" if name == "rotated" else f"its format {name} is not a grid"
    with pytest.raises(ValueError, match=rf"{reason}.*--to dense"):
        lowbit.export(folder, tmp_path / "dest", "ct")
    assert nothing_was_written(tmp_path)
    lowbit.export(folder, tmp_path / "dest", "dense", allow_lossy=True, dtype="float32")
    with torch.no_grad(), lowbit.backend("reference"):
        wanted = lowbit.load(folder)[0](zoo.tokens()).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dest", dtype=torch.float32)
        found = plain(zoo.tokens()).logits
    if name != "sorted_group":  # which rounds its inputs
        assert zoo.error(found, wanted) < 1e-5


def test_an_unknown_target(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'vllm' is not a target: allowed are"):
        lowbit.export(made, tmp_path / "dest", "vllm")


def test_a_folder_that_exists(made: Path, tmp_path: Path) -> None:
    (tmp_path / "dest").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        lowbit.export(made, tmp_path / "dest", "ct")


def test_a_float_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was not quantized by lowbit"):
        lowbit.export(quantized.source("llama"), tmp_path / "dest", "ct")


def test_a_damaged_folder(made: Path, tmp_path: Path) -> None:
    shard = sorted(made.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=shard.name):
        lowbit.export(made, tmp_path / "dest", "ct")
    assert nothing_was_written(tmp_path)


def test_bits_of_a_folder_without_slices(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only folders made by matquant have slices"):
        lowbit.export(made, tmp_path / "dest", "ct", bits=4)


@pytest.mark.parametrize("to", sorted(set(TARGETS) - {"gptq", "awq"}))
def test_numbers_that_the_dtype_cannot_hold(to: str, tmp_path: Path) -> None:
    """They would become infinite: an embedding as from a diverged run, exported in float16."""
    line = zoo.Line("llama", zoo.GQA | {**WIDE, "tie_word_embeddings": False})
    source = quantized.add_byte_tokenizer(zoo.write(line, tmp_path / "source"))

    def grow(held: dict[str, Any]) -> None:
        held["model.embed_tokens.weight"] *= 1e6

    quantized.edit_shard(source / "model.safetensors", grow)
    folder = quantized.quantize(source, tmp_path / "made", SYMMETRIC)
    with pytest.raises(ValueError, match="tensor model.embed_tokens.weight has (values|numbers)"):
        lowbit.export(folder, tmp_path / "dest", to, dtype="float16")
    assert nothing_was_written(tmp_path)


@pytest.mark.parametrize("to", TARGETS)
def test_a_plan_writes_nothing(to: str, made: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    plan = lowbit.plan_export(made, to)
    assert sorted(tmp_path.iterdir()) == before
    assert [layer.name for layer in plan.layers] == list(QuantizedFolder(made).entries)


class Faulty(CompressedTensorsExporter):
    """Writes one code of one layer wrongly."""

    def _converted(self, name: str, layer: Any) -> dict[str, torch.Tensor]:
        tensors = super()._converted(name, layer)
        if name.endswith("layers.1.mlp.up_proj"):
            tensors["weight_packed"][3, 1] ^= 1
        return tensors


def test_what_was_written_wrongly_is_not_kept(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS, "ct", Faulty)
    with pytest.raises(ValueError, match=r"layer model.layers.1.mlp.up_proj was read back"):
        lowbit.export(made, tmp_path / "dest", "ct")
    assert nothing_was_written(tmp_path)


def test_an_interrupted_export_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Exporter, folder: Path, name: str) -> dict[str, torch.Tensor]:
        raise KeyboardInterrupt

    monkeypatch.setattr(CompressedTensorsExporter, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lowbit.export(made, tmp_path / "dest", "ct")
    assert nothing_was_written(tmp_path)


def test_a_killed_export_leaves_no_folder_of_that_name(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Exporter, folder: Path, name: str) -> dict[str, torch.Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(CompressedTensorsExporter, "read", killed)
        try:
            lowbit.export(made, tmp_path / "dest", "ct")
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and not (tmp_path / "dest").exists()
    assert (tmp_path / "dest.part").is_dir()
    lowbit.export(made, tmp_path / "dest", "ct")
    assert not [path for path in tmp_path.iterdir() if ".part" in path.name]


@pytest.mark.parametrize("to", TARGETS)
def test_files_beside_the_weights(to: str, wide: Path, tmp_path: Path) -> None:
    """The chat template and the settings of generation go along."""
    made = lowbit.quantize(wide, tmp_path / "made", SYMMETRIC)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (made / "chat_template.jinja").write_text(template)
    (made / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": 2}')
    lowbit.export(made, tmp_path / "dest", to, allow_lossy=True, verify=False)
    if to == "gguf":
        fields = gguf.GGUFReader(tmp_path / "dest" / "dest.gguf").fields
        assert fields["tokenizer.chat_template"].contents() == template
        return
    assert (tmp_path / "dest" / "chat_template.jinja").read_text() == template
    if to == "mlc":
        chat = json.loads((tmp_path / "dest" / "mlc-chat-config.json").read_text())
        assert chat["temperature"] == 0.7
    else:
        kept = json.loads((tmp_path / "dest" / "generation_config.json").read_text())
        assert kept["temperature"] == 0.7


@pytest.mark.parametrize("to", ["ct", "gptq", "dense"])
def test_biases(to: str, tmp_path: Path) -> None:
    method = RTN(bits=4, group_size=16, symmetric=True)
    made = lowbit.quantize(quantized.source("opt"), tmp_path / "made", method)
    lowbit.export(made, tmp_path / "dest", to)
    found = lowbit.verify(tmp_path / "dest", made)
    assert found is not None and found.equal
    name = "model.decoder.layers.1.fc2.bias"
    tensor = CheckpointReader(tmp_path / "dest").read([name])[name]
    assert torch.equal(tensor, CheckpointReader(made).read([name])[name])


HEADS = {
    "ct": "8 bits, rows",
    "gptq": "refused",
    "awq": "refused",
    "gguf": "F16",
    "mlx": "8 bits, groups of 64, float32 scales",
    "mlc": "float16",
    "dense": "float32",
}


@pytest.mark.parametrize("to", HEADS)
def test_a_quantized_output_layer(to: str, wide: Path, tmp_path: Path) -> None:
    """It has 8 bits and zero points, and the table of embeddings is no longer tied to it."""
    made = lowbit.quantize(wide, tmp_path / "made", SYMMETRIC, lm_head_bits=8)
    plan = lowbit.plan_export(made, to, allow_lossy=True)
    head = next(layer for layer in plan.layers if layer.name == "lm_head")
    if HEADS[to] == "refused":
        assert head.refused is not None
        with pytest.raises(ValueError, match="lm_head"):
            lowbit.export(made, tmp_path / "dest", to, allow_lossy=True)
        return
    assert head.container.endswith(HEADS[to])
    lowbit.export(made, tmp_path / "dest", to, allow_lossy=True)
    if to not in ("gguf", "mlc"):
        config = json.loads((tmp_path / "dest" / "config.json").read_text())
        names = CheckpointReader(tmp_path / "dest").tensors
        assert config["tie_word_embeddings"] is False and "model.embed_tokens.weight" in names


def test_the_record(made: Path, tmp_path: Path) -> None:
    lowbit.export(made, tmp_path / "dest", "ct", dtype="bfloat16")
    record = json.loads((tmp_path / "dest" / "export.json").read_text())
    assert record["target"] == "ct" and record["options"] == {"dtype": "bfloat16"}
    assert len(record["source"]["digest"]) == 64
    layer = record["layers"]["model.layers.{0-1}.mlp.up_proj"]
    assert layer == {"container": "pack-quantized, 4 bits, groups of 16", "error_in_steps": 0.0}
    assert str(tmp_path) not in json.dumps(record)


def test_progress(made: Path, tmp_path: Path) -> None:
    steps: list[Step] = []
    lowbit.export(made, tmp_path / "dest", "ct", on_step=steps.append)
    names = list(dict.fromkeys(step.name for step in steps))
    assert names == ["planning", "writing", "reading back"]
    assert steps[-1].done == steps[-1].of == 14
