"""A paper's claim in miniature: a grid of ordinary runs, a table, a picture. Nothing else imports this floor."""

from typing import Any

from manyscale.studies import amplitudes, bias_maps, norms, position_bias, simmim, stability
from manyscale.studies.study import Terms, begin

STUDIES = {
    "position-bias": position_bias.study,
    "norms": norms.study,
    "amplitudes": amplitudes.study,
    "stability": stability.study,
    "simmim": simmim.study,
    "bias-maps": bias_maps.study,
}


def run_study(name: str, terms: Terms) -> dict[str, Any]:
    """Run one of `STUDIES`, or go on with it; returns what `table.json` holds.

    Raises:
        ValueError, Stopped: as `grid.run_grid`.
    """
    begin(terms)
    return STUDIES[name](terms)
