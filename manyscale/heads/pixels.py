"""From the last map back to pixels, and the net that SimMIM trains (arXiv 2111.09886, section 3.3).

Letters: B batch, D channels of the last map, s its stride in pixels, H x W pixels.
"""

from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from manyscale.config import NetConfig
from manyscale.models import Net
from manyscale.models.files import check_finite, load, read_tensors, save
from manyscale.storage import write

FILE = "pixels.safetensors"


class Pixels(nn.Module):
    """One linear layer from a token to the pixels under it: a 1 x 1 convolution, then pixel shuffle."""

    def __init__(self, width: int, stride: int, channels: int = 3) -> None:
        super().__init__()
        self.stride = stride
        self.proj = nn.Conv2d(width, stride**2 * channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, channels, s h, s w)"""
        return F.pixel_shuffle(self.proj(x), self.stride)


class MaskedImages(nn.Module):
    """A backbone that is shown a picture with holes, and a head that paints the picture.

    Args:
        encoder: with a mask token, and patches as wide as high.

    Raises:
        ValueError: another encoder.
    """

    def __init__(self, encoder: Net) -> None:
        super().__init__()
        config = encoder.config
        if encoder.mask_token is None or config.axes != 2 or len(set(config.patches)) > 1:
            raise ValueError("SimMIM needs an image encoder with square patches, made with mask_token=True")
        self.encoder = encoder
        self.head = Pixels(*config.last, config.channels)

    @property
    def config(self) -> NetConfig:
        """The encoder's."""
        return self.encoder.config

    @property
    def layers(self) -> int:
        """Layers for layer-wise learning rates, as the encoder counts them."""
        return self.encoder.layers

    def layer(self, name: str) -> int:
        """The layer of a parameter; the head goes with the encoder's last."""
        return self.encoder.layer(name.removeprefix("encoder.")) if name.startswith("encoder.") else self.layers - 1

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) and their mask (B, h, w) of patches, True where hidden -> pixels (B, 3, H, W)."""
        pixels, (height, width) = self.head(self.encoder.last_map(x, mask)), x.shape[-2:]
        if pixels.shape[-2:] == (height, width):
            return pixels
        return pixels[..., :height, :width]  # what padding added is cut off


def save_masked(model: MaskedImages, folder: Path | str) -> None:
    """Write the encoder as any model, which `load` reads, and the head beside it in `pixels.safetensors`.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.head.state_dict().items()}
    write(folder / FILE, lambda path: save_file(tensors, path))
    save(model.encoder, folder)


def is_masked(folder: Path | str) -> bool:
    """Whether a folder, or its `best`, holds what `save_masked` writes."""
    return any((Path(folder) / place / FILE).exists() for place in ("", "best"))


def load_masked(folder: Path | str) -> MaskedImages:
    """The model that `save_masked` wrote into `folder`, or into its `best`, in evaluation mode.

    Raises:
        ValueError: none is there, or it is not whole.
    """
    folder = Path(folder)
    folder = folder if (folder / FILE).exists() else folder / "best"
    if not (folder / FILE).exists():
        raise ValueError(f"{folder}: no {FILE}; give the folder of a SimMIM run")
    model = MaskedImages(load(folder))
    tensors, _ = read_tensors(folder / FILE)
    expected = {name: tuple(tensor.shape) for name, tensor in model.head.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        raise ValueError(f"{folder / FILE}: the head is {found}, the encoder beside it needs {expected}")
    check_finite(tensors, str(folder / FILE))
    model.head.load_state_dict(tensors)
    return model.eval()
