"""Logits and feature pyramids against independent implementations: timm, transformers, torchvision.

Every parameter of the peer is random, norms and biases too, so that no branch is silent; the converter carries the
weights over. Where a grid does not fill its windows ours runs with padding="attend", as the peers do. Sizes are chosen
where the peer is right: timm rolls before it pads (pytorch-image-models#2438), so it only sees grids that divide;
torchvision never clips a window and cuts pixels that fill no patch, transformers' V2 fixes window and shift for the size
it was built for.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import manyscale as ms
from manyscale.config import SwinConfig
from manyscale.presets import model_config

pytestmark = pytest.mark.parity
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest logit
NETS = {  # smaller nets, for speed: narrower at the preset's depths, or a toy
    "toy": {"width": 32, "depths": (2, 2, 4, 2), "heads": (1, 2, 4, 8)},
    "narrow T": {"width": 48, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)},
    "narrow S": {"width": 24, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24)},
    "narrow B": {"width": 32, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)},
}
P12 = (12, 12, 12, 6)  # what the published window 16 and 24 models were pre-trained at


class Case(NamedTuple):
    peer: str
    name: str  # of the preset
    built: int | tuple[int, int]  # the image size it is built for
    window: int | tuple[int, int]
    pretrained: int | tuple[int, ...] = 0
    image: tuple[int, int] = ()  # the size of the images, where another
    net: str = ""  # a smaller net of the same kind; empty: the preset whole

    @property
    def config(self) -> SwinConfig:
        fields = {"window": self.window, "pretrained_window": self.pretrained, **NETS.get(self.net, {})}
        return model_config(self.name, image_size=self.built, **fields)

    @property
    def v2(self) -> bool:
        return self.name.startswith("swinv2")

    @property
    def row(self) -> tuple[str, ...]:
        """The table's cells up to the dtype."""
        image = self.image or self.config.size
        model = f"Swin {'V2' if self.v2 else 'V1'} {self.net or self.name.split('_')[1][0].upper()}"
        cells = self.peer, model, by(image), by(self.window), by(self.pretrained) if self.pretrained else ""
        return tuple(map(str, cells))


def by(size: int | tuple[int, ...]) -> str:
    return str(size) if isinstance(size, int) else ("x" if len(size) == 2 else " ").join(map(str, size))


CASES = [
    Case("timm", "swinv2_tiny", 256, 8),
    Case("timm", "swinv2_small", 256, 16, net="narrow S"),
    Case("timm", "swinv2_base", 256, 8),
    Case("timm", "swinv2_tiny", 192, 12, net="toy"),
    Case("timm", "swinv2_base", 256, 16, P12, net="narrow B"),
    Case("timm", "swinv2_tiny", 384, 24, P12, net="toy"),
    Case("timm", "swinv2_tiny", (192, 384), 12, net="toy"),
    Case("timm", "swinv2_tiny", (256, 512), (8, 16), net="toy"),
    Case("timm", "swin_tiny", 224, 7),
    Case("timm", "swin_base", 224, 7, net="narrow B"),
    Case("timm", "swin_tiny", (192, 384), 12, net="toy"),
    Case("transformers", "swinv2_tiny", 256, 8, net="narrow T"),
    Case("transformers", "swinv2_small", 256, 16, P12, net="narrow S"),
    Case("transformers", "swinv2_tiny", 256, 4, image=(165, 230), net="toy"),
    Case("transformers", "swinv2_tiny", 384, 8, image=(268, 356), net="toy"),
    Case("transformers", "swin_tiny", 224, 7),
    Case("transformers", "swin_tiny", 224, 7, image=(237, 296), net="toy"),
    Case("torchvision", "swinv2_tiny", 256, 8),
    Case("torchvision", "swinv2_small", 256, 8, net="narrow S"),
    Case("torchvision", "swinv2_tiny", 256, 8, image=(260, 300), net="toy"),
    Case("torchvision", "swin_small", 224, 7, net="narrow S"),
    Case("torchvision", "swin_tiny", 224, 7, image=(232, 300), net="toy"),
]


