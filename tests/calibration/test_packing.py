"""Windows do not overlap, and an EOS separates documents."""

from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
from torch import Tensor
from transformers import AutoTokenizer

from lowbit.calibration import packing
from lowbit.calibration.packing import packed_windows
from lowbit.calibration.sources import Corpus

TOKENIZER = AutoTokenizer.from_pretrained(quantized.source())
END = 93


class Ending:
    """A tokenizer that has an EOS."""

    eos_token_id = END

    def __call__(self, text: str, **options: Any) -> Any:
        return TOKENIZER(text, **options)


@pytest.fixture
def row(tmp_path: Path) -> tuple[str, Tensor]:
    """A text in which no sequence of eight tokens occurs twice."""
    path = tmp_path / "row.txt"
    text = "".join(chr(33 + i) + chr(33 + (i * j) % 90) for j in range(1, 4) for i in range(90))
    path.write_text(text)
    return str(path), torch.tensor(TOKENIZER(text)["input_ids"])


def test_no_token_of_a_text_is_in_two_windows(row: tuple[str, Tensor]) -> None:
    name, tokens = row
    assert len(tokens) == 540
    windows = packed_windows([name], 67, 8, TOKENIZER, 0)  # all of it, but for the end
    cut = tokens[:536].view(67, 8)
    assert windows.shape == (67, 8) and not torch.equal(windows, cut)
    assert sorted(windows.tolist()) == sorted(cut.tolist())
    few = packed_windows([name], 20, 8, TOKENIZER, 0).tolist()
    assert len({*map(tuple, few)}) == 20 and all(window in cut.tolist() for window in few)
    assert few == packed_windows([name], 20, 8, TOKENIZER, 0).tolist()
    assert few != packed_windows([name], 20, 8, TOKENIZER, 1).tolist()


def test_documents_shorter_than_a_window_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [chr(33 + i) * 3 for i in range(30)]
    corpus = Corpus("c4", documents, windows_in_rows=True)
    monkeypatch.setattr(packing, "calibration_corpus", lambda name: corpus)
    windows = packed_windows(["c4"], 6, 20, Ending(), 0)
    found = windows.flatten().tolist()
    assert len(found) == 120 and found.count(END) == 30
    assert sorted(found) == sorted([i for i in range(30) for _ in range(3)] + 30 * [END])
    # Behind each of a document's tokens, one of its own or the end.
    pairs = [
        (a, b) for window in windows.tolist() for a, b in zip(window, window[1:], strict=False)
    ]
    assert all(b in (a, END) for a, b in pairs if a != END)


def test_sources_give_by_weight(row: tuple[str, Tensor], tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("~" * 100)
    windows = packed_windows([f"{row[0]}=3", str(other)], 8, 8, TOKENIZER, 0)
    of_other = windows.eq(ord("~") - 33).all(1)
    assert int(of_other.sum()) == 2


def test_too_little_text_is_an_error(row: tuple[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"has 540 tokens: 68 different windows of 8 need 544"):
        packed_windows([row[0]], 68, 8, TOKENIZER, 0)
