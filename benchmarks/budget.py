"""What does it gain to choose the width of each linear by measurement, at equal real bits?

    python benchmarks/budget.py [--models DIR ...] [--limit N] [--only NAME] [--seeds N]

For each budget there are two models of the same bits. "uniform" spreads two widths evenly over the
depth of the model: from the first unit to the last (units are linears that share a width), each
gets the wider one whenever the bits so far stay within the budget. "mixed" gets its widths from
`lowbit.mix`, within the real bits of the uniform model. Grids are also measured at one width with
smaller groups, which is the usual way to spend a fraction of a bit. Perplexity and KL divergence
from the float model are measured on held-back stories.
"""

import re
import tempfile
import time
from pathlib import Path

from runs import CALIBRATION, SEQLEN, Rows, arguments, calibration, models_of

import lowbit
from lowbit.checkpoint.output import size_of
from lowbit.methods import GPTQ, RTN, Method, QuIP, Trellis
from lowbit.pipeline.allocation import methods_at, units_of
from lowbit.pipeline.job import Job
from lowbit.pipeline.options import RunOptions

BUDGETS = (2.25, 2.5, 3.25)
# For each method: the narrower and the wider of the uniform model's two widths, by budget.
PAIRS: dict[str, tuple[Method, dict[float, tuple[float, float]]]] = {
    "trellis": (Trellis(), {2.25: (2, 2.5), 2.5: (2.5, 2.5), 3.25: (3, 4)}),
    "gptq g128": (GPTQ(group_size=128), dict.fromkeys((2.25, 2.5), (2, 3)) | {3.25: (3, 4)}),
    "rtn g128": (RTN(group_size=128), dict.fromkeys((2.25, 2.5), (2, 3)) | {3.25: (3, 4)}),
    "quip": (QuIP(), dict.fromkeys((2.25, 2.5), (2, 3)) | {3.25: (3, 4)}),
}
# One width, with groups of so many inputs: at least the bits of the budget.
GROUPS = {2.25: (2, 64), 2.5: (2, 32), 3.25: (3, 64)}


def text(seed: int) -> lowbit.Calibration:
    """Returns the text on which losses are measured: stories that are in no evaluation text."""
    return lowbit.Calibration(sources=(str(CALIBRATION),), samples=4, seqlen=SEQLEN, seed=seed)


def uniform(model: Path, method: Method, budget: float, pair: tuple[float, float]) -> Method:
    """Returns the method with two widths that are spread evenly over the depth of the model."""
    job = Job(model, method, None, RunOptions(device="cpu"))
    low, high = pair
    units = units_of(job, methods_at(method, sorted(set(pair))))
    weights = [sum(_weights(job, name) for name in unit.layers) for unit in units]
    fields = method.width_fields()
    if low == high:
        return method.with_fields(fields[low])
    overrides, spent, seen = {}, 0.0, 0
    whole = sum(weights)
    room = budget / 8 * whole - sum(unit.bytes[low] for unit in units)
    for unit, count in zip(units, weights, strict=True):
        seen += count
        more = unit.bytes[high] - unit.bytes[low]
        if spent + more <= room * seen / whole:
            spent += more
            overrides |= dict.fromkeys(unit.patterns, fields[high])
    return method.with_fields({**fields[low], "overrides": overrides})


def _weights(job: Job, name: str) -> int:
    return job.source.skeleton.get_parameter(f"{name}.weight").numel()


def compare(rows: Rows, label: str, model: Path, name: str, budget: float, seed: int) -> None:
    """Measures the uniform and the mixed model of one budget."""
    method, pairs = PAIRS[name]
    suffix = f"{name}, {budget:g} bits" + (f", draw {seed}" if seed else "")
    with tempfile.TemporaryDirectory() as place:
        plain, mixed = Path(place) / "uniform", Path(place) / "mixed"
        started = time.perf_counter()
        spread = uniform(model, method, budget, pairs[budget])
        lowbit.quantize(model, plain, spread, calibration(seed=seed))
        seconds = time.perf_counter() - started
        rows.record(label, f"{suffix}, uniform", plain, seconds, reference=model)
        bits = size_of(plain).linears + 1e-9  # of the comparison: not more than these
        started = time.perf_counter()
        found = lowbit.mix(model, f"{bits:.9f}", method, calibration=text(seed), device="cpu")
        measured = time.perf_counter() - started
        found.write(Path(place) / "plan.yaml")
        plan = {"plan": Path(place) / "plan.yaml"}
        lowbit.quantize(model, mixed, method, calibration(seed=seed), **plan)
        seconds = time.perf_counter() - started
        print(f"{label} | {suffix}: widths measured in {measured:.1f} s", flush=True)
        rows.record(label, f"{suffix}, mixed", mixed, seconds, reference=model)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="draws of calibration text")
    args = parser.parse_args()
    rows = Rows("budget", args)
    for label, model in models_of(args).items():
        for name, (method, _) in PAIRS.items():
            if not re.search(args.only, name):
                continue
            for budget in BUDGETS:
                for seed in range(args.seeds):
                    compare(rows, label, model, name, budget, seed)
                if name.endswith("g128"):
                    bits, group = GROUPS[budget]
                    other = method.with_fields({"bits": bits, "group_size": group})
                    case = f"{method.name} g{group}, {budget:g} bits, one width"
                    rows.quantize(label, model, case, other, reference=model)


if __name__ == "__main__":
    main()