def timm_peer(case: Case, config: SwinConfig) -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install manyscale[peers]")
    pretrained = {"pretrained_window_sizes": case.pretrained} if case.pretrained else {}
    return timm.create_model(
        "swinv2_tiny_window8_256" if case.v2 else "swin_tiny_patch4_window7_224",
        embed_dim=config.width,
        depths=config.depths,
        num_heads=config.heads,
        img_size=case.built,
        window_size=[case.window] * 4 if isinstance(case.window, tuple) else case.window,
        num_classes=10,
        **pretrained,
    )


class Logits(nn.Module):
    """A transformers model that answers with its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def transformers_peer(case: Case, config: SwinConfig) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install manyscale[peers]")
    fields = {"embed_dim": config.width, "depths": list(config.depths), "num_heads": list(config.heads)}
    fields |= {"image_size": case.built, "window_size": case.window, "num_labels": 10}
    if not case.v2:
        return Logits(transformers.SwinForImageClassification(transformers.SwinConfig(**fields)))
    fields["pretrained_window_sizes"] = list(case.pretrained or (0, 0, 0, 0))
    return Logits(transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**fields)))


def torchvision_peer(case: Case, config: SwinConfig) -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    v2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if case.v2 else {}
    window = [case.window] * 2
    return SwinTransformer([4, 4], config.width, list(config.depths), list(config.heads), window, num_classes=10, **v2)


PEERS = {"timm": timm_peer, "transformers": transformers_peer, "torchvision": torchvision_peer}


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Every parameter random, on a scale that keeps each branch alive and no softmax flat or one-hot throughout."""
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if name.endswith("logit_scale"):
            noise = torch.rand(parameter.shape, generator=random) * math.log(10) + math.log(2)
            noise[0] = math.log(150)  # above the cap of 100
        elif name.endswith("relative_position_bias_table"):
            pass
        elif parameter.dim() == 1:
            noise = noise * 0.3 + (1 if name.endswith("weight") else 0)
        else:
            noise = noise / math.sqrt(parameter[0].numel()) * (3 if "mlp.2" in name and parameter.shape[1] == 512 else 1)  # bias network
        parameter.copy_(noise)
    return model.eval()


def pair(case: Case) -> tuple[nn.Module, nn.Module]:
    """The peer and ours with the same weights."""
    config = case.config
    peer = randomise(PEERS[case.peer](case, config))
    fields = {key: getattr(config, key) for key in ("image_size", "window", "pretrained_window", "width", "depths", "heads")}
    weights = (peer.model if isinstance(peer, Logits) else peer).state_dict()
    return peer, ms.convert(weights, source=case.peer, name=case.name, **fields, padding="attend")


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def images(case: Case, dtype: torch.dtype) -> Tensor:
    size = case.image or case.config.size
    batch = 2 if case.net == "toy" else 1
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(filter(None, case.row)).replace(" ", "_"))
def test_logits(case: Case, record_property) -> None:
    peer, ours = pair(case)
    found = {}
    for dtype in TOLERANCE:
        peer, ours, x = peer.to(dtype), ours.to(dtype), images(case, dtype)
        with torch.no_grad():
            logits = peer(x)
            assert logits.std() > 0.1  # a dead net agrees with anything
            found[dtype] = difference(ours(x), logits)
        record_property("parity", (*case.row, str(dtype).split(".")[1], f"{found[dtype]:.1e}"))
    for dtype, value in found.items():
        assert value <= TOLERANCE[dtype], dtype


@pytest.mark.parametrize(
    "case", [Case("timm", "swinv2_tiny", (192, 384), 12, net="toy"), Case("timm", "swin_tiny", 224, 7, net="toy")], ids=["V2", "V1"]
)
def test_features(case: Case) -> None:
    peer, ours = pair(case)
    x = images(case, torch.float64)
    with torch.no_grad():
        theirs = peer.double().forward_intermediates(x, intermediates_only=True, output_fmt="NCHW")
        features = ours.double().features(x)
        assert len(features.stages) == len(theirs) == 4
        for level, expected in zip(features.stages, theirs, strict=True):
            assert difference(level, expected) <= 1e-9
        assert difference(features.pooled, peer.forward_head(peer.forward_features(x), pre_logits=True)) <= 1e-9
