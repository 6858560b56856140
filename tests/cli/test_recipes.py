"""lowbit recipes."""

import pytest

from lowbit.cli.recipes import TOLERANCE
from lowbit.methods import METHODS
from lowbit.recipes import load_recipe, recipe_names

pytestmark = pytest.mark.slow


def test_one_line_each(lowbit):
    lines = lowbit("recipes").stdout.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    for line, name in zip(lines, recipe_names(), strict=True):
        assert line.rstrip().endswith(load_recipe(name).description)


@pytest.mark.parametrize("name", recipe_names())
def test_one_recipe_in_80_columns(lowbit, name):
    text, recipe = lowbit("recipes", name).stdout, load_recipe(name)
    assert all(len(line) <= 80 for line in text.splitlines())
    joined = " ".join(text.split())
    for field in recipe.fields:
        description = METHODS[recipe.method].model_fields[field].description
        assert f" {field}: " in joined and description in joined
    command = "preprocess" if recipe.lora else "quantize"
    assert text.endswith(f"\nUse:\n  lowbit {command} MODEL OUT --recipe {name}\n")


def test_what_a_recipe_sets(lowbit):
    text = " ".join(lowbit("recipes", "omniquant-w2a16-g128").stdout.split())
    assert " 4,096 x 4,096: 2.19." in text
    assert " bits: 2 Bits " in text and " group_size: 128 " in text and " alpha: " not in text
    assert "128 windows of 2,048 tokens (the model's context, if that is shorter) of wiki" in text
    assert "For models of family opt: let=True" in text
    assert "Calibration: the method needs no text." in lowbit("recipes", "rtn-w4a16").stdout
    assert "learning_rate: 0.0001" in lowbit("recipes", "ptq161-lora").stdout
    text = " ".join(lowbit("recipes", "matquant-842").stdout.split())
    assert "8.02, 6.01 sliced, 4.01 sliced, 2.01 sliced" in text


def test_a_recipe_of_the_users_own(lowbit, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "description: Mine\nmethod: gptq\nfields: {bits: 3}\ncalibration: {seqlen: 64}\n"
    )
    text = lowbit("recipes", path).stdout
    assert "bits: 3" in text and "128 windows of 64 tokens of wikitext2" in text
    path.write_text("description: Mine\nmethod: gptq\nfields: {bit: 3}\n")
    assert "'bit' is not a field of GPTQ" in lowbit("recipes", path, code=1).stderr


def widths(text):
    """Returns name and bits of each line of the table."""
    table, _, _ = text.partition("\n\n")
    return [(line.split()[0], float(line.split()[1].rstrip("*"))) for line in table.splitlines()]


@pytest.mark.parametrize("wanted", [8, 4.5, 4, 3, 2.5, 2, 1.7])
def test_recipes_of_about_a_width(lowbit, wanted):
    text = lowbit("recipes", "--for", wanted).stdout
    found = widths(text)
    distances = [round(abs(bits - wanted), 2) for _, bits in found]
    assert distances == sorted(distances) and distances[-1] <= TOLERANCE
    assert "nearest first" in text and len({name for name, _ in found}) == len(found)


def test_real_widths_of_recipes(lowbit):
    two = dict(widths(lowbit("recipes", "--for", 2).stdout))
    assert two["rtn-w2a16"] == 2.0 and two["rtn-w2a16-g64"] == 2.28
    assert two["quip-e8p-2bit"] == two["trellis-2bit"] == 2.0 and two["ptq161"] == 1.63
    assert two["matquant-842"] == 2.01 and two["matquant-842-ep"] == 2.33  # its extra level counts
    assert "ptq161-lora" not in two  # makes a float model
    eight = dict(widths(lowbit("recipes", "--for", 8).stdout))
    assert eight["matquant-842"] == 8.02
    # Groups of 4 need 4 bits for the scale of each weight; a tenth of the inputs has 16 bits.
    nine = dict(widths(lowbit("recipes", "--for", 9).stdout))
    assert nine["mixedquant-w4a4-g4"] == pytest.approx(0.9 * 8 + 0.1 * 16, abs=0.03)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--for", 7],
            "no recipe is within 0.5 bits of 7 bits per weight; the nearest is",
        ),
        (["rtn-w4a61"], "'rtn-w4a61' is not a recipe: did you mean 'rtn-w4a16'?"),
        (["rtn"], "'rtn' is not a recipe: did you mean 'rtn-w"),
        (["rtn-w4a16", "--for", 4], "name either a recipe to explain, or --for BITS"),
    ],
)
def test_mistakes(lowbit, options, sentence):
    error = lowbit("recipes", *options, code=1).stderr
    assert error.startswith(f"error: {sentence}") and error.count("\n") == 1
