"""The JSON schemas of the reference describe the files that lowbit writes."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import quantized
import yaml

import lowbit
from lowbit.methods import PTQ161, MixedQuant, Trellis

pytestmark = [pytest.mark.docs, pytest.mark.kernels]  # the encoder of trellis is slow without
ROOT = Path(__file__).parents[2]
GENERATORS = ROOT / "docs" / "generators"
MORE = {
    "ptq161": PTQ161(epochs=1, min_tokens=1),
    "mixedquant": MixedQuant(group_size=16, min_tokens=1),
    "trellis": Trellis(state_bits=9, min_tokens=1),
}


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Validates a value against the schema of a name."""
    from jsonschema import Draft202012Validator

    monkeypatch.syspath_prepend(str(GENERATORS))
    schemas: Any = importlib.import_module("schemas")

    def validate(name: str, value: Any) -> None:
        schema = json.loads(schemas.SCHEMAS[name]())
        Draft202012Validator.check_schema(schema)
        Draft202012Validator(schema).validate(value)

    return validate


@pytest.mark.parametrize("method", [*quantized.METHODS, *MORE])
def test_the_files_of_a_run(method: str, check: Any, tmp_path: Path) -> None:
    chosen = MORE.get(method, method)
    out = quantized.quantize(quantized.source(), tmp_path / "out", chosen, embedding_bits=8)
    check("config", json.loads((out / "config.json").read_text()))
    check("report", json.loads((out / "report.json").read_text()))
    for line in (out / "events.jsonl").read_text().splitlines():
        check("event", json.loads(line))


def test_a_wrong_value_is_noticed(check: Any, tmp_path: Path) -> None:
    out = quantized.quantize(quantized.source(), tmp_path / "out", "rtn")
    config = json.loads((out / "config.json").read_text())
    entry = next(iter(config["quantization_config"]["modules"].values()))
    entry["bits"] = 9
    with pytest.raises(Exception, match="9"):
        check("config", config)


def test_plans_recipes_exports_and_estimates(check: Any, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    lowbit.mix(quantized.master(), 5.5, strategy="pyramid").write(plan)
    check("plan", yaml.safe_load(plan.read_text()))
    rtn = quantized.METHODS["rtn"]
    made = lowbit.mix(quantized.source(), 4.5, rtn, calibration=quantized.calibration())
    made.write(plan)
    check("method_plan", json.loads(json.dumps(yaml.safe_load(plan.read_text()))))
    for path in (Path(lowbit.__file__).parent / "recipes").glob("*.yaml"):
        check("recipe", yaml.safe_load(path.read_text()))
    dest = tmp_path / "dest"
    lowbit.export(quantized.folder(), dest, "ct")
    check("export", json.loads((dest / "export.json").read_text()))
    for path in (ROOT / "zoo").glob("*.json"):
        check("zoo", json.loads(path.read_text()))
    estimate = lowbit.plan(quantized.source(), quantized.METHODS["rtn"], self_check=False)
    check("estimate", json.loads(json.dumps(estimate.to_json())))
