"""A plan of widths for a folder that matquant made (Mix'n'Match in MatQuant, arXiv 2502.06786)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from lowbit.allocate.budget import budget_of, spent
from lowbit.allocate.knapsack import solve
from lowbit.allocate.pyramid import pyramid
from lowbit.allocate.sensitivity import sensitivity
from lowbit.allocate.units import Layout, layout_of
from lowbit.calibration import Calibration, token_windows
from lowbit.checkpoint import QuantizedFolder
from lowbit.checkpoint.writer import aside, explained
from lowbit.config import unknown_name
from lowbit.formats.widths import layers_with_widths
from lowbit.load import load_model, need_tokenizer
from lowbit.models.locate import locate

# Strategies, and the widths that each takes unless it is told others: the pyramid is the paper's.
STRATEGIES: dict[str, tuple[int, ...]] = {"pyramid": (8, 4, 2), "sensitivity": (8, 6, 4, 3, 2)}
TEXT = Calibration(samples=4)  # few windows rank the layers; each is run units x widths times
LONGEST_DEFAULT = 512  # tokens in a window; the predictions for one window are held

Progress = Callable[[int, int], None]  # runs of the model done, runs of


@dataclass(frozen=True)
class Mix:
    """plan: what `load`, `slice_folder` and `evaluate` take as bits. layers: how many at a width.

    linears: bits per weight of the quantized linears, scales and zeros counted. bytes: of the whole
    model's shards. predicted: KL(8-bit master || this) in nats a token, as the sum of what each
    unit costs alone; None: nothing was measured.
    """

    plan: dict[str, int]
    layers: dict[int, int]
    linears: float
    bytes: int
    predicted: float | None

    def write(self, path: Path) -> None:
        """As a YAML file."""
        with explained(path.parent), aside(path) as part:  # half a plan would be a plan too
            part.write_text(yaml.safe_dump(self.plan, sort_keys=False), encoding="utf-8")


def mix(  # noqa: PLR0913 (the options of a command)
    model: str | Path,
    budget: float | str,
    *,
    strategy: str = "sensitivity",
    widths: Sequence[int] | None = None,
    calibration: Calibration = TEXT,
    device_map: Any = None,
    trust_remote_code: bool = False,
    on_progress: Progress = lambda done, of: None,
) -> Mix:
    """Chooses a width for each layer of a MatQuant model, so that all together fit a budget.

    Layers that inference engines fuse get the same width.

    model: a folder that MatQuant made, or a hub id.
    budget: bits per weight of the linears, scales included (3.2), or the size of the whole model
        ("2.1GB"); it is never exceeded.
    strategy: "sensitivity": the widths with the least loss as measured on the calibration text.
        "pyramid": more bits for layers in the middle, without reading any text.
    widths: those allowed, from 2 to 8; None: 8, 6, 4, 3, 2, or 8, 4, 2 for a pyramid.
    calibration: the text to measure on; a seqlen of None means 512 tokens here.
    device_map: where the model is loaded, as transformers takes it; None: on the CPU.
    trust_remote_code: whether Python code that comes with the model may be run.
    on_progress: called with the runs of the model that are done, and their number in all.

    Raises ValueError, before anything is measured, for a budget below the smallest possible, which
    the message states.
    """
    folder, budget = locate(model, trust_remote_code), str(budget)
    if strategy not in STRATEGIES:
        raise ValueError(unknown_name(strategy, STRATEGIES, "strategy"))
    allowed = _checked(widths or STRATEGIES[strategy])
    quantized = QuantizedFolder(folder)
    quantized.verify(hashes=False)
    spend = budget_of(quantized, budget)
    layout = layout_of(quantized, allowed, trust_remote_code)
    spend.check(spent(layout.units, [min(allowed)] * len(layout.units)))
    predicted = None
    if strategy == "pyramid":
        chosen = pyramid(layout, allowed, spend.allowed())
    else:
        found = _measure(
            folder, layout, allowed, calibration, device_map, trust_remote_code, on_progress
        )
        losses = found.tolist()
        costs = [[unit.bytes[width] for width in allowed] for unit in layout.units]
        picks = solve(costs, losses, spend.allowed())
        chosen = [allowed[pick] for pick in picks]
        predicted = sum(row[pick] for row, pick in zip(losses, picks, strict=True))
    taken = spent(layout.units, chosen)
    pairs = list(zip(layout.units, chosen, strict=True))
    return Mix(
        plan={pattern: width for unit, width in pairs for pattern in unit.patterns},
        layers={w: sum(len(u.layers) for u, chose in pairs if chose == w) for w in allowed},
        linears=spend.bits(taken),
        bytes=spend.bytes(taken),
        predicted=predicted,
    )


def _checked(widths: Sequence[int]) -> tuple[int, ...]:
    if not widths or not all(2 <= width <= 8 for width in widths):
        raise ValueError(f"widths is {list(widths)}: allowed are 2 to 8")
    return tuple(sorted(set(widths), reverse=True))


def _measure(
    folder: Path,
    layout: Layout,
    widths: tuple[int, ...],
    calibration: Calibration,
    device_map: Any,
    trust_remote_code: bool,
    progress: Progress,
) -> Tensor:
    """The divergences of all units at all widths, (units, widths) float64."""
    tokenizer = need_tokenizer(folder, trust_remote_code)
    model = load_model(folder, device_map, trust_remote_code=trust_remote_code)
    context = getattr(model.config, "max_position_embeddings", None)
    if calibration.seqlen is None:
        shorter = min(LONGEST_DEFAULT, context or LONGEST_DEFAULT)
        calibration = calibration.model_copy(update={"seqlen": shorter})
    windows = token_windows(calibration, tokenizer, context).tokens
    layers = layers_with_widths(model)
    units = [[layers[name] for name in unit.layers] for unit in layout.units]
    return sensitivity(model, units, widths, list(windows), progress)
