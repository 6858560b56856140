"""Find the bits of a trellis code that are nearest to given weights: the Viterbi algorithm.

A sequence of weights is decoded from a ring of bits in steps, each of which reads `shift` new bits.
The state of step t is the number in the `state_bits` bits from bit t * shift on, low bits first. It
means `values` weights: weight t + v * steps is table[v, state].

The encoder walks from the last step to the first, so that a state has its new bits lowest. For all
states of step t with the same upper bits m, the state of step t + 1 was m + j * 2**(state_bits -
shift) with any j. To close the ring, a first walk that begins and ends in the middle of the
sequence, with any states, finds the bits that the first and the last step share; a second walk is
tied to them. Source: QTIP (arXiv 2406.11235), section 3 and algorithm 4.

Sums are of single numbers in a fixed order, so that `lowbit.kernels.native.viterbi` gives equal
bits. It takes a hundredth of the time of torch.
"""

import torch
from torch import Tensor

from lowbit.kernels.native import viterbi as native
from lowbit.kernels.native import why_not

COSTS_AT_ONCE = 2**20  # in one step of torch: 4 MiB each for costs and differences


def encode(target: Tensor, table: Tensor, shift: int) -> Tensor:
    """Returns the bits of each sequence.

    target: (sequences, weights) float32, in the unit of the table; NaN: any value will do.
    table: (values, 2**state_bits), the values of each state; `values` is 1 or 2.
    shift: bits of a step, less than state_bits.

    Returns (sequences, bytes) uint8; bit i of a sequence is bit i % 8 of its byte i // 8.
    """
    target, table = target.detach().float(), table.float()
    if native.SEQUENCE == target.shape[1] and target.device.type == "cpu" and why_not() is None:
        return native.encode(target, table, shift)
    at_once = max(1, COSTS_AT_ONCE // table.shape[1])
    return torch.cat([_Encoder(part, table, shift).encode() for part in target.split(at_once)])


class _Encoder:
    """Encodes some sequences at once; the arguments are those of `encode`."""

    def __init__(self, target: Tensor, table: Tensor, shift: int) -> None:
        values, self.states = table.shape
        self.table, self.shift = table, shift
        self.uppers = self.states >> shift
        self.steps = target.shape[1] // values
        self.target = target.view(len(target), values, self.steps)
        self.rows = torch.arange(len(target), device=target.device)

    def encode(self) -> Tensor:
        states = self._states(self._seam())
        bits = states.unsqueeze(-1) >> torch.arange(self.shift, device=states.device) & 1
        octets = bits.flatten(1).unflatten(1, (-1, 8)) << torch.arange(8, device=states.device)
        return octets.sum(-1).to(torch.uint8)

    def _seam(self) -> Tensor:
        """Returns the bits that the states of the first and the last step share: (sequences,)."""
        middle = self.steps // 2
        order = [t % self.steps for t in range(middle - 1, middle - 1 - self.steps, -1)]
        best = self.target.new_zeros(len(self.rows), self.uppers)
        cost, choices = self._walk(order, best)
        state = cost.argmin(1)
        for t in range(middle, self.steps):
            state = self._before(choices[t], state)
        return state & self.uppers - 1

    def _states(self, seam: Tensor) -> Tensor:
        """Returns the state of each step, given the seam: (sequences, steps) int64."""
        best = self.target.new_full((len(self.rows), self.uppers), torch.inf)
        best[self.rows, seam] = 0
        cost, choices = self._walk(range(self.steps - 1, -1, -1), best)
        ends = cost.view(len(cost), -1, self.uppers)[self.rows, :, seam]
        states = [seam + ends.argmin(1) * self.uppers]
        for t in range(self.steps - 1):
            states.append(self._before(choices[t], states[-1]))
        return torch.stack(states, 1)

    def _walk(self, order: "range | list[int]", best: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Walks through all steps.

        best: (sequences, uppers), the cost of each upper part before the first step.

        Returns the costs of the last step, and for each other step and upper part the j that was
        chosen, (sequences, uppers) uint8.
        """
        choices, cost = dict[int, Tensor](), best
        for number, t in enumerate(order):
            if number:
                best, choices[t] = self._least(cost)
            cost = (best.unsqueeze(-1) + self._distances(t)).flatten(1)
        return cost, choices

    def _least(self, cost: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the least cost of each upper part, and the first j that has it."""
        of_j = cost.view(len(cost), -1, self.uppers).unbind(1)
        best, choice = of_j[0], torch.zeros_like(of_j[0], dtype=torch.uint8)
        for j, other in enumerate(of_j[1:], 1):
            choice = choice.masked_fill_(other < best, j)
            best = torch.minimum(best, other)
        return best, choice

    def _distances(self, t: int) -> Tensor:
        """Returns the squared error of each state: (sequences, uppers, 2**shift)."""
        total: Tensor | None = None
        for values, target in zip(self.table, self.target[:, :, t].unbind(1), strict=True):
            difference = target.unsqueeze(1) - values
            squared = (difference * difference).masked_fill(target.isnan().unsqueeze(1), 0.0)
            total = squared if total is None else total + squared
        assert total is not None
        return total.unflatten(1, (self.uppers, -1))

    def _before(self, choices: Tensor, state: Tensor) -> Tensor:
        """Returns the state of step t + 1, given the choices and the state of step t."""
        upper = state >> self.shift
        return upper + choices[self.rows, upper].long() * self.uppers
