"""A paper's claim in miniature: a grid of ordinary runs, a table, a picture. Nothing else imports this floor."""

from dataclasses import replace
from typing import Any

from manyscale.studies import amplitudes, bias_maps, heads, norms, position_bias, scaling, simmim, stability, supervit, weight_decay
from manyscale.studies.study import Terms, begin

STUDIES = {
    "position-bias": position_bias.study,
    "norms": norms.study,
    "amplitudes": amplitudes.study,
    "stability": stability.study,
    "simmim": simmim.study,
    "bias-maps": bias_maps.study,
    "scaling": scaling.study,
    "weight-decay": weight_decay.study,
    "heads": heads.study,
    "supervit": supervit.study,
}
MANY_CLASSES = ("scaling", "weight-decay", "heads")  # learn from many classes, and ask about others


def run_study(name: str, terms: Terms) -> dict[str, Any]:
    """Run one of `STUDIES`, or go on with it; returns what `table.json` holds.

    Raises:
        ValueError, Stopped: as `grid.run_grid`.
    """
    terms = replace(terms, data=terms.data or own_data(name))
    begin(terms)
    return STUDIES[name](terms)


def own_data(name: str) -> str:
    """The set a study takes where none is given."""
    return "tiny-imagenet" if name in MANY_CLASSES else "cifar10"
