"""Arguments and options that several commands have, each defined once."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from lowbit.config import Config


def meaning(config: type[Config], field: str) -> str:
    """The description of a field as the help of its option, which is None unless it is given."""
    text = config.model_fields[field].description or ""
    return text.replace("None: ", "default: ")


def calibration_option(default: str) -> Any:
    """--calibration, for a command whose text is `default` unless it is given."""
    names = "Calibration text: wikitext2, c4, ptb, pile, mix (three of them) or a text file"
    return Option(
        "--calibration",
        metavar="NAME|FILE",
        help=f"{names}; repeatable, with weights as a.txt=2. Default: {default}.",
    )


Model = Annotated[str, Argument(metavar="MODEL", help="Folder of a model, or its hub id.")]
QuantizedModel = Annotated[
    str, Argument(metavar="MODEL", help="Folder of a quantized model, or its hub id.")
]
MatQuantModel = Annotated[
    str, Argument(metavar="MODEL", help="Folder that method matquant made, or its hub id.")
]
Out = Annotated[Path, Argument(metavar="OUT", help="Folder to write.")]
NewOut = Annotated[Path, Argument(metavar="OUT", help="Folder to write, which must not exist.")]
Device = Annotated[
    str,
    Option(metavar="cpu|cuda:N|auto", help="Where to compute; auto: on a GPU if there is one."),
]
TrustRemoteCode = Annotated[
    bool, Option("--trust-remote-code", help="Allow Python code that comes with the model to run.")
]
CopyCode = Annotated[
    bool,
    Option("--trust-remote-code", help="Copy Python code that comes with the model. Default: no."),
]
JsonFile = Annotated[
    Path | None,
    Option("--json", metavar="FILE", help="Write the numbers to this file too. Default: no file."),
]


def check_writable(option: str, file: Path | None) -> None:
    """ValueError for a file that cannot be written, before the work whose results go there."""
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise ValueError(f"{option} {file}: that is a folder, or in a folder that does not exist")
