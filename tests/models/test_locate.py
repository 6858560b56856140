"""Models are found without a network: huggingface_hub runs in offline mode."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

from lowbit.models.locate import CODE, CONVERSION, CONVERTER, FILES, locate


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


# Names of models as users paste them, and what they are told.
PASTED = {
    "https://huggingface.co/owner/name": "of this page of the hub, give its id, owner/name$",
    "https://huggingface.co/owner/name/tree/main": "give its id, owner/name$",
    "hf.co/owner/name": "give its id, owner/name$",
    "file:///models/name": r"without file://, and ids of the hub \(OWNER/NAME\)$",
    "s3://bucket/name": "allowed are folders",
    "~": "~ stands for the home folder only where the shell reads it",
}


@pytest.mark.parametrize("name", PASTED)
def test_what_is_pasted_is_answered_with_advice(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: there is no such folder: .*{PASTED[name]}"):
        locate(name)


@pytest.mark.parametrize("model", [None, 3, b"model", ["model"], {}], ids=str)
def test_what_is_no_path(model: object) -> None:
    with pytest.raises(ValueError, match="^the model is .*: allowed are the path of a folder and"):
        locate(model)


def test_a_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()
    for name in ("model.safetensors", tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match="is a file: name the folder"):
            locate(name)


@pytest.mark.parametrize("name", ["", "owner/na me", "owner/..name", "-x", "a/" + "b" * 120])
def test_malformed_ids(name: str) -> None:
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        locate(name)


@pytest.mark.parametrize("name", ["owner/name", "gpt2"])
def test_offline_is_said_with_advice(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"^{name!r} is not a folder, and cannot.*hf auth login"
    ) as e:
        locate(name)
    assert "\n" not in str(e.value)


class Hub:
    """A stand-in for the hub with snapshots by revision, pull requests and commits."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = cache
        self.files: dict[str | None, str] = {None: "model.safetensors"}  # by revision
        self.requests: list[SimpleNamespace] = []
        self.commits: dict[str, list[str]] = {}
        self.fetched: list[tuple[str, str | None]] = []
        self.patterns: list[list[str]] = []
        for name in ("snapshot_download", "get_repo_discussions", "HfApi"):
            monkeypatch.setattr(f"lowbit.models.locate.{name}", getattr(self, name))

    def snapshot_download(
        self, name: str, allow_patterns: list[str], revision: str | None = None
    ) -> str:
        self.fetched.append((name, revision))
        self.patterns.append(allow_patterns)
        folder = self.cache / ("main-commit" if revision is None else revision.replace("/", "-"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.files[revision]).touch()
        return str(folder)

    def get_repo_discussions(self, name: str, **filters: str) -> list[SimpleNamespace]:
        assert filters["discussion_status"] == "open"
        return self.requests

    def HfApi(self) -> "Hub":  # noqa: N802 (the hub's name)
        return self

    def list_repo_commits(self, name: str, revision: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(commit_id=commit) for commit in self.commits[revision]]

    def offer(self, number: int, parent: str, **differing: str) -> None:
        """A pull request on top of a commit."""
        reference = f"refs/pr/{number}"
        facts = {"title": CONVERSION, "author": CONVERTER, "git_reference": reference}
        self.requests.append(SimpleNamespace(**facts | differing))
        self.commits[reference] = ["converted", parent, "older"]
        self.files[reference] = "model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "snapshots", monkeypatch)


@pytest.mark.parametrize("trusted", [False, True])
def test_code_is_fetched_only_where_it_is_trusted(trusted: bool, hub: Hub) -> None:
    found = locate("owner/name", trust_remote_code=trusted)
    assert found.name == "main-commit" and hub.fetched == [("owner/name", None)]
    assert hub.patterns == [FILES + CODE if trusted else FILES]
    assert not [pattern for pattern in FILES if pattern.endswith((".py", ".bin", ".pt"))]


def test_pickles_are_read_as_the_hub_converted_them(hub: Hub) -> None:
    hub.files[None] = "config.json"
    hub.offer(3, "older-commit")  # of weights that have changed since
    hub.offer(4, "main-commit", author="somebody")
    hub.offer(5, "main-commit", title="Better weights")
    hub.offer(6, "main-commit")
    assert locate("owner/name").name == "refs-pr-6"
    assert hub.fetched == [("owner/name", None), ("owner/name", "refs/pr/6")]


def test_pickles_that_nobody_converted(hub: Hub) -> None:
    hub.files[None] = "config.json"
    hub.offer(3, "older-commit")
    with pytest.raises(ValueError, match="^'owner/name' has no safetensors") as error:
        locate("owner/name")
    for advice in ("hf download owner/name --local-dir name", "lowbit convert name", "--from-bin"):
        assert advice in str(error.value)


def test_the_hub_does_not_answer_about_conversions(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, **filters: str) -> None:
        raise ConnectionError("no network")

    hub.files[None] = "config.json"
    monkeypatch.setattr("lowbit.models.locate.get_repo_discussions", refuse)
    with pytest.raises(ValueError, match="cannot be downloaded from the hub \\(no network\\)"):
        locate("owner/name")


@pytest.mark.parametrize("name", ["a" * 5000, f"/{'a' * 5000}", f"a/b/{'c' * 5000}"])
def test_a_long_name_is_refused_with_a_short_message(name: str) -> None:
    with pytest.raises(ValueError, match=r"\.\.\.") as error:
        locate(name)
    assert len(str(error.value)) < 300
