"""Trains the vectors of a quantized model with AdamW, and keeps those that are best."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.blocks.training import all_finite
from lowbit.checkpoint import CheckpointReader
from lowbit.checkpoint.kept import keep, last_kept
from lowbit.checkpoint.reader import read_json
from lowbit.checkpoint.writer import save_tensors, write_json
from lowbit.events import OnEvent, TrainingStep
from lowbit.tuning.options import TuneOptions
from lowbit.tuning.student import Student
from lowbit.tuning.teacher import Teacher
from lowbit.tuning.vectors import CENTRED

TENSORS, COURSE = "tensors.safetensors", "course.json"  # files of a state


@dataclass(kw_only=True)
class Course:
    """The course of a training. Losses are mean divergences in nats.

    steps: the number of steps that were taken.
    before: the loss on the held-out windows before the first step.
    after: the lowest loss on the held-out windows; it is `before` if no step made it lower.
    best_step: the step after which it was measured; 0: before the first.
    held_out: the steps after which the held-out windows were measured, and the losses.
    """

    steps: int = 0
    before: float = math.nan
    after: float = math.nan
    best_step: int = 0
    held_out: list[tuple[int, float]] = field(default_factory=list)


class Training:
    """The state of a training: the present and the best changes of all vectors, and the optimiser.

    student: the model. In the end its vectors have the best values.
    windows: (windows, tokens) int64; the last `held_out` of them are not trained on.
    held_out: the number of held-out windows.
    teacher: the predictions of the float model for all windows.
    options: the settings.
    folder: keeps a state after every measurement; the last one is continued.
    seed: seed of the order of the windows.
    log: called with each `TrainingStep`.
    """

    def __init__(  # noqa: PLR0913 (the parts of a training)
        self,
        student: Student,
        windows: Tensor,
        held_out: int,
        teacher: Teacher,
        options: TuneOptions,
        folder: Path,
        seed: int,
        log: OnEvent,
    ) -> None:
        self.student, self.windows, self.teacher = student, windows, teacher
        self.options, self.folder, self.log = options, folder, log
        count = len(windows) - held_out
        self.order = _order(count, options.steps * options.batch, seed)
        self.held_out = torch.arange(count, len(windows)).split(options.batch)
        self.course = Course()
        self.changes: dict[str, Tensor] = {
            name: vector.change for name, vector in student.vectors.items()
        }
        self.best = {name: change.detach().clone() for name, change in self.changes.items()}
        groups: dict[bool, list[Tensor]] = {False: [], True: []}
        for name, change in self.changes.items():
            groups[name.rpartition(".")[2] in CENTRED].append(change)
        self.rates = {False: options.rate, True: options.norm_rate}
        self.optimizer = torch.optim.AdamW(
            [{"params": groups[c], "lr": self.rates[c], "centred": c} for c in groups if groups[c]],
            weight_decay=0.0,
        )

    def run(self) -> Course:
        """Trains from the last state on; afterwards the student computes with the best vectors.

        Raises ValueError if a loss or a gradient is not finite.
        """
        self._continue()
        if not self.course.held_out:
            self._measure()
            _check(self.course.before, "the divergence of the model from the float model")
        since: list[float] = []
        while self.course.steps < self.options.steps:
            since.append(self._step())
            done, of = self.course.steps, self.options.steps
            if done % self.options.measure_every == 0 or done == of:
                self._measure()
                loss = sum(since) / len(since)
                self.log(
                    TrainingStep(step=done, of=of, loss=loss, held_out=self.course.held_out[-1][1])
                )
                since = []
        with torch.no_grad():
            for name, change in self.changes.items():
                change.copy_(self.best[name])
        self._refresh()
        return self.course

    def _step(self) -> float:
        """Takes one step; returns the loss before it."""
        done, batch = self.course.steps, self.options.batch
        chosen = self.order[done * batch : (done + 1) * batch]
        factor = 0.5 * (1 + math.cos(math.pi * done / self.options.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[group["centred"]] * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.student.add_gradients(self.windows[chosen], self._targets(chosen))
        _check(loss, f"the loss at step {done + 1}")
        gradients = {n: c.grad for n, c in self.changes.items() if c.grad is not None}
        if not all_finite(gradients.values()):
            name = next(name for name, g in gradients.items() if not all_finite([g]))
            _check(math.nan, f"a gradient of {name} at step {done + 1}")
        self.optimizer.step()
        self._refresh()
        self.course.steps += 1
        return loss

    def _measure(self) -> None:
        """Measures the loss on the held-out windows, and keeps a state."""
        targets = [self._targets(chosen) for chosen in self.held_out]
        now = self.student.divergence([self.windows[c] for c in self.held_out], targets)
        course = self.course
        if not course.held_out:
            course.before = course.after = now
        course.held_out.append((course.steps, now))
        if now < course.after:
            course.after, course.best_step = now, course.steps
            self.best = {name: change.detach().clone() for name, change in self.changes.items()}
        self._keep()

    def _targets(self, chosen: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        return [self.teacher[int(window)] for window in chosen]

    def _refresh(self) -> None:
        for vector in self.student.vectors.values():
            vector.refresh()

    def _keep(self) -> None:
        """Writes a state, and deletes all but the one before it."""
        state = self.folder / f"step-{self.course.steps:07d}"
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir(parents=True)
        moments = self.optimizer.state_dict()["state"]
        tensors: dict[str, Tensor] = {
            f"change.{name}": change for name, change in self.changes.items()
        }
        tensors |= {f"best.{name}": change for name, change in self.best.items()}
        tensors |= {f"moment.{i}.{key}": t for i, of in moments.items() for key, t in of.items()}
        save_tensors(state / TENSORS, tensors)
        write_json(state / COURSE, vars(self.course))
        keep(state)
        for old in sorted(self.folder.glob("step-*"))[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def _continue(self) -> None:
        """Takes over the last state that an earlier run has left."""
        state = last_kept(self.folder)
        if state is None:
            return
        reader = CheckpointReader.of_file(state / TENSORS)
        tensors = reader.read(reader.tensors)
        course = read_json(state / COURSE)
        course["held_out"] = [(step, loss) for step, loss in course["held_out"]]
        self.course = Course(**course)
        with torch.no_grad():
            for name, change in self.changes.items():
                change.copy_(tensors[f"change.{name}"])
                self.best[name] = tensors[f"best.{name}"].to(change.device)
        moments: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if name.startswith("moment."):
                _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self._refresh()


def _order(windows: int, count: int, seed: int) -> Tensor:
    """Returns which window comes when: random orders of all windows, one after another."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-count // windows)
    return torch.cat([torch.randperm(windows, generator=generator) for _ in range(passes)])[:count]


def _check(loss: float, what: str) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"{what} is not finite ({loss}): lower the learning rates (rate, norm_rate); if it is "
            "so from the start, the weights of one of the two models are damaged"
        )
