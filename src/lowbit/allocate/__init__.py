"""Chooses the width of each layer of a MatQuant model, so that the model fits a budget.

units.py finds the layers that must share a width, and how many bytes each width takes. budget.py
computes how many bytes may be spent. pyramid.py is one way to spend them; sensitivity.py with
knapsack.py is another. mix.py is the public function.
"""

from lowbit.allocate.mix import STRATEGIES, Mix, mix

__all__ = ["STRATEGIES", "Mix", "mix"]
