"""Which width each layer of a folder that matquant made should run at, for a budget.

units.py tells which layers must share a width and what each width takes, budget.py what there is to
spend; pyramid.py and sensitivity.py with knapsack.py spend it; mix.py puts them together.
"""

from lowbit.allocate.mix import STRATEGIES, Mix, mix

__all__ = ["STRATEGIES", "Mix", "mix"]
