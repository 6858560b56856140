"""The embedding format: a table of which single rows are looked up, at 2 to 8 bits.

    weight = scale * (code - 2**(bits - 1))

A row is the vector of a token. It is cut into groups of `group_size` channels, each with a scale of
its own; the last group of a row may be shorter. The tensors are stored row-major:

| name     | dtype              | shape                      | holds                         |
| -------- | ------------------ | -------------------------- | ----------------------------- |
| `packed` | uint8              | (rows, ceil(in * bits / 8)) | a row's codes, along channels |
| `scale`  | float16 or float32 | (rows, groups)             | as `scale_dtype` says         |

They are those of a symmetric layer of the uniform format, whose docstring says more. The entry in
config.json:

    {"format": "embedding", "shape": [rows, in], "bias": null, "bits": 2..8,
     "group_size": int | null, "scale_dtype": "float16" | "float32"}

An output layer that is tied to the table multiplies by the same codes; nothing more is stored.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from lowbit.formats.embedding.cpu import Cpu
from lowbit.formats.packed_weight import PackedWeight
from lowbit.formats.uniform import UniformEntry, UniformLayout, UniformLinear, reference
from lowbit.formats.uniform import tensor_bytes as uniform_bytes
from lowbit.formats.uniform.triton import Triton
from lowbit.kernels.bits import unpack

__all__ = ["EmbeddingEntry", "QuantizedEmbedding", "TiedLinear", "tables_of"]


class EmbeddingEntry(UniformEntry):
    """The entry of a table in config.json; the module's docstring explains it."""

    format: Literal["embedding"]  # type: ignore[assignment]
    bias: None
    symmetric: Literal[True] = True
    zero_shift: Literal[0] = 0
    activation: None = None
    rotation: None = None
    shares: None = None


def tensor_bytes(
    shape: list[int] | tuple[int, int],
    bits: int,
    group_size: int | None,
    scale_dtype: str,
    **free: Any,
) -> int:
    """Returns `QuantizedEmbedding.weight_bytes()` of the table that an entry describes:

    rows * ceil(in * bits / 8) + rows * groups * (2 or 4)

    free: the other fields of the entry, which take no bytes.
    """
    return uniform_bytes(shape, bits, group_size, True, 0, scale_dtype)


class QuantizedEmbedding(UniformLinear):
    """An embedding whose table is packed; the module's docstring gives its byte layout.

    It takes the place of an `nn.Embedding`, whose own forward runs with rows of the packed table,
    so that a class that scales its vectors (Gemma) goes on doing so. With a floating input it
    multiplies by the table, as an output layer that is tied to it does.

    multiplies: whether an output layer is tied to it; else it is not repacked for the kernels.
    """

    format = "embedding"
    Entry: ClassVar[type[EmbeddingEntry]] = EmbeddingEntry
    backends = (Cpu(), Triton(), reference.Reference())
    multiplies = False

    def __init__(self, spec: EmbeddingEntry) -> None:
        super().__init__(spec)
        self.original: nn.Module | None = None

    def take_place_of(self, embedding: nn.Embedding) -> None:
        """Keeps an embedding without its weight, to run its forward.

        Raises ValueError if it has another shape.
        """
        shape = (embedding.num_embeddings, embedding.embedding_dim)
        if shape != tuple(self.spec.shape):
            raise ValueError(f"its shape is {self.spec.shape}, but the table has {list(shape)}")
        self.float_dtype = embedding.weight.dtype
        del embedding._parameters["weight"]
        embedding.weight = PackedWeight(self)  # type: ignore[assignment]
        if not any(True for _ in embedding.buffers()):
            embedding._is_hf_initialized = True  # type: ignore[assignment]
        self.original = embedding

    def rows(self, tokens: Tensor) -> Tensor:
        """Returns the vectors of tokens, (..., in) in the dtype of the float table.

        tokens: (...) of an integer dtype. A number outside the table raises IndexError.
        """
        spec, flat = self.spec, tokens.reshape(-1).long()
        if flat.device.type == "cpu" and len(flat):
            least, most = int(flat.min()), int(flat.max())
            if least < 0 or most >= self.out_features:
                raise IndexError(
                    f"token {least if least < 0 else most} is not in the table, which has the "
                    f"tokens 0 to {self.out_features - 1}"
                )
        codes = unpack(self.packed.index_select(0, flat), spec.bits, self.in_features)
        scale = self.scale.index_select(0, flat).float()
        values = torch.empty_like(codes, dtype=torch.float32)
        zeros = reference.zero_points(None, scale, spec.bits, 0)
        reference.write_weight(values, codes, scale, zeros, spec.layout)
        return values.to(self.float_dtype).view(*tokens.shape, self.in_features)

    def repack(self, tokens: int, dtype: torch.dtype = torch.float32) -> None:
        if self.multiplies:
            super().repack(tokens, dtype)

    def look_up(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.rows(tokens) if self.original is None else self.original(tokens)
        return out

    @classmethod
    def nearest(
        cls,
        weight: Tensor,
        scale: Tensor,
        bits: int,
        group_size: int | None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Rounds a table to the nearest codes.

        weight: (rows, in).
        scale: (rows, groups).
        dtype: dtype of the original table; None: unknown.
        """
        return cls.from_grid(weight, scale, None, UniformLayout(bits, group_size), dtype=dtype)


class TiedLinear(nn.Module):
    """An output layer that multiplies by the packed table of an embedding; it has no table itself.

    embedding: the embedding.
    linear: the linear layer that was tied to it; its bias is kept.
    """

    def __init__(self, embedding: QuantizedEmbedding, linear: nn.Linear) -> None:
        super().__init__()
        embedding.multiplies = True
        self._embedding = (embedding,)  # in a tuple, so that its tensors are not this layer's too
        self.out_features, self.in_features = embedding.out_features, embedding.in_features
        self.register_parameter("bias", linear.bias)

    @property
    def weight(self) -> PackedWeight:
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in)  ->  (..., out)"""
        y: Tensor = self._embedding[0](x)  # called, so that accelerate brings an offloaded table
        bias = self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)


def tables_of(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the names of the entries that are tables."""
    return [name for name, entry in entries.items() if entry["format"] == QuantizedEmbedding.format]
