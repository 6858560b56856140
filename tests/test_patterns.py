import pytest

from lowbit.patterns import matches, matches_any

NAME = "model.layers.13.mlp.down_proj"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (NAME, True),
        ("down_proj", True),
        ("mlp.*", True),
        ("layers.13.*", True),
        ("*.layers.1[0-9].*", True),
        ("*", True),
        ("proj", False),
        ("layers.3.*", False),
        ("model.layers.1.*", False),
        ("DOWN_PROJ", False),
        ("", False),
    ],
)
def test_a_pattern_means_a_whole_name_or_its_last_parts(pattern: str, found: bool) -> None:
    assert matches(NAME, pattern) == found
    assert matches_any(NAME, ["other", pattern]) == found
