"""SimMIM's painting and loss against transformers' own, every parameter random; its targets are raw."""

from dataclasses import replace

import pytest
import torch

import manyscale as ms
from manyscale.heads.pixels import MaskedImages
from manyscale.models import build
from manyscale.tasks.simmim import masked_l1
from tests.parity.test_parity import NETS, TOLERANCE, difference, randomise

pytestmark = pytest.mark.parity


def pair(name: str, size: int, window: int) -> tuple[torch.nn.Module, MaskedImages]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install manyscale[peers]")
    net = NETS["toy"]
    fields = {"embed_dim": net["width"], "depths": list(net["depths"]), "num_heads": list(net["heads"])}
    fields |= {"image_size": size, "window_size": window, "encoder_stride": 32}
    config, model = {
        "swin_tiny": (transformers.SwinConfig, transformers.SwinForMaskedImageModeling),
        "swinv2_tiny": (transformers.Swinv2Config, transformers.Swinv2ForMaskedImageModeling),
    }[name]
    peer = randomise(model(config(**fields)))
    state = peer.state_dict()
    body = {key: tensor for key, tensor in state.items() if not key.startswith("decoder.") and not key.endswith("mask_token")}
    encoder = ms.convert(body, source="transformers", name=name, image_size=size, window=window, **net)
    ours = MaskedImages(build(replace(encoder.config, mask_token=True, classes=0)))
    token = next(tensor for key, tensor in state.items() if key.endswith("mask_token"))
    ours.encoder.load_state_dict({**encoder.state_dict(), "mask_token.token": token.flatten()})
    ours.head.load_state_dict({"proj.weight": state["decoder.0.weight"], "proj.bias": state["decoder.0.bias"]})
    return peer, ours.eval()


@pytest.mark.parametrize(("name", "size", "window"), [("swinv2_tiny", 192, 6), ("swinv2_tiny", 128, 8), ("swin_tiny", 224, 7)])
def test_painting_and_loss(name: str, size: int, window: int, record_property) -> None:
    peer, ours = pair(name, size, window)
    random = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, size, size, generator=random, dtype=torch.float64)
    mask = torch.rand(2, size // 4, size // 4, generator=random) < 0.6
    for dtype, tolerance in TOLERANCE.items():
        with torch.no_grad():
            theirs = peer.to(dtype)(x.to(dtype), bool_masked_pos=mask.flatten(1))
            painted = ours.to(dtype)(x.to(dtype), mask)
        assert theirs.reconstruction.std() > 0.1
        found = difference(painted, theirs.reconstruction)
        version = "V2" if "v2" in name else "V1"
        row = ("transformers", f"SimMIM {version} toy", f"{size}x{size}", str(window), "", str(dtype).split(".")[1], f"{found:.1e}")
        record_property("parity", row)
        assert found <= tolerance
        loss = masked_l1(painted, x.to(dtype), mask, (4, 4))
        assert loss.item() == pytest.approx(theirs.loss.item(), rel=1e-9 if dtype == torch.float64 else 1e-5)
