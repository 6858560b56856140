"""Puts packed tables of embeddings into a model, and ties the output layers that share them."""

from torch import nn
from transformers import PreTrainedModel

from lowbit.formats.embedding import QuantizedEmbedding, TiedLinear


def place_embedding(model: PreTrainedModel, name: str, table: QuantizedEmbedding) -> None:
    """Replaces an embedding of a model by a packed one, and whatever is tied to it.

    name: of the embedding, in memory.

    Raises ValueError if there is another module, or one of another shape.
    """
    old = model.get_submodule(name)
    if not isinstance(old, nn.Embedding):
        raise ValueError(
            f"config.json lists {name} as an embedding, but in this model it is a "
            f"{type(old).__name__}"
        )
    try:
        table.take_place_of(old)
    except ValueError as error:
        raise ValueError(f"embedding {name}: {error}") from None
    _put(model, name, table)
    tied = model.all_tied_weights_keys
    weight = f"{name}.weight"
    source = tied.get(weight, weight)
    together = {source, *(target for target, first in tied.items() if first == source)} - {weight}
    for path in (other.removesuffix(".weight") for other in sorted(together)):
        other = model.get_submodule(path)
        _put(model, path, TiedLinear(table, other) if isinstance(other, nn.Linear) else table)
    for target in together | {weight}:
        tied.pop(target, None)
    if together:  # transformers would look for the float weight when it ties again
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.tie_word_embeddings = False


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, module)
