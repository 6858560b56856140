from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lowbit.checkpoint import ranges
from lowbit.checkpoint.ranges import MOST_NAMES, collapse, expand

# Numbers that int() would not print so, and parts that only look like numbers, among them.
PARTS = ["layers", "*", "", "0", "1", "2", "3", "10", "07", "x1", "1x", "-1", "²", "٣", "9" * 12]
NAMES = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join)
ENTRIES = st.sampled_from([{"bits": 4}, {"bits": 2}, {"bits": 4, "more": [1]}])


@given(st.dictionaries(NAMES, ENTRIES, max_size=30))
@example({"h.0.07": {}, "h.1.07": {}})
@example({"h.9999999999": {}, "h.9999999998": {}})
@example({"h.*": {}, "h.0": {}, "h.1": {}})
def test_expand_undoes_collapse(entries: dict) -> None:
    assert expand(collapse(entries)) == entries


def test_whole_ranges_become_one_name() -> None:
    numbers = product(range(3, 12), range(8), (1, 2))
    names = [f"model.layers.{i}.experts.{j}.w{k}" for i, j, k in numbers]
    entries = dict.fromkeys(names, {"bits": 4}) | {"lm_head": {"bits": 8}}
    assert collapse(entries) == {
        "model.layers.{3-11}.experts.{0-7}.w1": {"bits": 4},
        "model.layers.{3-11}.experts.{0-7}.w2": {"bits": 4},
        "lm_head": {"bits": 8},
    }
    assert expand(collapse(entries)) == entries


@pytest.mark.parametrize("spoilt", ["a hole", "another entry"])
def test_what_is_not_whole_is_spelt_out(spoilt: str) -> None:
    entries = {f"layers.{i}.q": {"bits": 4} for i in range(5)}
    if spoilt == "a hole":
        del entries["layers.2.q"]
    else:
        entries["layers.2.q"] = {"bits": 3}
    assert collapse(entries) == entries == expand(entries)


HOSTILE = {
    "layers.{5-4}.q": "names 0 layers; allowed are 1 to",
    f"layers.{{0-{MOST_NAMES}}}.q": f"names {MOST_NAMES + 1} layers",
    "{0-99999}.{0-99999}.{0-99999}": "names 1000000000000000 layers",
    "{0-999999999}" * 40: "layers; allowed are",
    "layers.{0-3}.q": "'layers.2.q' is named twice",
}


@pytest.mark.parametrize("pattern", HOSTILE)
def test_hostile_ranges(pattern: str) -> None:
    with pytest.raises(ValueError, match=HOSTILE[pattern]):
        expand({"layers.2.q": {}, pattern: {}})


def test_ranges_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "MOST_NAMES", 100)
    assert len(expand({"a.{1-98}": {}, "b.{0-1}": {}})) == 100
    with pytest.raises(ValueError, match="names 2 layers; allowed are 1 to 100 in all"):
        expand({"a.{1-99}": {}, "b.{0-1}": {}})


@pytest.mark.parametrize("name", ["a{b}.0", "{}", "{0}", "a{0-1", "{0-1}{", "{0-1}{b.c}", "{-1-2}"])
def test_other_braces_mean_nothing(name: str) -> None:
    assert set(expand({name: {}})) == {name.replace("{0-1}", n) for n in "01"}


def test_what_layers_share_is_named_once_too() -> None:
    names = [f"model.layers.{i}.experts.{j}" for i in range(3) for j in range(2)]
    entries = {f"{name}.w1": {"shares": None} for name in names}
    entries |= {f"{name}.w3": {"shares": f"{name}.w1"} for name in names}
    assert collapse(entries) == {
        "model.layers.{0-2}.experts.{0-1}.w1": {"shares": None},
        "model.layers.{0-2}.experts.{0-1}.w3": {"shares": "model.layers.{}.experts.{}.w1"},
    }
    assert expand(collapse(entries)) == entries
    entries["model.layers.1.experts.0.w3"] = {"shares": "model.layers.0.experts.0.w1"}
    assert expand(collapse(entries)) == entries and len(collapse(entries)) == 7
    blocks = {f"h.{i}.down": {"shares": f"h.{i}.up"} for i in range(3)}
    assert collapse(blocks) == {"h.{0-2}.down": {"shares": "h.{}.up"}}


def test_more_numbers_to_share_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"'h.1.up' has 1 numbers, but shares 'h.{}.{}.down'"):
        expand({"h.1.up": {"shares": "h.{}.{}.down"}})
