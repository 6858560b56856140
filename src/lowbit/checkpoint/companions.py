"""Which files of a model folder go with its weights into another folder: tokenizer, licences, ...

| a file                                                                        | goes along     |
| ----------------------------------------------------------------------------- | -------------- |
| weights in any format, and an index of weights                                | no             |
| what lowbit writes about a folder: config.json, report.json, run/, ...        | no             |
| what describes other weights: of an adapter, by another quantizer             | no             |
| README*: the card of the float model would describe the wrong model           | no             |
| hidden files, and what Python has compiled                                    | no             |
| Python code                                                                   | if it may run  |
| all in a folder that is a checkpoint of its own: original/, checkpoint-500/   | no             |
| everything else: tokenizer, chat templates, processors, licences              | yes            |

The same holds inside folders, such as additional_chat_templates/. Links to files are followed,
because the folder of a model from the hub consists of them; links to folders are not. A folder is a
checkpoint of its own where any file below it is weights, their index, config.json or params.json.
"""

import os
import shutil
from pathlib import Path

from lowbit.checkpoint.writer import RUN, aside

WEIGHTS = tuple(".safetensors .bin .pt .pth .ckpt .h5 .msgpack .ot .npz .gguf .onnx".split())
INDEX_END = ".index.json"
ABOUT_ITSELF = ("config.json", "report.json", "report.html", "events.jsonl", RUN, "learned")
ABOUT_OTHER_WEIGHTS = (
    "adapter_config.json",
    "quantization_config.json",
    "quantize_config.json",
    "quant_config.json",
)
CARD = "README"
CODE = ".py"
COMPILED = (".pyc", ".so")
CONFIGS = ("config.json", "params.json")


def copy_companions(folder: Path, into: Path, code: bool = False) -> None:
    """Copies the companions of a folder's weights, each written aside and renamed once it is whole.

    code: whether Python code goes along, as it must where it may run (--trust-remote-code).
    """
    for name in companions_of(folder, code):
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        with aside(into / name) as part:
            shutil.copyfile(folder / name, part)


def companions_of(folder: Path, code: bool = False) -> list[Path]:
    """The files that go with a folder's weights, by their paths relative to it; see the module."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name in (*ABOUT_ITSELF, *ABOUT_OTHER_WEIGHTS) or path.name.startswith(CARD):
            continue
        files = [path] if path.is_file() else _files_below(path)
        if not path.is_file() and any(map(_is_of_a_checkpoint, files)):
            continue
        found += [file.relative_to(folder) for file in files]
    return [file for file in found if _goes_along(file, code)]


def is_weights(file: Path) -> bool:
    """Whether a file holds weights, or is an index of files that do."""
    return file.suffix in WEIGHTS or file.name.endswith(INDEX_END)


def _files_below(folder: Path) -> list[Path]:
    """All files below a folder; none where it is a link, nor below links in it."""
    if folder.is_symlink():
        return []
    found = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if path.is_file())


def _goes_along(file: Path, code: bool) -> bool:
    """file: its path relative to the model folder"""
    if any(part.startswith(".") for part in file.parts) or is_weights(file):
        return False
    return code if file.suffix == CODE else file.suffix not in COMPILED


def _is_of_a_checkpoint(file: Path) -> bool:
    return is_weights(file) or file.name in CONFIGS
