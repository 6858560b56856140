"""Writes a model with outlier channels: the same function in float, but harder to quantize.

    python benchmarks/outliers.py MODEL OUT [--channels 6] [--factors 32 64]

In large language models a few channels have values that are tens of times larger than the others;
small models have no such channels. Here the weights of norms are multiplied on a few channels, the
same ones in all blocks, and the matching columns of the linears after the norm are divided. Factors
are powers of two, so that no number is rounded, except those beyond the exponents of float16.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from lowbit.blocks.folding import apply_fold, tensors_of
from lowbit.checkpoint.folder import write_folder
from lowbit.checkpoint.reader import read_json
from lowbit.models.source import SourceModel

CHANNELS = 6
FACTORS = (32, 64)


def add_outliers(
    model: Path, out: Path, channels: int = CHANNELS, factors: tuple[int, ...] = FACTORS
) -> Path:
    """Writes `model` with outliers after each norm of its blocks to `out`, and returns `out`."""
    source = SourceModel(model)
    tensors = source.reader.read(list(source.reader.tensors))
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randperm(source.config.hidden_size, generator=draw)[:channels]
    scale = torch.ones(source.config.hidden_size)
    scale[chosen] = 1 / torch.tensor([factors[i % len(factors)] for i in range(channels)])
    for name in source.block_names:
        before = tensors_of(source.load_block(name))
        after = before
        for fold in source.folds(name):
            if fold.kind == "norm":
                after = apply_fold(after, fold, scale)
        for inside, tensor in after.items():
            if tensor is not before[inside]:
                disk = source.disk_names[f"{name}.{inside}"]
                tensors[disk] = tensor.to(tensors[disk].dtype)
    shard: dict[str, Tensor] = {key: tensor.contiguous() for key, tensor in tensors.items()}
    write_folder(out, [shard], 1, read_json(model / "config.json"), model)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=CHANNELS)
    parser.add_argument("--factors", type=int, nargs="+", default=FACTORS)
    args = parser.parse_args()
    print(add_outliers(args.model, args.out, args.channels, tuple(args.factors)))


if __name__ == "__main__":
    main()
