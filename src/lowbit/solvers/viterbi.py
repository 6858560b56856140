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
        free = target.isnan()
        # Whether a weight matters, 1 or 0: (sequences, values, steps); None: all do.
        self.matters = (~free).float().view(-1, values, self.steps) if bool(free.any()) else None
        self.target = target.masked_fill(free, 0).view(-1, values, self.steps)
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
        best = cost.view(len(cost), -1, self.uppers)
        choice = torch.zeros_like(best, dtype=torch.uint8)
        for level in range(self.shift):  # neighbours are compared, so that the first one wins ties
            (a, b), (first, second) = ((of_j[:, ::2], of_j[:, 1::2]) for of_j in (best, choice))
            less = b < a
            best = torch.minimum(a, b)
            choice = torch.where(less, second + 2**level, first) if level else less.byte()
        return best.squeeze(1), choice.squeeze(1)

    def _distances(self, t: int) -> Tensor:
        """Returns the squared error of each state: (sequences, uppers, 2**shift)."""
        squared = [self._squared(v, t) for v in range(len(self.table))]
        total = squared[0] if len(squared) == 1 else squared[0] + squared[1]
        return total.view(len(total), self.uppers, -1)

    def _squared(self, v: int, t: int) -> Tensor:
        """Returns the squared error of value v of each state: (sequences, states)."""
        values = self.table[v]
        if self.matters is not None:
            values = values * self.matters[:, v, t : t + 1]
        difference = self.target[:, v, t : t + 1] - values
        return difference.square_()

    def _before(self, choices: Tensor, state: Tensor) -> Tensor:
        """Returns the state of step t + 1, given the choices and the state of step t."""
        upper = state >> self.shift
        return upper + choices[self.rows, upper].long() * self.uppers
