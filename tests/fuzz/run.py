"""Fuzzes all targets in turn until the time is over: make fuzz [SECONDS=600] [SEED=0]

Each failure is shrunk to a small example and printed; the exit status is then 1. The same seed
tries the same examples in the same order.
"""

import argparse
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, for what the tests share

from fuzz.targets import TARGETS
from hypothesis import HealthCheck, Phase, given, seed, settings

from lowbit.models.quiet import quiet

ROUND = 10  # examples of a target before the next one's turn


def try_round(name: str, number: int, examples: int = ROUND) -> None:
    """Runs a target on examples that depend on the number alone; raises what fails."""
    target, strategies = TARGETS[name]
    test = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )(seed(number)(given(**strategies)(target)))
    test()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, nargs="+", default=list(TARGETS))
    args = parser.parse_args()
    quiet()
    stop, number, failures = time.monotonic() + args.seconds, 0, 0
    rounds = dict.fromkeys(args.only, 0)
    while time.monotonic() < stop:
        name = args.only[number % len(args.only)]
        try:
            try_round(name, args.seed + number)
        except Exception:
            failures += 1
            print(f"{name} fails, round {args.seed + number}:", flush=True)
            traceback.print_exc(file=sys.stdout)
        rounds[name] += 1
        number += 1
    print(", ".join(f"{name}: {ROUND * count} examples" for name, count in rounds.items()))
    print(f"{failures} rounds failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
