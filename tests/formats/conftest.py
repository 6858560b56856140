"""Tests of formats check the arithmetic of torch; those marked `kernels` run kernels too."""

import pytest

from lowbit.formats.native import NativeBackend


@pytest.fixture(autouse=True)
def on_torch_unless_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("kernels") is None:
        monkeypatch.setattr(NativeBackend, "supports", lambda *call: False)
