"""The way through the float model and back, before the first block: Hessians of linears' outputs.

All blocks run forward once, with their inputs kept. For each position of the calibration text, a
label is drawn from the model's own prediction. Then the blocks run backward, from the last to the
first, with the gradients of the loss on these labels. The Hessians of a block are written to disk
as soon as it is passed, since they are needed in the other order. If the run is interrupted after
that, the next one uses them; before that, it starts over.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.blocks import Batch, Stream
from lowbit.blocks.backward import Tape
from lowbit.blocks.hessian import Hessian, Hessians
from lowbit.blocks.output_hessian import output_hessians
from lowbit.blocks.walk import Step
from lowbit.calibration import TokenWindows
from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.kept import is_kept, keep
from lowbit.checkpoint.writer import save_tensors
from lowbit.events import GradientsAdvanced, OnEvent
from lowbit.models.streamed import Inputs, ModelWithoutBlocks
from lowbit.parsing import reason_of
from lowbit.pipeline.job import Job


class OutputSide:
    """The Hessians of the outputs of all linears, on disk, in one file for each block.

    folder: holds them once `is_complete`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def is_complete(self) -> bool:
        return is_kept(self.folder)

    def write(self, job: Job, windows: TokenWindows, place: Path | None, log: OnEvent) -> None:
        """Passes through the model and back.

        place: a folder for the inputs of all blocks, which is deleted; None: in memory.

        Raises ValueError for a model that cannot be differentiated.
        """
        self.delete()
        self.folder.mkdir(parents=True)
        blocks, done = len(job.blocks), count(1)
        batches = windows.batches(job.method.windows_per_batch())
        stream = job.first_stream(batches, bool(windows.rows), place and place / "now")
        tape = Tape(stream, place and place / "inputs")

        def advanced() -> None:
            log(GradientsAdvanced(done=next(done), of=2 * blocks))

        def forward(step: Step) -> None:
            tape.forward(step.block)
            advanced()

        def backward(step: Step) -> None:
            linears = [n for g in job.selection.groups(step.name) for n in g.linears]
            found = output_hessians(step.block, linears, tape, gradients.hidden())
            self._save(step.index, found)
            advanced()

        job.source.walk({}, forward, job.device)
        try:
            gradients = label_gradients(job, batches, tape.stream)
            job.source.walk({}, backward, job.device, reversed(range(blocks)))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                "output_feedback needs gradients, and this model cannot be differentiated "
                f"({reason_of(error)}): set output_feedback to false"
            ) from error
        keep(self.folder)
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)

    def of(self, block: int) -> Mapping[str, Hessian]:
        """Returns the Hessians of the outputs of a block, by the linear's name."""
        return _Stored(self._file(block))

    def tensors(self, block: int) -> Mapping[str, Tensor]:
        """Returns the tensors in the file of a block; see `hessians_of`."""
        reader = CheckpointReader.of_file(self._file(block))
        return reader.read(reader.tensors)

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _save(self, block: int, found: Hessians) -> None:
        tensors: dict[str, Tensor] = {}
        for name, hessian in found.items():
            tensors[f"{name}.matrix"] = hessian.matrix
            tensors[f"{name}.tokens"] = torch.tensor(hessian.tokens)
        save_tensors(self._file(block), tensors)

    def _file(self, block: int) -> Path:
        return self.folder / f"{block:05d}.safetensors"


def hessians_of(tensors: Mapping[str, Tensor]) -> dict[str, Hessian]:
    """Returns the Hessians that the tensors of a file hold, by the linear's name."""
    names = [name.removesuffix(".matrix") for name in tensors if name.endswith(".matrix")]
    return {
        name: Hessian(tensors[f"{name}.matrix"], int(tensors[f"{name}.tokens"])) for name in names
    }


class _Stored(Mapping[str, Hessian]):
    """The Hessians in a file, each of which is read when it is needed."""

    def __init__(self, file: Path) -> None:
        self._reader = CheckpointReader.of_file(file)

    def __getitem__(self, linear: str) -> Hessian:
        matrix, tokens = f"{linear}.matrix", f"{linear}.tokens"
        found = self._reader.read([matrix, tokens])
        return Hessian(found[matrix], int(found[tokens]))

    def __iter__(self) -> Iterator[str]:
        names = self._reader.tensors
        return (name.removesuffix(".matrix") for name in names if name.endswith(".matrix"))

    def __len__(self) -> int:
        return len(self._reader.tensors) // 2


def label_gradients(job: Job, batches: Sequence[Inputs], last: Stream) -> Stream:
    """Returns the gradients of the loss on drawn labels by the outputs of the last block.

    The loss is the sum over all positions.

    batches: the calibration text.
    last: the outputs of the last block.
    """
    outside = job.source.without_blocks(job.device)
    seed = hashlib.sha256(f"{job.calibration.seed} labels".encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
    texts = iter(batches)
    return last.map(lambda batch: _gradient(outside, next(texts), batch, draw))


def _gradient(
    outside: ModelWithoutBlocks, text: Inputs, batch: Batch, draw: torch.Generator
) -> Tensor:
    tokens = text if isinstance(text, Tensor) else text["input_ids"]
    levels = torch.rand(tokens.shape, generator=draw, dtype=torch.float64)

    def loss(window: int, part: slice, logits: Tensor) -> Tensor:
        labels = drawn_labels(logits.detach(), levels[window, part])
        return functional.cross_entropy(logits, labels, reduction="sum")

    gradient = torch.zeros_like(batch.hidden)
    outside.losses(torch.zeros_like(tokens), batch.hidden, loss, gradient)
    return gradient


def drawn_labels(logits: Tensor, levels: Tensor) -> Tensor:
    """Draws a label for each position from its predictions: (positions,) int64.

    logits: (positions, vocabulary) float32.
    levels: (positions,) float64, uniform in [0, 1): the label is where the probabilities of all
        labels up to it exceed the level.
    """
    # On the CPU, since CUDA adds up floats in any order, which a deterministic run refuses.
    cumulative = logits.softmax(-1).cpu().cumsum(-1, dtype=torch.float64)
    wanted = levels.unsqueeze(1) * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, wanted, right=True).squeeze(1).to(logits.device)
    # A level near 1 times the sum may be rounded to the sum itself, beyond the last label.
    return found.clamp(max=logits.shape[1] - 1)
