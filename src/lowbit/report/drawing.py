"""Numbers to coordinates: shaded grids of layer by block, bars by block, curves over epochs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowbit.quantities import change, duration, size
from lowbit.report.layers import NUMBER, Layer
from lowbit.report.run import Block, Run

CURVE_WIDTH, CURVE_HEIGHT, CURVE_INSET = 320.0, 96.0, 6.0  # of the drawing, in its own units
MOST_WITH_TEXT = 12  # blocks, up to which a number fits into a cell
TEXT_TURNS = 0.7  # the shade from which text in a cell takes the colour of the page


@dataclass(frozen=True)
class Scale:
    """How a grid shades values. least: the range of all shades at least: differences that mean
    nothing shall not look like much. sign: -1 where the least value has the strongest shade.
    """

    least: float
    sign: int
    unit: str
    digits: int

    def text(self, value: float) -> str:
        return "exact" if math.isinf(value) else f"{value:.{self.digits}f}"


DECIBELS = Scale(6.0, -1, "dB", 1)  # 6 dB are one bit
BITS = Scale(1.0, 1, "bits", 2)


@dataclass(frozen=True)
class Cell:
    """One layer of one block. shade: 0 to 1. flagged: something of it fell back."""

    shade: float
    text: str
    title: str
    flagged: bool

    @property
    def strong(self) -> bool:
        return self.shade > TEXT_TURNS


@dataclass(frozen=True)
class GridRow:
    name: str
    cells: list[Cell | None]  # one for each block; None: this block has no such layer
    span: str  # lowest to highest of the row


@dataclass(frozen=True)
class Grid:
    """legend: what no shade and full shade stand for."""

    rows: list[GridRow]
    legend: tuple[str, ...]
    with_text: bool


@dataclass(frozen=True)
class Bar:
    share: float  # 0 to 1, of the longest
    title: str


@dataclass(frozen=True)
class Bars:
    """bars: one for each block; None where it is not known. top: what the longest stands for."""

    name: str
    bars: list[Bar | None]
    top: str
    line: float | None = None  # where a reference lies, 0 to 1


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A loss over epochs.

    points: for an SVG polyline.
    line: the height of the loss of rounding to nearest.
    best: where the values that were kept stand.
    """

    points: str
    line: float | None
    best: tuple[float, float] | None
    low: str
    high: str
    title: str


def error_grid(blocks: Sequence[Block]) -> Grid | None:
    """The worst signal to noise of each layer; None where none is known."""

    def title(layer: Layer) -> str:
        return f"{layer_error(layer)}, {layer.bits:.2f} bits"

    return _grid(blocks, lambda layer: layer.error, title, DECIBELS)


def bits_grid(blocks: Sequence[Block]) -> Grid | None:
    """The real bits of each layer, or None where they are all the same."""
    found = {f"{layer.bits:.2f}" for block in blocks for layer in block.layers}
    if len(found) < 2:
        return None

    def title(layer: Layer) -> str:
        return f"{layer.bits:.2f} bits, {layer.settings}"

    return _grid(blocks, lambda layer: layer.bits, title, BITS)


def _grid(
    blocks: Sequence[Block],
    value: Callable[[Layer], float | None],
    title: Callable[[Layer], str],
    scale: Scale,
) -> Grid | None:
    placed = [{NUMBER.sub("*", layer.name): layer for layer in block.layers} for block in blocks]
    names = dict.fromkeys(name for layers in placed for name in layers)
    known = [v for layers in placed for x in layers.values() if (v := value(x)) is not None]
    finite = [scale.sign * v for v in known if math.isfinite(v)]
    if not finite:
        return None
    low = min(finite)
    high = max(*finite, low + scale.least)

    def cell(block: Block, layer: Layer | None) -> Cell | None:
        if layer is None or (v := value(layer)) is None:
            return None
        where = f"{block.name}.{layer.name}: {title(layer)}"
        flagged = bool(block.fallback or layer.fallen)
        return Cell(share(scale.sign * v, low, high), scale.text(v), where, flagged)

    rows = []
    for name in names:
        layers = [layers.get(name) for layers in placed]
        of_row = [v for x in layers if x is not None and (v := value(x)) is not None]
        if of_row:
            cells = [cell(block, layer) for block, layer in zip(blocks, layers, strict=True)]
            shown = next(layer.name for layer in layers if layer is not None)
            span = dict.fromkeys(map(scale.text, (min(of_row), max(of_row))))
            rows.append(GridRow(shown, cells, " – ".join(span)))
    legend = tuple(f"{scale.text(scale.sign * end)} {scale.unit}" for end in (low, high))
    return Grid(rows, legend, len(blocks) <= MOST_WITH_TEXT)


