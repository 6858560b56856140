"""Every code gives the codeword of the original layout, which is computed in plain Python."""

import pytest
import torch
from quip_layout import STORED, all_d4, all_e8, all_e8p, words
from torch import Tensor

from lowbit.convert.quip_codes import LAYOUTS, our_codes
from lowbit.formats.lattice.codebooks import CODEBOOKS


def every_code(name: str) -> Tensor:
    """Every codeword of both stages occurs at least once."""
    if name == "D4":
        return torch.arange(256).view(4, 64).byte()
    if name == "HI":
        digits = torch.arange(16)
        return (digits[:, None] ^ digits << 4 | digits.flip(0) << 8).to(torch.int32)
    main = torch.arange(2**16)
    if name == "E8P12":
        return main.view(256, 256).to(torch.int16)
    if name == "E8P12RVQ4B":
        return (main << 16 | (main.flip(0) ^ 0x5A5A)).to(torch.int32).view(256, 256)
    rest = (main * 7 + (main >> 8)) % 256
    triples = torch.stack([rest, main & 255, main >> 8], 1).to(torch.uint8)
    return triples.view(256, 768).view(torch.int32)


@pytest.mark.parametrize("name", STORED)
def test_every_code_stands_for_the_same_word(name: str) -> None:
    assert len(all_e8p().unique(dim=0)) == 2**16
    assert len(all_e8().unique(dim=0)) == len(all_d4().unique(dim=0)) == 2**8
    stored, book = every_code(name), CODEBOOKS[name]
    assert stored.dtype == STORED[name][0]
    codes = our_codes(name, stored)
    assert codes.dtype == book.code_dtype
    assert torch.equal(book.decode(codes).flatten(1), words(name, stored, book.residual_scale or 0))


def test_bytes_and_nibbles_by_hand() -> None:
    stored = torch.tensor([[0x76543210, 0xFEDCBA98 - 2**32]], dtype=torch.int32)
    wanted = [0, 4, 1, 5, 2, 6, 3, 7]  # bits 0 to 3 hold element 0, bits 4 to 7 element 2
    assert our_codes("HI", stored).tolist() == [wanted + [v + 8 for v in wanted]]
    # 12 bytes: the residual, then the low and the high byte of the first code, four times
    stored = torch.tensor([[0x05_FF01_00, 0x0006_FF02, 0x04_0007_FF]], dtype=torch.int32)
    assert LAYOUTS["E8P12RVQ3B"].weights == 8 * 4
    triples = [(0x00, 0xFF01), (0x05, 0xFF02), (0x06, 0xFF00), (0x07, 0x0400)]
    found = CODEBOOKS["E8P12RVQ3B"].decode(our_codes("E8P12RVQ3B", stored))[0]
    ratio = torch.tensor(1 / 2.04)
    for word, (rest, main) in zip(found, triples, strict=True):
        assert torch.equal(word, all_e8p()[main] + ratio * all_e8()[rest])
