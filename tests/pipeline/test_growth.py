"""How counts and bytes grow from miniatures: exact for what grows as it is assumed to."""

from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from lowbit.pipeline.growth import POWERS, SLOWEST, Growth
from lowbit.pipeline.meters import KINDS, LAUNCHES, OPERATIONS, VALUES

RATES = numpy.array([1e-6, 1e-9, 2e-9, 1e-11, 1e-12])


def growth(**fields: Any) -> Growth:
    """Dry runs are here the parts that are taken out of them."""
    defaults: dict[str, Any] = {
        "divisor": 8,
        "more_experts": 0.0,
        "rates": RATES,
        "more": None,
        "measured_short": 0.0,
    }
    return Growth(**defaults | fields)


def at(length: float, first: float = 3.0, second: float = 5.0) -> Any:
    """Counts of a length, each a sum of its two powers."""
    return numpy.array([first * length**p + second * length ** (p + 1) for p in POWERS.values()])


def test_counts_are_those_of_the_model() -> None:
    made = growth(short=at(1), long=at(2), measured=0.0)
    assert numpy.allclose(made.counts(lambda run: run), at(16))


@pytest.mark.parametrize(("first", "second"), [(0.0, 5.0), (3.0, 0.0)], ids=["high", "low"])
def test_one_power_alone(first: float, second: float) -> None:
    made = growth(short=at(1, first, second), long=at(2, first, second), measured=0.0)
    assert numpy.allclose(made.counts(lambda run: run), at(16, first, second))


def test_amounts_grow_as_lengths_and_areas() -> None:
    made = growth(short=3.0 + 5, long=6.0 + 20, measured=0.0)
    assert made.amount(lambda run: run) == pytest.approx(3 * 16 + 5 * 16**2)


def test_experts_are_added() -> None:
    made = growth(short=at(1), long=at(2), more=1.5 * at(2), more_experts=30.0, measured=0.0)
    assert numpy.allclose(made.counts(lambda run: run), at(16) * (1 + 30 * 0.5))


# What the shorter and the longer miniature took beyond their counts, and what that is of the model.
CALLS = [each[LAUNCHES] for each in (at(1), at(2), at(16))]
AREAS = [each[VALUES] + each[2] for each in (at(1), at(2), at(16))]
BEYOND = {
    "calls": (CALLS, 1e-3),
    "values": (AREAS, 1e-8),
    "both": ([1e-3 * c + 1e-8 * a for c, a in zip(CALLS, AREAS, strict=True)], 1.0),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_counts_do_not_say_grows_with_calls_and_values(name: str) -> None:
    grows, times = BEYOND[name]
    rest = [times * amount for amount in grows]
    taken = [float(RATES @ at(s)) + more for s, more in zip((1, 2), rest, strict=False)]
    made = growth(short=at(1), long=at(2), measured=taken[1], measured_short=taken[0])
    assert made.seconds(lambda run: run) == pytest.approx(float(RATES @ at(16)) + rest[2])


def test_a_busy_machine_does_not_make_years_of_it() -> None:
    """What a miniature waited for others would be taken for the time of values, which grow most."""
    taken = float(RATES @ at(2)) + 1.0
    made = growth(short=at(1), long=at(2), measured=taken, measured_short=float(RATES @ at(1)))
    most = float(RATES @ at(16)) + SLOWEST * RATES[2] * AREAS[2] + CALLS[2] / CALLS[1]
    assert float(RATES @ at(16)) < made.seconds(lambda run: run) <= most


@pytest.mark.parametrize(("constant", "short"), [(0, 1), (0, 10**4), (10**9, 8452)])
def test_memory_that_does_not_grow_never_hides_what_does(constant: int, short: int) -> None:
    def held(length: int) -> Any:
        return SimpleNamespace(memory=max(constant, 5 * length**2), lengths=3 * length)

    made = growth(short=held(short), long=held(2 * short), measured=0.0)
    size = 16 * short
    assert made.memory(lambda run: run) == pytest.approx(5 * size**2 + 3 * size)


def test_a_faster_miniature_is_faster_in_proportion() -> None:
    made = growth(short=at(1), long=at(2), measured=0.5 * float(RATES @ at(2)))
    assert made.seconds(lambda run: run) == pytest.approx(0.5 * float(RATES @ at(16)))


def test_a_part_that_is_missing_takes_nothing() -> None:
    made = growth(short=0.0, long=0.0, measured=0.0)
    assert made.seconds(lambda run: run) == 0 and not made.counts(lambda run: run).any()


def test_every_kind_of_count_has_a_power() -> None:
    assert sorted(POWERS) == list(range(KINDS))
    assert POWERS[LAUNCHES] < POWERS[VALUES] < POWERS[OPERATIONS]
