"""The architectures that are written for MLC-LLM, and what it calls their tensors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lowbit.checkpoint.quantized_folder import QuantizedFolder
from lowbit.exporters.exporter import canonical_names

HEAD = "lm_head"
UNUSED = ("rotary_emb.inv_freq",)  # tensors of old folders that nobody reads
GATED = ("gate_proj", "up_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj")
FLOATS = ("embed_tokens", "norm", "input_layernorm", "post_attention_layernorm", HEAD)


@dataclass(frozen=True)
class Architecture:
    """An architecture of MLC.

    name: its model_type.
    attention: what MLC calls the stacked matrix of queries, keys and values.
    biased: matrices that may have a bias, by the last part of their names.
    tied: whether the output layer can be the embedding.
    scaled: whether the scaled rotary embedding of Llama 3 is known.
    norms: norms inside the attention.
    """

    name: str
    attention: str
    biased: tuple[str, ...] = ()
    tied: bool = True
    scaled: bool = False
    norms: tuple[str, ...] = ()

    def fused(self, layer: str) -> tuple[str, tuple[str, ...]]:
        """Returns the matrix that a layer is part of, and all layers of that matrix, in order."""
        owner, _, last = layer.rpartition(".")
        for name, parts in ((self.attention, ATTENTION), ("gate_up_proj", GATED)):
            if last in parts:
                return f"{owner}.{name}", tuple(f"{owner}.{part}" for part in parts)
        return layer, (layer,)

    def has_bias(self, layer: str) -> bool:
        """Returns whether MLC's model has a bias at a layer."""
        return layer.rpartition(".")[2] in self.biased


ARCHITECTURES = {
    arch.name: arch
    for arch in (
        Architecture("llama", "qkv_proj", scaled=True),
        Architecture("mistral", "qkv_proj", tied=False),
        Architecture("qwen2", "c_attn", biased=ATTENTION),
        Architecture("qwen3", "c_attn", (*ATTENTION, "o_proj"), norms=("q_norm", "k_norm")),
    )
}


class Target(NamedTuple):
    """A tensor of the written model.

    sources: the quantized layers that are stacked in it, or one tensor that is float.
    key: which tensor of the layers; None: it is float.
    """

    sources: tuple[str, ...]
    key: str | None


def targets(folder: QuantizedFolder, architecture: Architecture) -> dict[str, Target]:
    """Returns all tensors of the written model, by name.

    Raises ValueError for a tensor that MLC has no place for, such as a linear that is not
    quantized.
    """
    found: dict[str, Target] = {}
    for shard in folder.shards():  # first, since a matrix is stacked of quantized layers only
        found |= dict(_floats(folder, architecture, shard.others))
    for layer in folder.entries:
        found |= dict(_of_layer(folder, architecture, layer))
    return found


def _floats(
    folder: QuantizedFolder, architecture: Architecture, names: tuple[str, ...]
) -> Iterator[tuple[str, Target]]:
    renamed, tied = canonical_names(folder), bool(folder.config.get("tie_word_embeddings"))
    for source in names:
        name = renamed.get(source, source)
        module, _, kind = name.rpartition(".")
        if name.endswith(UNUSED) or (tied and module == HEAD):
            continue
        last = module.rpartition(".")[2]
        if kind != "weight" or last not in (*FLOATS, *architecture.norms):
            raise ValueError(
                f"MLC's {architecture.name} has no float tensor {name}: in its layout q4f16_2 all "
                "linears but lm_head are quantized. Export to ct or mlx"
            )
        yield name, Target((source,), None)


def _of_layer(
    folder: QuantizedFolder, architecture: Architecture, layer: str
) -> Iterator[tuple[str, Target]]:
    if layer == HEAD:
        yield f"{HEAD}.weight", Target((layer,), "weight")
        return
    fused, layers = architecture.fused(layer)
    if len({folder.entries[part]["bias"] is None for part in layers}) > 1:
        raise ValueError(f"only some of {', '.join(layers)} have a bias, and MLC stacks them")
    keys = ["q_weight", "q_scale"]
    if folder.entries[layer]["bias"] is not None:
        keys.append("bias")
    for key in keys:
        yield f"{fused}.{key}", Target(layers, key)
