"""Without a network: huggingface_hub is told that it is offline."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from lowbit.models.locate import CODE, FILES, locate


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(tmp_path) == tmp_path
    assert locate(str(tmp_path)) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") == Path("owner/name")  # before the hub


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "../model", "~/model", "a/b/c"])
def test_what_must_be_a_folder_is_not_looked_up(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: there is no such folder$"):
        locate(name)


@pytest.mark.parametrize("name", ["owner/na me", "owner/..name", "-x", "a/" + "b" * 120])
def test_malformed_ids(name: str) -> None:
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        locate(name)


@pytest.mark.parametrize("name", ["owner/name", "gpt2"])
def test_offline_is_said_with_advice(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"^{name!r} is no folder, and the hub.*hf auth login"
    ) as e:
        locate(name)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("trusted", [False, True])
def test_code_is_fetched_only_where_it_is_trusted(
    trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return "/cache/snapshot"

    monkeypatch.setattr("lowbit.models.locate.snapshot_download", fetch)
    assert locate("owner/name", trust_remote_code=trusted) == Path("/cache/snapshot")
    assert asked == {"owner/name": FILES + CODE if trusted else FILES}
    assert not [pattern for pattern in FILES if pattern.endswith((".py", ".bin", ".pt"))]
