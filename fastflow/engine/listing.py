"""Tables that say what there is to train and to set."""

import sys

from rich.console import Console
from rich.table import Table

from fastflow.engine.settings import described, load_settings, recipes

__all__ = ["list_recipes", "list_settings"]


def list_recipes():
    """A table of the recipes: what each trains on what, what it needs, how large it is, how long it takes."""
    from fastflow.engine.plan import parameter_count  # here, because it loads torch

    table = Table(box=None, pad_edge=False)
    for heading, right in (("recipe", False), ("model", False), ("data", False), ("needs", False),
                           ("parameters", True), ("minutes", True), ("what", False)):
        table.add_column(heading, justify="right" if right else "left", no_wrap=heading != "what")
    for name, description in recipes().items():
        settings = load_settings(name)
        chosen = settings.data
        shape = "x".join(map(str, chosen.known_shape()))
        table.add_row(name, settings.model.kind, f"{chosen.name or chosen.format or 'any'} {shape}",
                      "ships" if chosen.name else f"your data: {chosen.path}",
                      f"{parameter_count(settings):,}" if shape else "",
                      f"{settings.minutes:g}" if settings.minutes else "", description)
    console = Console(width=None if sys.stdout.isatty() else 240)
    console.print(table, highlight=False)
    print("minutes: about, on two CPU cores, where that is known")


def list_settings():
    """A table of the settings: what --set takes, what holds without, what it means."""
    table = Table("setting", "default", "what", box=None, pad_edge=False)
    for row in described():
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False).print(table)