def share(value: float, low: float, high: float) -> float:
    """Where a value lies between two, 0 to 1; 0 where all are the same."""
    if high <= low:
        return 0.0
    return round(min(1.0, max(0.0, (value - low) / (high - low))), 3)


def block_bars(run: Run) -> list[Bars]:
    """What is known of every block: loss, time, memory."""
    found = [
        _bars(
            f"loss saved against {run.loss_reference}", run.blocks, lambda b: b.loss_saved, _percent
        ),
        _bars("time", run.blocks, lambda b: b.history.seconds, duration),
        _bars("peak memory", run.blocks, lambda b: b.history.memory, size),
        _bars("peak memory of the GPU", run.blocks, lambda b: b.history.device_memory, size),
    ]
    return [bars for bars in found if bars is not None]


def _bars(
    name: str,
    blocks: Sequence[Block],
    value: Callable[[Block], float | None],
    text: Callable[[float], str],
) -> Bars | None:
    values = [value(block) for block in blocks]
    top = max((v for v in values if v), default=0.0)
    if top <= 0:
        return None
    bars = [
        None if v is None else Bar(share(v, 0.0, top), f"{block.name}: {text(v)}")
        for block, v in zip(blocks, values, strict=True)
    ]
    return Bars(name, bars, text(top))


def curve_of(block: Block) -> Curve | None:
    """The loss over the epochs, with rounding to nearest as a line across."""
    values, rtn = block.curve, block.report.loss_rtn
    if len(values) < 2:
        return None
    low, high = min(values), max(values)
    if rtn is not None:
        low, high = min(low, rtn), max(high, rtn)
    step = (CURVE_WIDTH - 2 * CURVE_INSET) / (len(values) - 1)

    def y(value: float) -> float:
        inner = CURVE_HEIGHT - 2 * CURVE_INSET
        return round(CURVE_INSET + inner * (1 - share(value, low, high)), 1)

    points = [(round(CURVE_INSET + step * i, 1), y(value)) for i, value in enumerate(values)]
    best = min(range(len(values)), key=lambda i: values[i])
    against = f", rounding to nearest {loss(rtn)}" if rtn is not None else ""
    return Curve(
        points=" ".join(f"{x},{y}" for x, y in points),
        line=None if rtn is None else y(rtn),
        best=points[best],
        low=loss(low),
        high=loss(high),
        title=f"loss from {loss(values[0])} to {loss(values[best])}{against}",
    )


def layer_error(layer: Layer) -> str:
    """7.0 dB, or from the worst to the best of several."""
    worst, best = layer.error, layer.best_error
    if worst is None or best is None:
        return ""
    if worst == best:
        return decibels(worst)
    return f"{decibels(worst, unit=False)} – {decibels(best)}"


def decibels(value: float, unit: bool = True) -> str:
    if math.isinf(value):
        return "exact"
    return f"{value:.1f} dB" if unit else f"{value:.1f}"


def loss(value: float) -> str:
    """Three digits, as the screen shows them."""
    return f"{value:#.3g}".rstrip(".")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def loss_change(block: Block) -> str:
    """-5.0 %, of what `Block.loss_saved` compares with."""
    return "" if block.loss_saved is None else change(1 - block.loss_saved, 1.0)
