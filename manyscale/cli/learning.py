"""Verbs that train: demo, train, study."""

from itertools import pairwise
from pathlib import Path

from tyro.conf import Positional

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


STUDIES = {
    "position-bias": "three position biases at larger windows (Swin V2 Table 1)",
    "norms": "norm placement and similarity (Tables 6 and 7)",
    "amplitudes": "how loud each block is, before and after training (Figure 2)",
    "stability": "growing learning rates on a deep, narrow net (Figure 3)",
    "simmim": "from scratch against pre-trained, with few labels",
    "bias-maps": "the learnt biases as pictures (Figures 4 and 5)",
    "scaling": "sizes x data x durations, their frontier and its law (Scaling ViT, Figures 2 and 3)",
    "weight-decay": "decay of the head against that of the body (Scaling ViT, Figure 5 left)",
    "heads": "class token, mean and MAP pooling, and what a token costs (Scaling ViT, Figure 5 right)",
    "supervit": "one net for twelve costs against nets of one size (SuperViT)",
}


def study(arguments: list[str]) -> None:
    """A paper's claim in miniature: a grid of runs, a table, a picture."""

    def run(
        name: Positional[str],
        data: str = "",
        probe: str = "",
        seeds: int = 3,
        quick: bool = False,
        compile: bool = False,
        out: str = "",
    ) -> None:
        """Run one study; the same command again goes on where it stopped.

        Args:
            name: which; `manyscale study` lists them.
            data: a set by name or folder, such as cifar10, tiny-imagenet or digits; empty: cifar10, of Scaling ViT tiny-imagenet.
            probe: of Scaling ViT, a set of other classes for few-shot evaluation; empty: cifar10, or else tiny-imagenet.
            seeds: every net is trained from so many.
            quick: a first look, in minutes instead of hours.
            compile: torch.compile every net: needs a C++ compiler or a GPU; pays where runs last more than a minute.
            out: its folder; empty: runs/studies/NAME-DATA, with -quick where that is asked for.
        """
        if name not in STUDIES:
            raise ValueError(f"unknown study `{name}`; {nearest(name, STUDIES)}")
        if seeds < 1:
            raise ValueError(f"field `seeds`: {seeds} must be at least 1; 3 or more say something")
        from manyscale.studies import Terms, own_data, run_study
        from manyscale.train.loop import Stopped

        data = data or own_data(name)
        folder = out or f"runs/studies/{name}-{Path(data).name}{'-quick' if quick else ''}"
        flags = f"{f' --probe {probe}' if probe else ''} --seeds {seeds}{' --quick' if quick else ''}{' --compile' if compile else ''}"
        command = f"manyscale study {name} --data {data}{flags}"
        try:
            run_study(name, Terms(Path(folder), data, probe, seeds, quick, compile, command=command))
        except Stopped as stopped:
            leave(str(stopped), stopped.exit_code)

    if not arguments or arguments[0] in ("-h", "--help"):
        print("manyscale study NAME [--data SET] [--seeds N] [--quick] [--compile]\n\nStudies:")
        print("\n".join(f"  {name:16} {what}" for name, what in STUDIES.items()))
        if not arguments:
            raise ValueError("give a study, such as `manyscale study position-bias --quick`")
        print()
    parse(run, "study", arguments)


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
    if ("--batch", "auto") in pairwise(rest):  # the recipe's batch, in as few parts as fit
        rest[rest.index("--batch") : rest.index("--batch") + 2] = ["--accumulate", "0"]
    run = parse(Run, f"train {name}", rest, default=recipe)
    from manyscale.train.branches import train as learn
    from manyscale.train.loop import Stopped

    try:
        learn(run)
    except Stopped as stopped:
        leave(str(stopped), stopped.exit_code)
