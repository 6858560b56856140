"""What the system is told to fetch: the stored tensors of the block that is loaded next."""

import os
from pathlib import Path

import low_precision
import pytest
import torch
import zoo
from safetensors.torch import load_file

from lowbit.models.source import SourceModel

KINDS = {
    "shards": ("llama", lambda folder: folder),
    "FP8 with scales": ("llama", low_precision.store_in_fp8),
    "stacked experts": ("mixtral", lambda folder: folder),
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs a system that fetches ahead")
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_block_is_fetched(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, stored = KINDS[kind]
    shards = {"max_shard_size": "60KB"} if kind == "shards" else {}
    folder = stored(zoo.write(zoo.ZOO[name], tmp_path, **shards))
    model = SourceModel(folder)
    fetched: list[bytes] = []

    def fetch(file: int, begin: int, length: int, advice: int) -> None:
        fetched.append(os.pread(file, length, begin))

    monkeypatch.setattr(os, "posix_fadvise", fetch)
    seen: list[int] = []
    model.walk({}, lambda step: seen.append(len(fetched)))
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    tensors = {n: t for file in files for n, t in file.items() if ".layers.1." in n}
    wanted = [bytes(t.contiguous().view(-1).view(torch.uint8).tolist()) for t in tensors.values()]
    assert sorted(fetched) == sorted(wanted)
    assert seen == [len(wanted)] * 2  # before the first block is visited
