"""lowbit recipes."""

from lowbit.recipes import load_recipe, recipe_names


def test_one_line_each(lowbit):
    lines = lowbit("recipes").stdout.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    for line, name in zip(lines, recipe_names(), strict=True):
        assert line.rstrip().endswith(load_recipe(name).description)
