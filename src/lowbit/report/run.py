"""All that the report shows of a quantized folder, before it is drawn."""

import re
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from math import prod
from pathlib import Path

import torch

from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.output import Size, size_of
from lowbit.report.history import BlockHistory, History, history_of
from lowbit.report.layers import Layer, layers_of, linear_of
from lowbit.report.records import MadeBy, parse, read_events, read_report
from lowbit.run_report import BlockReport, RunReport

BLOCK = re.compile(r"(?:.*?\.)?(\d+)(?=\.|$)")  # a name up to its first number


@dataclass(frozen=True, kw_only=True)
class Block:
    """One transformer block.

    number: from 0.
    fallback: why and how the whole block was quantized in a simpler way than asked for.
    """

    name: str
    number: int
    layers: tuple[Layer, ...]
    report: BlockReport
    history: BlockHistory
    fallback: str | None

    @property
    def bits(self) -> float | None:
        weights = sum(layer.weights for layer in self.layers)
        return 8 * sum(layer.bytes for layer in self.layers) / weights if weights else None

    @property
    def worst(self) -> Layer | None:
        """The layer with the least signal to noise."""
        known = [layer for layer in self.layers if layer.error is not None]
        return min(known, key=lambda layer: layer.error or 0.0, default=None)

    @property
    def curve(self) -> list[float]:
        """The loss over the epochs; epoch 0 is what the learning began with."""
        before, after = self.report.loss_before, self.history.curve
        return [before, *after] if before is not None and after else after

    @property
    def loss_saved(self) -> float | None:
        """The share that learning saved of the loss of rounding to nearest (rtn), or, where that
        was not measured, of the loss that it started with.
        """
        before, after = self.report.loss_rtn, self.report.loss_after
        before = self.report.loss_before if before is None else before
        return 1 - after / before if before and after is not None else None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A quantized folder. outside: its linears that are in no block, as lm_head."""

    folder: Path
    quantized: QuantizedFolder
    size: Size
    made_by: MadeBy
    report: RunReport
    history: History
    blocks: tuple[Block, ...]
    outside: tuple[Layer, ...]

    @property
    def title(self) -> str:
        return self.made_by.source or self.folder.name

    @property
    def method(self) -> str:
        return self.made_by.recipe or str(self.made_by.method.get("name", ""))

    @property
    def layers(self) -> list[Layer]:
        return [layer for block in self.blocks for layer in block.layers] + list(self.outside)

    @cached_property
    def _float_weights(self) -> Counter[torch.dtype]:
        """How many weights of the quantized linears had which dtype in the float model."""
        found: Counter[torch.dtype] = Counter()
        for name, entry in self.quantized.entries.items():
            found[self.quantized.float_dtype(name)] += prod(entry["shape"])
        return found

    @property
    def float_dtype(self) -> str:
        """The dtype of most quantized weights in the float model, as torch calls it."""
        ((dtype, _),) = self._float_weights.most_common(1)
        return str(dtype).removeprefix("torch.")

    @property
    def times_smaller(self) -> float:
        """The size of the float model, divided by that of this one, weight for weight."""
        bits = sum(8 * dtype.itemsize * count for dtype, count in self._float_weights.items())
        return bits / self._float_weights.total() / self.size.model

    @property
    def loss_reference(self) -> str:
        """What `Block.loss_saved` compares with."""
        return "rtn" if any(b.report.loss_rtn is not None for b in self.blocks) else "start"

    @property
    def date(self) -> str:
        """The day when the run was done, in UTC."""
        if self.history.date is None:
            return ""
        try:
            return datetime.fromtimestamp(self.history.date, UTC).strftime("%Y-%m-%d")
        except (OverflowError, OSError, ValueError):
            raise ValueError(f"{self.folder}/events.jsonl was edited: no such time") from None

    @property
    def attention(self) -> str:
        """How queries, keys and values are rounded, if they are."""
        found = self.quantized.attention.values()
        bits = " and ".join(sorted({str(rounding["bits"]) for rounding in found}))
        return f"queries, keys and values at {bits} bits, in {len(found)} layers" if bits else ""

    @property
    def warnings(self) -> list[tuple[str, str]]:
        """(the block's name or nothing, the text).

        Earlier versions began a text with the block's name, which is left out here.
        """
        found = [("", text) for text in self.history.warnings]
        for block in self.blocks:
            for text in block.history.warnings:
                found.append((block.name, text.removeprefix(f"{block.name}: ")))
        return found

    @cached_property
    def kinds(self) -> dict[str, list[Layer]]:
        """Layers by their settings."""
        found: dict[str, list[Layer]] = {}
        for layer in self.layers:
            found.setdefault(layer.settings, []).append(layer)
        return found

    @property
    def memory(self) -> int | None:
        return max((b.history.memory for b in self.blocks if b.history.memory), default=None)

    @property
    def device_memory(self) -> int | None:
        known = (block.history.device_memory for block in self.blocks)
        return max((bytes_ for bytes_ in known if bytes_), default=None)


def read_run(folder: Path) -> Run:
    """Everything but the weights themselves is read, and the folder's headers are checked.

    Raises ValueError for a folder that `lowbit quantize` did not finish, or that was edited.
    """
    quantized = QuantizedFolder(folder)
    quantized.verify(hashes=False)
    config = folder / "config.json"
    made_by = parse(MadeBy, quantized.quantization.get("made_by") or {}, f"made_by in {config}")
    report, history = read_report(folder), history_of(read_events(folder))
    names: dict[str, list[str]] = {name: [] for name in report.blocks}
    for name in quantized.entries:
        found = BLOCK.match(name)
        names.setdefault(found[0] if found else "", []).append(name)
    layers = {block: _layers(quantized, report, block, inside) for block, inside in names.items()}
    outside = layers.pop("", ())
    blocks = [
        Block(
            name=name,
            number=(number := _number(name)),
            layers=found_layers,
            report=report.blocks.get(name, BlockReport()),
            history=history.of(number),
            fallback=report.fallbacks.get(name),
        )
        for name, found_layers in layers.items()
    ]
    blocks.sort(key=lambda block: block.number)
    return Run(
        folder=folder,
        quantized=quantized,
        size=size_of(folder),
        made_by=made_by,
        report=report,
        history=history,
        blocks=tuple(blocks),
        outside=outside,
    )


def _number(block: str) -> int:
    found = BLOCK.match(block)
    return int(found[1]) if found else 0


def _layers(
    quantized: QuantizedFolder, report: RunReport, block: str, names: list[str]
) -> tuple[Layer, ...]:
    inside = f"{block}." if block else ""
    known = report.blocks.get(block, BlockReport()).linears
    return layers_of(
        linear_of(
            quantized,
            name,
            inside,
            known.get(name.removeprefix(inside)),
            report.fallbacks.get(name),
        )
        for name in names
    )
