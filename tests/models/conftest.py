"""A net small enough to run hundreds of times."""

import pytest
import torch

from manyscale.config import SwinConfig
from manyscale.models.swin import Swin


@pytest.fixture
def micro():
    """`micro(**fields)`: a Swin of two stages on 32 px in windows of 4, every parameter away from its starting value, in eval mode."""

    def build(*, seed: int = 0, fresh: bool = False, **fields) -> Swin:
        torch.manual_seed(seed)
        start = {"image_size": 32, "patch": 2, "width": 8, "depths": (2, 2), "heads": (2, 4), "window": ((4, 4), (4, 4)), "classes": 5}
        model = Swin(SwinConfig(**{**start, **fields})).eval()
        if not fresh:  # norms at zero would hide what their branches do
            for p in model.parameters():
                with torch.no_grad():
                    p.add_(torch.randn_like(p) * 0.2)
        return model

    return build
