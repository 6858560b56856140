"""The loss that MatQuant minimises (arXiv 2502.06786, equation 7 and section 4.3)."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from lowbit.blocks import BlockTask, Stream
from lowbit.blocks.capture import call_block
from lowbit.blocks.folding import Tensors
from lowbit.blocks.parts import sum_of_parts
from lowbit.methods.matquant.master import Master


class Loss:
    """The loss of a batch: the weighted sum over widths of the squared error of the output.

    weights: the weight of each width's error, from the highest width to the lowest.
    stream_of: the name of the stream on which each width learns.
    lessons: (teacher, student) widths; a student's target also has the teacher's output.
    alone: whether the teacher's output is then the only target.
    aug_loss: whether the loss also has the error against the float block on each width's inputs.
    """

    def __init__(
        self,
        task: BlockTask,
        weights: Mapping[int, float],
        stream_of: Mapping[int, str],
        lessons: Sequence[tuple[int, int]],
        alone: bool,
        aug_loss: bool,
    ) -> None:
        self.weights = weights
        self.stream_of = stream_of
        self.lessons = lessons
        self.alone = alone
        self.block = task.block
        self.streams = task.streams
        self.target = self._float_output("float")
        self.aug_targets: dict[str, Stream] = {}
        if aug_loss:
            used = set(stream_of.values())
            self.aug_targets = {n: self._float_output(n) for n in sorted(used - {"float"})}
        self.batches = len(self.target)

    def _float_output(self, stream: str) -> Stream:
        return self.streams[stream].map(lambda batch: call_block(self.block, batch))

    def __call__(self, index: int, master: Master) -> Tensor:
        def terms(parts: Mapping[str, Tensor]) -> Iterator[Tensor]:
            return self.terms(index, lambda width: master.at(width, parts))

        return sum_of_parts(master.parts(), terms)

    def fixed(self, master: Master) -> Callable[[int], Tensor]:
        """Returns the loss of a batch, given its index, without gradients.

        The weights of each width are computed once for all batches.
        """
        with torch.no_grad():
            parts = master.parts()
            tensors = {width: master.at(width, parts) for width in self.weights}

        def loss(index: int) -> Tensor:
            with torch.no_grad():
                return torch.stack(list(self.terms(index, tensors.__getitem__))).sum()

        return loss

    def terms(self, index: int, tensors: Callable[[int], Tensors]) -> Iterator[Tensor]:
        """Yields the term of each width, from high to low, so that teachers precede students.

        tensors: returns the tensors of the block at a width.
        """
        outputs: dict[int, Tensor] = {}
        for width, weight in self.weights.items():
            stream = self.stream_of[width]
            batch = self.streams[stream][index]
            out = functional_call(self.block, tensors(width), (batch.hidden,), dict(batch.kwargs))
            out = out[0] if isinstance(out, tuple) else out
            targets = [outputs[teacher] for teacher, student in self.lessons if student == width]
            outputs[width] = out.detach()
            if not targets or not self.alone:
                targets.append(self.target[index].hidden)
            error = torch.stack([functional.mse_loss(out, target) for target in targets]).mean()
            if stream in self.aug_targets:
                error = error + functional.mse_loss(out, self.aug_targets[stream][index].hidden)
            yield weight * error
