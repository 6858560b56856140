"""Is one 8-bit master as good at every width as a model that was made for that width?

    python benchmarks/matquant.py [--models DIR ...] [--seeds 0 1 2] [--limit N] [--only NAME]
        [--rates]

Slices of MatQuant at 8, 6, 4, 3 and 2 bits are compared with slices of a plain int8 model, and with
OmniQuant models made for each width. All have the same windows, epochs, tokens, grids and initial
values. Calibration windows are drawn with three seeds, and the table shows mean and standard
deviation. --rates measures MatQuant's learning rates on other calibration windows instead, without
any evaluation text.
"""

import argparse
import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import torch
from results import append, rows_of
from rich.console import Console
from rich.table import Table
from runs import CALIBRATION, EPOCHS, SEQLEN, STORIES, arguments, calibration, models_of

import lowbit
from lowbit.calibration import evaluation_text
from lowbit.eval import perplexity
from lowbit.formats.base import QuantizedLinear
from lowbit.formats.nested import NestedLinear
from lowbit.methods import GPTQ, MatQuant, Method, OmniQuant
from lowbit.models import family_name

WIDTHS = (8, 6, 4, 3, 2)
RATES = (1e-3, 5e-3, 1e-2, 3e-2)  # of the clips; the first is the paper's
TRAINED = {"epochs": EPOCHS}
PAPER = {"widths": [8, 4, 2], "weights": [0.1, 0.1, 1.0]}
Args = argparse.Namespace


def masters(family: str) -> dict[str, Method]:
    """Returns the methods whose result is cut into slices."""
    learned = MatQuant(**TRAINED, let=family == "opt")
    untrained = {"lwc": False, "let": False, "epochs": 0}
    return {
        "sliced int8": MatQuant(**untrained, rounding="nearest"),
        "matquant default": learned,
        "matquant": learned.model_copy(update={"rounding": "nearest"} | PAPER),
        "matquant joint": learned.model_copy(update=PAPER),
        "matquant extra precision": learned.model_copy(
            update=PAPER
            | {"rounding": "nearest", "extra_precision": True, "weights": [1.0, 1.0, 1.0]}
        ),
        "matquant single precision": learned.model_copy(
            update={"rounding": "nearest", "widths": [2], "weights": [1.0]}
        ),
        "matquant distilled 8->2": learned.model_copy(
            update=PAPER | {"rounding": "nearest", "distill": ["8->2"]}
        ),
        "joint, no training": MatQuant(**untrained, **PAPER),
        "default, no training": MatQuant(**untrained),
    }


def direct(family: str, bits: int) -> dict[str, Method]:
    """Returns the methods for one width; those with GPTQ are compared with joint rounding."""
    learned = OmniQuant(
        bits=bits, **TRAINED, let=family == "opt", rounding="nearest", fine_zeros=False
    )
    if bits > 4:
        return {"omniquant": learned}
    fed_back = learned.model_copy(update={"rounding": "gptq"})
    return {
        "omniquant": learned,
        "omniquant+gptq": fed_back,
        "gptq": GPTQ(bits=bits, fine_zeros=False),
    }


def measure(
    label: str, model: Path, case: tuple[str, Method, tuple[int, ...]], seed: int, args: Args
) -> None:
    """Quantizes a model, and appends a row to results.csv for each width.

    case: name of the method, the method, and the widths to measure.
    seed: of the calibration windows.
    """
    name, method, widths = case
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        lowbit.quantize(model, folder, method, calibration(seed=seed))
        seconds = time.perf_counter() - started
        made, tokenizer = lowbit.load(folder)
    tokens = evaluation_text(str(STORIES), tokenizer, SEQLEN)
    for width in widths:
        if isinstance(method, MatQuant):
            lowbit.set_bits(made, width)
        found = perplexity(made, tokens, SEQLEN, args.limit)
        where = f"{label} | {name} | {width} bits | seed {seed}"
        notes = (
            f"{real_bits(made):.3f} bits linears, context {SEQLEN}, {found.windows} windows, "
            f"{seconds:.1f} s"
        )
        row = {"case": where, "metric": "perplexity", "value": f"{found.value:.4f}", "unit": ""}
        append("matquant", [row | {"notes": notes}])
        print(where, f"{found.value:.3f}", flush=True)


def show(label: str) -> Table:
    """Returns a model's table from results.csv: mean and deviation over seeds, and real bits."""
    found: dict[tuple[str, str], dict[str, tuple[float, float]]] = defaultdict(dict)
    for row in rows_of("matquant"):  # later rows replace earlier ones
        model, name, width, seed = row["case"].split(" | ")
        if model == label:
            found[name, width][seed] = float(row["value"]), float(row["notes"].split()[0])
    table = Table(label, *(f"{width} bits" for width in WIDTHS))
    for name in dict.fromkeys(name for name, _ in found):
        cells = [list(found.get((name, f"{width} bits"), {}).values()) for width in WIDTHS]
        table.add_row(name, *map(_mean_and_deviation, cells))
    return table


def _mean_and_deviation(found: list[tuple[float, float]]) -> str:
    values = [value for value, _ in found]
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread} ({found[-1][1]:.2f})" if found else ""


def real_bits(model: torch.nn.Module) -> float:
    """Returns the bits per weight of the linears, as if they were stored at their widths."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    stored = sum(
        (m.slice(m.bits) if isinstance(m, NestedLinear) and m.bits < 8 else m).weight_bytes()
        for m in layers
    )
    return 8 * stored / sum(m.in_features * m.out_features for m in layers)


def measure_rates(label: str, model: Path) -> None:
    """Measures learning rates on windows that are used neither for training nor evaluation."""
    method = masters(family_name(model))["matquant"]
    for rate in RATES:
        with tempfile.TemporaryDirectory() as folder:
            changed = method.model_copy(update={"lwc_lr": rate})
            lowbit.quantize(model, folder, changed, calibration(seed=0))
            made, tokenizer = lowbit.load(folder)
        tokens = evaluation_text(str(CALIBRATION), tokenizer, SEQLEN)
        for width in WIDTHS:
            lowbit.set_bits(made, width)
            value = perplexity(made, tokens[-64 * SEQLEN :], SEQLEN).value
            case = f"{label} | lwc_lr {rate} | {width} bits | calibration text"
            row = {"case": case, "metric": "perplexity", "value": f"{value:.4f}", "unit": ""}
            append("matquant rates", [row])
            print(case, f"{value:.3f}", flush=True)


def run(label: str, model: Path, args: Args) -> None:
    family = family_name(model)
    cases = [(name, method, WIDTHS) for name, method in masters(family).items()]
    for width in WIDTHS:
        cases += [(name, method, (width,)) for name, method in direct(family, width).items()]
    for seed in args.seeds:
        for case in cases:
            if re.search(args.only, case[0]):
                measure(label, model, case, seed, args)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of calibration windows"
    )
    parser.add_argument("--rates", action="store_true", help="measure learning rates instead")
    args = parser.parse_args()
    for label, model in models_of(args).items():
        if args.rates:
            measure_rates(label, model)
        else:
            run(label, model, args)
            Console(width=140).print(show(label))


if __name__ == "__main__":
    main()
