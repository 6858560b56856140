"""Turns numbers into coordinates: grids of layers and blocks, bars per block, loss curves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowbit.quantities import change, duration, size
from lowbit.report.layers import NUMBER, Layer
from lowbit.report.run import Block, Run

CURVE_WIDTH, CURVE_HEIGHT, CURVE_INSET = 320.0, 96.0, 6.0  # in units of the SVG's viewBox
MOST_WITH_TEXT = 12  # most blocks for which a number fits into a cell
LIGHT_TEXT = 0.7  # shade above which a cell's text has the color of the page's background


@dataclass(frozen=True)
class Scale:
    """How a grid shades values.

    least: smallest range of values that all shades cover, so that small differences look small.
    sign: 1 if the largest value has the strongest shade, -1 if the smallest has it.
    unit: the unit of the values.
    digits: number of decimals that are shown.
    """

    least: float
    sign: int
    unit: str
    digits: int

    def text(self, value: float) -> str:
        """Formats a value; infinite decibels are an exact copy."""
        return "exact" if math.isinf(value) else f"{value:.{self.digits}f}"


DECIBELS = Scale(6.0, -1, "dB", 1)  # one bit more gives 6 dB more
BITS = Scale(1.0, 1, "bits", 2)


@dataclass(frozen=True)
class Cell:
    """One layer of one block.

    shade: how dark the cell is, from 0 to 1.
    text: the value, as shown.
    title: name, value and bits, shown when the mouse is over the cell.
    flagged: whether a fallback was used for the layer or its block.
    """

    shade: float
    text: str
    title: str
    flagged: bool

    @property
    def strong(self) -> bool:
        """Whether the shade is too dark for dark text."""
        return self.shade > LIGHT_TEXT


@dataclass(frozen=True)
class GridRow:
    """One layer in all blocks.

    name: the name of the layer.
    cells: one for each block; None: this block has no such layer.
    span: lowest and highest value of the row.
    """

    name: str
    cells: list[Cell | None]
    span: str


@dataclass(frozen=True)
class Grid:
    """A grid of layers and blocks.

    rows: one for each layer.
    legend: the values of the weakest and of the strongest shade.
    with_text: whether cells show their values.
    """

    rows: list[GridRow]
    legend: tuple[str, ...]
    with_text: bool


@dataclass(frozen=True)
class Bar:
    """The bar of one block.

    share: length as a share of the longest bar, from 0 to 1.
    title: block and value.
    """

    share: float
    title: str


@dataclass(frozen=True)
class Bars:
    """A bar chart.

    name: what the chart shows.
    bars: one for each block; None: the value of this block is unknown.
    top: the value of the longest bar.
    """

    name: str
    bars: list[Bar | None]
    top: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The loss over epochs.

    points: coordinates of an SVG polyline.
    line: y of the loss of rounding to nearest; None: that loss is unknown.
    best: x and y of the epoch whose values were kept.
    low, high: least and greatest loss.
    title: the curve in words.
    """

    points: str
    line: float | None
    best: tuple[float, float] | None
    low: str
    high: str
    title: str


def error_grid(blocks: Sequence[Block]) -> Grid | None:
    """Returns the grid of the worst signal-to-noise ratios; None if none is known."""

    def title(layer: Layer) -> str:
        return f"{layer_error(layer)}, {layer.bits:.2f} bits"

    return _grid(blocks, lambda layer: layer.error, title, DECIBELS)


def bits_grid(blocks: Sequence[Block]) -> Grid | None:
    """Returns the grid of real bits per weight; None if all layers have the same."""
    different = {f"{layer.bits:.2f}" for block in blocks for layer in block.layers}
    if len(different) < 2:
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
    """Returns a grid; None if no layer has a finite value.

    value: a function that returns the value of a layer; None: unknown.
    title: a function that returns the title of a layer's cell.
    scale: how values are shaded.
    """
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
        described = f"{block.name}.{layer.name}: {title(layer)}"
        flagged = bool(block.fallback or layer.fallbacks)
        return Cell(share(scale.sign * v, low, high), scale.text(v), described, flagged)

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
    """Returns the position of a value between low (0) and high (1); 0 if both are equal."""
    if high <= low:
        return 0.0
    return round(min(1.0, max(0.0, (value - low) / (high - low))), 3)


def block_bars(run: Run) -> list[Bars]:
    """Returns charts of loss, time and memory, without those whose values are unknown."""
    charts = [
        _bars(
            f"loss saved against {run.loss_reference}", run.blocks, lambda b: b.loss_saved, _percent
        ),
        _bars("time", run.blocks, lambda b: b.history.seconds, duration),
        _bars("peak memory", run.blocks, lambda b: b.history.memory, size),
        _bars("peak memory of the GPU", run.blocks, lambda b: b.history.device_memory, size),
    ]
    return [bars for bars in charts if bars is not None]


def _bars(
    name: str,
    blocks: Sequence[Block],
    value: Callable[[Block], float | None],
    text: Callable[[float], str],
) -> Bars | None:
    """Returns a bar chart; None if no block has a value above 0."""
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
    """Returns the curve of a block's loss; None if it has fewer than two points."""
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
    """Formats the signal-to-noise ratio: "7.0 dB", or from the worst to the best linear."""
    worst, best = layer.error, layer.best_error
    if worst is None or best is None:
        return ""
    if worst == best:
        return decibels(worst)
    return f"{decibels(worst, unit=False)} – {decibels(best)}"


def decibels(value: float, unit: bool = True) -> str:
    """Formats a signal-to-noise ratio: "7.0 dB"; "exact" if it is infinite."""
    if math.isinf(value):
        return "exact"
    return f"{value:.1f} dB" if unit else f"{value:.1f}"


def loss(value: float) -> str:
    """Formats a loss with three digits, as on the screen."""
    return f"{value:#.3g}".rstrip(".")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def loss_change(block: Block) -> str:
    """Formats the change of a block's loss: "-5.0 %"; see `Block.loss_saved`."""
    return "" if block.loss_saved is None else change(1 - block.loss_saved, 1.0)
