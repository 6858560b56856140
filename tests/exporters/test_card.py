"""The model card of an exported folder."""

from pathlib import Path

import pytest
import quantized
import zoo

from lowbit.checkpoint.card import read_metadata, write_measured
from lowbit.exporters import TARGETS, export, verify
from lowbit.methods import RTN

pytestmark = pytest.mark.slow

# Of each target: what loads the folder, and a tag of the hub.
SAYS = {
    "ct": ("vllm serve MODEL", "compressed-tensors"),
    "gguf": ("llama-cli -m FILE", "gguf"),
    "gptq": ("vllm serve MODEL", "gptq"),
    "awq": ("vllm serve MODEL", "awq"),
    "mlx": ("mlx_lm.generate --model MODEL", "mlx"),
    "mlc": ("mlc_llm compile MODEL", "mlc-llm"),
    "dense": ("AutoModelForCausalLM.from_pretrained", "rtn"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Symmetric, in groups of 32: every target can hold it."""
    place = tmp_path_factory.mktemp("card")
    wide = zoo.GQA | {"hidden_size": 64, "head_dim": 32, "intermediate_size": 128}
    source = quantized.add_byte_tokenizer(zoo.write(zoo.Line("llama", wide), place / "model"))
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    out = quantized.quantize(source, place / "out", RTN(bits=4, group_size=32, symmetric=True))
    write_measured(out, "| perplexity 7 |")
    return out


def test_every_target_is_here() -> None:
    assert SAYS.keys() == TARGETS.keys()


@pytest.mark.parametrize("target", SAYS)
def test_the_card_of_a_target(target: str, folder: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    plan = export(folder, dest, target)
    text, metadata = (dest / "README.md").read_text(), read_metadata(dest)
    command, tag = SAYS[target]
    assert command in text.partition("## Use")[2] and tag in metadata["tags"]
    assert metadata["license"] == "apache-2.0" and metadata["quantized_by"] is None
    assert "perplexity 7" in text and str(tmp_path) not in text
    stored = sum(layer.bytes for layer in plan.layers)
    assert stored and f"{8 * stored / linear_weights(folder):.2f} in the quantized" in text
    (dest / "README.md").write_text("# Mine")
    compared = verify(dest, folder)
    assert compared is not None and compared.equal


def linear_weights(folder: Path) -> int:
    from lowbit.checkpoint import QuantizedFolder
    from lowbit.checkpoint.slices import linear_weights

    return linear_weights(QuantizedFolder(folder))
