"""What an earlier run learned: OUT/learned/, one file per block, to replay or to train on."""

import hashlib
from pathlib import Path

from torch import Tensor

from lowbit.checkpoint.reader import CheckpointReader, file_sha256

FOLDER = "learned"


class Learned:
    """folder: OUT, or its `learned`. shards: of the run, as `CheckpointWriter` counts them.

    Raises ValueError when a block's file is missing: the earlier run is unfinished, learns nothing
    or was for a model with another number of blocks.
    """

    def __init__(self, folder: Path, shards: int) -> None:
        self.folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
        self.files = {
            index: self.folder / f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
            for index in range(1, shards)
        }
        found = sorted(path.name for path in self.folder.glob("*.safetensors"))
        missing = [path.name for path in self.files.values() if path.name not in found]
        if missing:
            there = f"there are {len(found)}" if found else "there is none"
            raise ValueError(
                f"{folder} lacks {missing[0]} of what an earlier run learned ({there}; this model "
                f"needs {len(self.files)}): name a finished OUT of a method that learns"
            )

    def digest(self) -> str:
        """sha256 of all files."""
        hashes = " ".join(file_sha256(path) for path in self.files.values())
        return hashlib.sha256(hashes.encode()).hexdigest()

    def of(self, index: int) -> dict[str, Tensor]:
        """What was learned for the block of shard `index`."""
        reader = CheckpointReader.of_file(self.files[index])
        return reader.read(reader.tensors)
