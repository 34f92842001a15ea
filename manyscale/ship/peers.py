"""Other packages' nets with the very weights of ours: what `manyscale bench` measures against."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from manyscale.config import NetConfig, SuperViTConfig, SwinConfig, ViTConfig, nearest
from manyscale.models import Net
from manyscale.models.kin import to_vit
from manyscale.ship.convert import export_weights
from manyscale.ship.convert.layout import version


class NoSuchNet(ValueError):
    """A package has no net that computes this."""


class Logits(nn.Module):
    """A transformers model that answers with its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes)"""
        return self.model(x).logits


def peer(name: str, model: Net) -> nn.Module:
    """The net of package `name` that computes what `model` does, with copies of its weights, in evaluation mode.

    A SuperViT's peer is the ViT that it is at its largest size with every token.

    Raises:
        ValueError: an unknown package, or one that is not installed.
        NoSuchNet: one that has no such net.
    """
    if name not in PEERS:
        raise ValueError(f"field `against`: unknown package `{name}`; {nearest(name, PEERS)}")
    try:
        net = to_vit(model) if isinstance(model.config, SuperViTConfig) else model
        if isinstance(net.config, SwinConfig) and net.config.padding == "mask" and _padded(net.config):
            size = net.config.patches[-1] * 2 ** (len(net.config.depths) - 1) * max(map(max, net.config.windows))
            raise NoSuchNet(f"it attends padding, this net masks it; give an image size that windows fill, such as {size}")
        built = PEERS[name](net.config)
        weights = export_weights(net, name)
    except ImportError as error:
        raise ValueError(f"field `against`: {name} is not installed: pip install manyscale[peers] ({error})") from None
    except (ValueError, RuntimeError, AssertionError) as error:  # what a package says of sizes it does not take
        raise NoSuchNet(str(error)) from None
    inner = built.model if isinstance(built, Logits) else built
    inner.load_state_dict(weights, strict=True)
    return built.eval()


def _padded(config: SwinConfig) -> bool:
    """Whether windows do not fill some stage's grid at the net's image size."""
    return any(g % w for grid, window in zip(config.grids, config.windows, strict=True) for g, w in zip(grid, window, strict=True))


def _timm(config: NetConfig) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2
    from timm.models.vision_transformer import VisionTransformer

    if isinstance(config, ViTConfig):
        if config.position != "learned" or config.pre_logits:
            raise NoSuchNet("timm has no ViT with pre-logits or computed positions")
        pools = {"token": {"global_pool": "token"}, "gap": {"global_pool": "avg", "class_token": False, "fc_norm": False},
                 "map": {"global_pool": "map", "class_token": False}}  # fmt: skip
        return VisionTransformer(
            img_size=config.size, patch_size=config.patches, embed_dim=config.width, depth=config.depth, num_heads=config.heads,
            mlp_ratio=config.mlp_width / config.width, num_classes=config.classes,
            act_layer=partial(nn.GELU, approximate="tanh" if config.gelu == "tanh" else "none"), **pools[config.pool],
        )  # fmt: skip
    fields = {"img_size": config.size, "patch_size": config.patches[0], "embed_dim": config.width, "depths": config.depths,
              "num_heads": config.heads, "window_size": _window(config), "mlp_ratio": config.mlp_ratio,
              "num_classes": config.classes, "drop_path_rate": config.drop_path}  # fmt: skip
    if version(config) == 1:
        return SwinTransformer(**fields)
    return SwinTransformerV2(**fields, pretrained_window_sizes=_pretrained(config))


def _transformers(config: NetConfig) -> nn.Module:
    import transformers

    if isinstance(config, ViTConfig):
        if config.pool != "token" or config.size[0] != config.size[1]:
            raise NoSuchNet("transformers' ViT reads a class token and square images")
        fields = {"hidden_size": config.width, "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
                  "intermediate_size": config.mlp_width, "image_size": config.size[0], "patch_size": config.patches[0],
                  "num_labels": config.classes, "layer_norm_eps": config.norm_eps,
                  "hidden_act": "gelu_pytorch_tanh" if config.gelu == "tanh" else "gelu"}  # fmt: skip
        return Logits(transformers.ViTForImageClassification(transformers.ViTConfig(**fields)))
    fields = {"embed_dim": config.width, "depths": list(config.depths), "num_heads": list(config.heads), "image_size": config.size[0],
              "window_size": _window(config), "num_labels": config.classes, "mlp_ratio": config.mlp_ratio,
              "drop_path_rate": config.drop_path}  # fmt: skip
    if version(config) == 1:
        return Logits(transformers.SwinForImageClassification(transformers.SwinConfig(**fields)))
    fields["pretrained_window_sizes"] = list(_pretrained(config))
    return Logits(transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**fields)))


def _torchvision(config: NetConfig) -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    if isinstance(config, ViTConfig):
        raise NoSuchNet("torchvision's ViT has another layout of weights")
    v2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version(config) == 2 else {}
    return SwinTransformer(
        list(config.patches), config.width, list(config.depths), list(config.heads), [_window(config)] * 2, mlp_ratio=config.mlp_ratio,
        stochastic_depth_prob=config.drop_path, num_classes=config.classes, **v2,
    )  # fmt: skip


PEERS: dict[str, Callable[[NetConfig], nn.Module]] = {"timm": _timm, "transformers": _transformers, "torchvision": _torchvision}


def _window(config: SwinConfig) -> int:
    """The window asked for; peers shrink it to the grids themselves."""
    sides = {side for stage in config.built_windows("window") for side in stage}
    if len(sides) > 1:
        raise NoSuchNet(f"other packages take one window, not {config.window}")
    return sides.pop()


def _pretrained(config: SwinConfig) -> tuple[int, ...]:
    """The windows that the bias learnt at, one number a stage; 0: those it has."""
    return tuple(max(stage) for stage in config.built_windows("pretrained_window"))


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, norms too: the residual norms of a fresh Swin V2 are zero, so that it agrees with anything."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if name.endswith("logit_scale"):
            parameter.copy_(2.3 + 0.3 * noise)
        elif parameter.ndim > 1 and not name.endswith("table"):
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
    return model
