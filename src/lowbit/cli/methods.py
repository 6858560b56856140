"""lowbit methods: lists the methods for `--method`, and their fields for `--set`."""

from typing import Annotated

from rich.table import Table
from typer import Argument

from lowbit.cli.fields import print_fields, print_paragraphs
from lowbit.cli.screen import console
from lowbit.config import unknown_name
from lowbit.fields import field_texts, shown
from lowbit.methods import METHODS, Method
from lowbit.methods.method import EFFORTS
from lowbit.recipes import load_recipe, recipe_names


def methods(
    name: Annotated[
        str | None, Argument(metavar="[NAME]", help="Method to explain. Default: list all methods.")
    ] = None,
) -> None:
    """List the methods, or explain the fields of one."""
    if name is None:
        _list()
    elif name in METHODS:
        _explain(METHODS[name])
    else:
        raise ValueError(unknown_name(name, METHODS, "method"))


def summary(method: type[Method]) -> str:
    """Returns the first line of a method's docstring, which says what it does."""
    return method.about.partition("\n")[0]


def _list() -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    for name, method in METHODS.items():
        table.add_row(name, summary(method))
    console().print(table)


def _explain(method: type[Method]) -> None:
    screen = console()
    print_paragraphs(screen, f"{method.name}: {method.about}")
    python = f"in Python lowbit.methods.{method.__name__}(FIELD=VALUE)"
    note = "Fields with * may differ for single linears, see overrides."
    note = note if method.per_linear else ""
    print_paragraphs(screen, f"Fields, as --set FIELD=VALUE or {python}. {note}")
    print_fields(screen, field_texts(method.model_fields), marked=method.per_linear)
    screen.print()
    if method.efforts:
        print_paragraphs(screen, _efforts(method))
    using = [name for name in recipe_names() if load_recipe(name).method == method.name]
    print_paragraphs(screen, f"Recipes (lowbit recipes NAME): {', '.join(using) or 'none'}")


def _efforts(method: type[Method]) -> str:
    """Returns what `--effort` sets."""
    each = {name: method.efforts.get(name, {}) for name in EFFORTS}
    texts = (
        f"{name}: {', '.join(f'{field}={shown(value)}' for field, value in fields.items())}"
        if fields
        else f"{name}: as the fields say"
        for name, fields in each.items()
    )
    return f"Efforts (--effort NAME), where --set does not say otherwise: {'; '.join(texts)}."
