"""The public names: each command is also a function of the package."""

import inspect
import sys
from pathlib import Path

import pytest
import quantized

import lowbit
from lowbit.checkpoint.output import size_of

pytestmark = pytest.mark.slow

FUNCTIONS = [name for name in lowbit.__all__ if inspect.isfunction(getattr(lowbit, name))]


def test_every_command_has_a_function() -> None:
    commands = {"convert", "dequantize", "evaluate", "mix", "plan", "preprocess", "quantize"}
    assert commands | {"load", "report", "set_bits", "slice", "tune"} <= set(FUNCTIONS)


@pytest.mark.parametrize("name", [name for name in lowbit.__all__ if name != "__version__"])
def test_a_name_has_a_docstring(name: str) -> None:
    first, _, _ = (inspect.getdoc(getattr(lowbit, name)) or "").partition("\n")
    assert first.endswith(".")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_function_takes_whatever_it_is_given(name: str) -> None:
    parameters = inspect.signature(getattr(lowbit, name)).parameters.values()
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)


def test_folders_are_texts_or_paths(tmp_path: Path) -> None:
    master, slices = str(quantized.master()), str(tmp_path / "slice")
    assert lowbit.slice(master, slices, 4) == Path(slices)
    dense = lowbit.dequantize(slices, str(tmp_path / "dense"))
    assert dense == tmp_path / "dense" and size_of(dense).linears == 32
    mixed = lowbit.mix(master, 5.5, strategy="pyramid")
    assert mixed.linears <= 5.5 and mixed == lowbit.mix(Path(master), "5.5", strategy="pyramid")
    texts = {"texts": [Path(quantized.text())], "seqlen": 16, "limit": 1}
    [row] = lowbit.evaluate([slices], **texts)
    assert row.model == slices and list(row.perplexity) == [quantized.text()]


@pytest.mark.exhaustive
def test_importing_it_leaves_slow_libraries_alone() -> None:
    """These libraries take seconds to import, and are optional."""
    script = "import sys, lowbit; print({'lm_eval', 'peft', 'datasets'} & {*sys.modules})"
    assert quantized.python(script).stdout == "set()\n"


def test_preprocessing_without_peft_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "lowbit.preprocess.lora", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'lowbit\[train\]'"):
        lowbit.preprocess(quantized.source(), tmp_path / "out", quantized.METHODS["rtn"])
    assert not list(tmp_path.iterdir())


def test_the_citation_names_this_version() -> None:
    citation = (Path(__file__).parents[1] / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {lowbit.__version__}\n" in citation
