"""What a method gets: random numbers of a linear's own."""

from dataclasses import replace

import torch
import zoo


def test_random_numbers_depend_on_seed_block_and_linear_alone() -> None:
    """So linears can be quantized in any order, and a run can go on anywhere."""
    task = zoo.task("llama")

    def drawn(seed: int, block: str, linear: str) -> int:
        generator = replace(task, seed=seed, name=block).generator(linear)
        return int(torch.randint(2**62, (), generator=generator))

    places = [(s, b, n) for s in (0, 1) for b in ("h.0", "h.1", "h.10") for n in ("up", "down")]
    first = [drawn(*place) for place in places]
    assert len(set(first)) == len(places)
    assert [drawn(*place) for place in reversed(places)] == first[::-1]
