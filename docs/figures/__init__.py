"""The drawings of the site: functions that return SVG, by name."""

from collections.abc import Callable

from figures.below_two_bits import ptq161
from figures.feedback import gptq
from figures.grids import omniquant, rtn
from figures.rooms import rooms
from figures.rotation import quip, trellis
from figures.slices import matquant
from figures.sorting import mixedquant

FIGURES: dict[str, Callable[[], str]] = {
    "gptq": gptq,
    "matquant": matquant,
    "mixedquant": mixedquant,
    "omniquant": omniquant,
    "ptq161": ptq161,
    "quip": quip,
    "rooms": rooms,
    "rtn": rtn,
    "trellis": trellis,
}
