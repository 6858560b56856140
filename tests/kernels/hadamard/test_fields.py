from itertools import combinations

import pytest
import torch

from lowbit.kernels.hadamard.fields import Field, field, prime_power

SIZES = [3, 5, 7, 9, 11, 25, 27, 49, 81, 243]


def triples(of: Field) -> list[torch.Tensor]:
    """All triples of a small field, 4000 of a large one."""
    q = of.size
    if q <= 11:
        return list(torch.cartesian_prod(*[torch.arange(q)] * 3).unbind(1))
    generator = torch.Generator().manual_seed(q)
    return list(torch.randint(0, q, (3, 4000), generator=generator))


@pytest.mark.parametrize("q", SIZES)
def test_axioms(q: int) -> None:
    f = field(q)
    a, b, c = triples(f)
    for operation in (f.add, f.multiply):
        assert torch.equal(operation(a, b), operation(b, a))
        assert torch.equal(operation(operation(a, b), c), operation(a, operation(b, c)))
    product = f.multiply(a, f.add(b, c))
    assert torch.equal(product, f.add(f.multiply(a, b), f.multiply(a, c)))
    assert torch.equal(f.add(f.subtract(a, b), b), a)
    every = torch.arange(q)
    zero, one = torch.zeros_like(every), torch.ones_like(every)
    assert torch.equal(f.add(every, zero), every) and torch.equal(f.multiply(every, one), every)


@pytest.mark.parametrize("q", SIZES)
def test_products_permute_the_nonzero_elements(q: int) -> None:
    nonzero = torch.arange(1, q)
    table = field(q).multiply(nonzero[:, None], nonzero)
    assert torch.equal(table.sort(dim=1).values, nonzero.expand(q - 1, -1))


@pytest.mark.parametrize("q", SIZES)
def test_character(q: int) -> None:
    f = field(q)
    character = f.character()
    every = torch.arange(q)
    squares = set(f.multiply(every, every).tolist()) - {0}
    assert {x for x in range(q) if character[x] == 1} == squares
    assert character[0] == 0 and int(character.sum()) == 0
    minus_one = f.subtract(torch.tensor(0), torch.tensor(1))
    assert character[minus_one] == (1 if q % 4 == 1 else -1)


def test_prime_fields_are_residues() -> None:
    a, b = torch.arange(13)[:, None], torch.arange(13)
    assert torch.equal(field(13).multiply(a, b), a * b % 13)
    assert torch.equal(field(13).subtract(a, b), (a - b) % 13)


def test_prime_powers() -> None:
    primes = [n for n in range(2, 300) if all(n % d for d in range(2, n))]
    powers = {p**k: (p, k) for p in primes for k in range(1, 9)}
    assert [prime_power(q) for q in range(-1, 300)] == [powers.get(q) for q in range(-1, 300)]
    assert all(powers[a] != powers[b] for a, b in combinations(list(powers)[:40], 2))


@pytest.mark.parametrize("q", [0, 1, 6, 12, 100])
def test_no_such_field(q: int) -> None:
    with pytest.raises(ValueError, match=f"q is {q}: allowed is a power of a prime"):
        field(q)
