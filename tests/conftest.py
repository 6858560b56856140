"""Where tests may be skipped: for want of a GPU or a browser; on CI anything else is a failure."""

import os
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network; read when the hub is imported

NO_GPU = "needs a CUDA device"
MAY_SKIP = (NO_GPU, "needs a browser")  # how the reason of a permitted skip begins
ON_CI = os.environ.get("CI") == "true"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none; torch is imported only to find that out."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from torch import cuda

    if not cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """A test that was skipped in its mark or in its body."""
    return _refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    """A whole file that was skipped, by `pytest.importorskip` for one."""
    return _refuse_skip((yield))


def _refuse_skip(report):
    """On CI, turn a skip without a permitted reason into a failure that gives the reason."""
    if ON_CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(MAY_SKIP):
            report.outcome = "failed"
            report.longrepr = f"{report.nodeid} was skipped, which CI does not allow: {reason}"
    return report
