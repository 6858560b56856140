"""lowbit mix."""

import pytest
import yaml

from lowbit.checkpoint.output import size_of

pytestmark = pytest.mark.slow


def test_a_plan_that_slice_takes(lowbit, nested, story, tmp_path):
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    text = ("--calibration", story, "--samples", 1, "--seqlen", 16, "--widths", "8,2")
    result = lowbit("mix", nested, "--budget", 4.5, "-o", plan, *text)
    lowbit("slice", nested, "--bits", plan, "-o", out)
    found = size_of(out)
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{plan}: {found.linears:.3f} bits per weight in the linears, ")
    counts = list(yaml.safe_load(plan.read_text()).values())
    assert set(counts) == {2, 8} and len(counts) == 42
    assert lines[1] == f"layers: {counts.count(8)} at 8 bits, {counts.count(2)} at 2 bits"
    assert lines[2].startswith("predicted loss: ") and found.linears <= 4.5
    assert result.stderr == ""


def test_a_pyramid_reads_no_text(lowbit, nested, tmp_path):
    plan = tmp_path / "plan.yaml"
    budget = ("--budget", "3.4MB", "--strategy", "pyramid")
    lines = lowbit("mix", nested, "-o", plan, *budget).stdout.splitlines()
    widths = yaml.safe_load(plan.read_text())
    ends = [w for name, w in widths.items() if ".0." in name or ".5." in name]
    assert set(ends) == {2} and widths["model.layers.2.mlp.up_proj"] > 2
    ignored = lowbit("mix", nested, "-o", plan, *budget, "--samples", 3, "--calibration", "c4")
    says = "pyramid measures nothing: --calibration and --samples are ignored\n"
    assert ignored.stdout == says + "\n".join(lines) + "\n"
    assert len(lines) == 2 and " bits per weight in the linears, 3." in lines[0]


def test_its_help_tells_the_widths_of_pyramids(lowbit):
    text = " ".join(lowbit("mix", "--help").stdout.split())
    assert "Default: 8,6,4,3,2 for sensitivity, 8,4,2 for pyramid." in text


def test_mistakes(lowbit, nested, tmp_path):
    plan = tmp_path / "plan.yaml"
    for options, sentence in (
        (("--budget", 1, "-o", plan), "the smallest that these widths allow is 2.375 bits"),
        (("--budget", 4, "-o", tmp_path), "it is a folder"),
        (("--budget", 4, "-o", plan, "--widths", "8;2"), "--widths '8;2': allowed are numbers"),
    ):
        assert sentence in lowbit("mix", nested, *options, code=1).stderr
    assert not list(tmp_path.iterdir())
