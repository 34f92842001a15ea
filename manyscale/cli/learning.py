"""Verbs that train: demo, train."""

from pathlib import Path

from manyscale.cli.parsing import leave, parse
from manyscale.config import Run, nearest
from manyscale.recipes import RECIPES, tiny


def demo(arguments: list[str]) -> None:
    """The whole story on embedded data in a few CPU minutes; ends with a report."""

    def run(out: str = "runs/demo") -> None:
        """Train a micro Swin V2 and the same net with a table bias on digits, transfer both, and write a report.

        Args:
            out: the folder it is written to.
        """
        from manyscale.studies.demo import demo as story
        from manyscale.train.loop import Stopped

        try:
            story(Path(out))
        except Stopped as stopped:
            leave(str(stopped), stopped.exit_code)

    parse(run, "demo", arguments)


def train(arguments: list[str]) -> None:
    """Train a recipe; the same command again goes on where it stopped."""
    if not arguments or arguments[0].startswith("-"):
        print("manyscale train RECIPE [--tiny] [--field value ...]\n\nRecipes:")
        for name, recipe in RECIPES.items():
            function = getattr(recipe, "func", recipe)
            print(f"  {name:42} {(function.__doc__ or '').split(chr(10))[0]}")
        print("\n`manyscale train RECIPE --help` lists every field. --tiny: the recipe's twin for a CPU minute.")
        if arguments and arguments[0] in ("-h", "--help"):
            return
        raise ValueError("give a recipe, such as `manyscale train digits`")
    name, *rest = arguments
    if name not in RECIPES:
        raise ValueError(f"unknown recipe `{name}`; {nearest(name, RECIPES)}")
    recipe = RECIPES[name]()
    if "--tiny" in rest:
        rest.remove("--tiny")
        recipe = tiny(recipe)
    run = parse(Run, f"train {name}", rest, default=recipe)
    from manyscale.train.loop import Stopped
    from manyscale.train.loop import train as learn

    try:
        learn(run)
    except Stopped as stopped:
        leave(str(stopped), stopped.exit_code)
