"""Reports through JSON and back, and the one place where their keys are spelt."""

import ast
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowbit.run_report import BlockReport, LinearReport, RunReport, TrainingReport

SRC = Path(__file__).parents[1] / "src" / "lowbit"

LINEAR = LinearReport(
    signal_to_noise_db=12.34,
    slices_db={8: math.inf, 4: 20.5},
    proxy_loss=0.0123456789,
    output_error=0.125,
    correction=0.4,
    salient_ratio=0.2083,
    permutation="folded",
    scale="row",
    tokens=11,
    fallback="why",
)
TRAINING = TrainingReport(
    before=3.0, after=1 / 3, best_epoch=2, curve=[2.0, 1 / 3], failures=["a try"]
)
BLOCK = BlockReport(
    linears={"mlp.up": LINEAR, "mlp.down": LinearReport(signal_to_noise_db=math.inf)},
    training=TRAINING,
    loss_rtn=4.0,
    loss_before=3.0,
    loss_after=0.5,
    folds=["norm>mlp.up"],
    fallback="the whole of it",
)
WHOLE: dict[str, LinearReport | TrainingReport | BlockReport | RunReport] = {
    "linear": LINEAR,
    "training": TRAINING,
    "block": BLOCK,
    "run": RunReport(
        fallbacks={"h.0": "why"},
        left_float=["h.0.gate"],
        dequantized={"MXFP4": 3},
        blocks={"h.0": BLOCK},
    ),
}


def through_json(report: Any) -> Any:
    """As a run writes it and a reader reads it."""
    to_json = getattr(report, "to_json", lambda: report.model_dump(mode="json"))
    return type(report).model_validate(json.loads(json.dumps(to_json(), allow_nan=False)))


@pytest.mark.parametrize("name", WHOLE)
def test_round_trip(name: str) -> None:
    report = WHOLE[name]
    unset = set(type(report).model_fields) - report.model_fields_set
    assert not unset, f"the example leaves out {unset}"
    assert through_json(report) == report
    for field, info in type(report).model_fields.items():
        if not info.is_required():
            default = info.get_default(call_default_factory=True)
            without = report.model_copy(update={field: default})
            assert through_json(without) == without != report


NUMBERS = {
    "an exact copy": (LinearReport(signal_to_noise_db=math.inf), {"signal_to_noise_db": None}),
    "hundredths": (LinearReport(signal_to_noise_db=7.0049), {"signal_to_noise_db": 7.0}),
    "an exact slice": (
        LinearReport(signal_to_noise_db=1.0, slices_db={8: math.inf}),
        {"signal_to_noise_db": 1.0, "slices_db": {"8": None}},
    ),
    "a loss that is infinite": (BlockReport(loss_after=math.inf), {}),
    "a loss that is no number": (BlockReport(loss_rtn=math.nan), {}),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_json_lacks(name: str) -> None:
    report, wanted = NUMBERS[name]
    assert report.model_dump(mode="json", exclude_defaults=True) == wanted
    assert through_json(report) == report


def test_the_error_of_a_linear_is_always_known() -> None:
    with pytest.raises(ValueError, match="signal_to_noise_db"):
        LinearReport.model_validate({"proxy_loss": 1.0})


def test_what_fell_back_is_collected() -> None:
    plain = BlockReport(linears={"up": LinearReport(signal_to_noise_db=1.0)})
    found = RunReport.of({"h.0": BLOCK, "h.1": plain}, ["h.0.gate"])
    assert found.fallbacks == {"h.0.mlp.up": "why", "h.0": "the whole of it"}
    assert list(found.to_json()) == ["fallbacks", "left_float", "blocks"]
    assert RunReport.of({}, []).to_json() == {"fallbacks": {}, "left_float": [], "blocks": {}}


def test_linears_get_their_names_on_disk() -> None:
    found = BLOCK.renamed({"mlp.up": "fc1", "mlp.down": "fc2"})
    assert found.linears == {"fc1": LINEAR, "fc2": BLOCK.linears["mlp.down"]}
    assert (found.training, found.fallback) == (BLOCK.training, BLOCK.fallback)


def test_the_worst_proxy_loss() -> None:
    losses = {"a": 0.1, "b": None, "c": 0.3}
    linears = {n: LinearReport(signal_to_noise_db=1.0, proxy_loss=x) for n, x in losses.items()}
    assert BlockReport(linears=linears).worst_proxy_loss == 0.3
    assert BlockReport(linears={"b": linears["b"]}).worst_proxy_loss is None


def test_the_former_name_of_fallbacks() -> None:
    assert RunReport.model_validate({"given_up": {"h.0": "why"}}).fallbacks == {"h.0": "why"}


# Files where a key of a report means something else: a field of a method, a label on the screen, or
# the report of `lowbit preprocess`. Keys that are ordinary words are not looked for.
ELSEWHERE = {
    "fallback": {"cli/inspect.py", "cli/quantize.py"},
    "salient_ratio": {"methods/ptq161/method.py", "methods/mixedquant/method.py"},
    "loss_before": {"preprocess/lora.py", "cli/preprocess.py"},
    "loss_after": {"preprocess/lora.py", "cli/preprocess.py"},
}
KEYS = {
    field
    for report in WHOLE.values()
    for field in type(report).model_fields
    if "_" in field or field.startswith("fallback")
} | {"given_up"}


def spelt(text: str, file: str) -> Iterator[str]:
    """The report keys that are strings in a source text."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and node.value in KEYS:
            key = str(node.value)
            if file not in ELSEWHERE.get(key, set()):
                yield f"src/lowbit/{file}:{node.lineno} spells {key!r}: use the field of the report"


def test_report_keys_are_spelt_in_their_classes_only() -> None:
    assert {"signal_to_noise_db", "slices_db", "proxy_loss", "loss_rtn", "fallback"} <= KEYS
    files = {path.relative_to(SRC).as_posix(): path for path in sorted(SRC.rglob("*.py"))}
    del files["run_report.py"]
    breaches = [b for file, path in files.items() for b in spelt(path.read_text("utf-8"), file)]
    assert not breaches, "\n" + "\n".join(breaches)


def test_a_key_as_a_string_is_found() -> None:
    assert list(spelt('x = report["loss_rtn"]', "a.py")) != []
    assert list(spelt("x = report.get('fallback')", "a.py")) != []
    assert list(spelt("x = {'salient_ratio': 1}", "cli/quantize.py")) != []
    assert list(spelt("x = report.loss_rtn  # loss_rtn", "a.py")) == []
    assert list(spelt('"""about proxy_loss"""', "a.py")) == []
