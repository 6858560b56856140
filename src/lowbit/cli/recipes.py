"""lowbit recipes: what `--recipe` accepts."""

from rich.table import Table

from lowbit.cli.screen import console
from lowbit.recipes import load_recipe, recipe_names


def recipes() -> None:
    """List the recipes that lowbit brings along."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    for name in recipe_names():
        table.add_row(name, load_recipe(name).description)
    console().print(table)
