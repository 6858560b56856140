"""Reads the parameters that an earlier run learned, in OUT/learned/, one file per block.

A new run can apply them without training, or continue to train them.
"""

import hashlib
from pathlib import Path

from torch import Tensor

from lowbit.checkpoint.hashes import OTHER_FILES, problem_of, stated
from lowbit.checkpoint.reader import CheckpointReader, file_sha256, read_json
from lowbit.checkpoint.recognize import CONFIG, check_config

FOLDER = "learned"
NAME = "name the OUT of a finished run on this model with a method that learns"


class Learned:
    """The learned parameters of an earlier run.

    folder: OUT of that run, or the folder `learned` in it.
    shards: number of shards of the new run, as `CheckpointWriter` counts them: blocks + 1.

    Raises ValueError if there is no such folder, or the file of a block is missing: the earlier run
    is unfinished, its method learns nothing, or its model has another number of blocks; and if a
    file is not as it was written.
    """

    def __init__(self, folder: Path, shards: int) -> None:
        self.folder = _folder(folder)
        self.files = {
            index: self.folder / f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
            for index in range(1, shards)
        }
        present = sorted(path.name for path in self.folder.glob("*.safetensors"))
        missing = [path.name for path in self.files.values() if path.name not in present]
        if missing:
            raise ValueError(
                f"{folder} lacks {missing[0]} with learned parameters of a block (it has "
                f"{len(present)} such files, this model needs {len(self.files)}): {NAME}"
            )
        self._check_hashes()

    def _check_hashes(self) -> None:
        """Compares the files with config.json, if the folder is that of a finished run."""
        out = self.folder.parent
        if self.folder.name != FOLDER or not (out / "config.json").is_file():
            return
        section = check_config(out, read_json(out / CONFIG)).get("quantization_config")
        facts = stated(section, OTHER_FILES) if isinstance(section, dict) else {}
        for path in self.files.values():
            name = f"{FOLDER}/{path.name}"
            problem = problem_of(out, name, facts[name]) if name in facts else None
            if problem is not None:
                raise ValueError(
                    f"{path} {problem}: copy it from its source again, or run the command that "
                    "made it again"
                )

    def digest(self) -> str:
        """Returns a sha256 of the contents of all files."""
        hashes = " ".join(file_sha256(path) for path in self.files.values())
        return hashlib.sha256(hashes.encode()).hexdigest()

    def of(self, index: int) -> dict[str, Tensor]:
        """Returns the learned parameters of the block in shard `index`."""
        reader = CheckpointReader.of_file(self.files[index])
        return reader.read(reader.tensors)


def _folder(named: Path) -> Path:
    """Returns the folder with the files of the blocks.

    Raises ValueError for a model without one, whose own shards would be taken for them.
    """
    if not named.is_dir():
        came = "is a file" if named.exists() else "does not exist"
        raise ValueError(f"{named} {came}: {NAME}")
    if (named / FOLDER).is_dir():
        return named / FOLDER
    if (named / CONFIG).exists():
        raise ValueError(
            f"{named} has no folder {FOLDER}, it is a model that learned nothing: {NAME}"
        )
    return named
