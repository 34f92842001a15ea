"""A paper's claim in miniature: a grid of ordinary runs, a table, a picture. Nothing else imports this floor."""

from collections.abc import Callable
from typing import Any

from manyscale.studies import amplitudes, bias_maps, norms, position_bias, simmim, stability
from manyscale.studies.study import Terms

STUDIES: dict[str, Callable[[Terms], dict[str, Any]]] = {
    "position-bias": position_bias.study,
    "norms": norms.study,
    "amplitudes": amplitudes.study,
    "stability": stability.study,
    "simmim": simmim.study,
    "bias-maps": bias_maps.study,
}
