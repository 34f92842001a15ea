"""Transforms: any picture in, normalised float32 out, in the papers' order; mixing and label smoothing; statistics."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from manyscale.config import Augment, Input, Preprocess
from manyscale.data.images import BadImage
from manyscale.data.sources import Digits
from manyscale.data.transforms import Fit, RandAugment, eval_transform, measure_statistics, mix, preprocess_for, train_transform

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
OFF = Augment(crop="none", flip=0)
EVERYTHING = {
    "off": OFF,
    "papers": Augment(randaugment=2, erase=1.0),
    "jitter": Augment(color_jitter=0.4),
    "pad": Augment(crop="pad"),
}


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("augment", EVERYTHING.values(), ids=EVERYTHING)
@pytest.mark.parametrize("ratio", [0.0, 0.875, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (3, 5000), (5000, 3), (1, 60_000), (32, 32), (50, 40)])
def test_every_size_works_everywhere(augment, ratio, size):
    pre = Preprocess(image_size=(48, 32), crop_ratio=ratio)
    for transform in (train_transform(pre, augment), eval_transform(pre)):
        tensor = transform(noise(*size))
        assert tensor.shape == (3, 48, 32) and tensor.dtype == torch.float32 and tensor.isfinite().all()


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(300, 200), (200, 333), (31, 17), (256, 256), (224, 224)])
@pytest.mark.parametrize("target, ratio", [(224, 0.875), (224, 1.0), (65, 0.9)])
def test_fit_is_resize_and_centre_crop(interpolation, size, target, ratio):
    """As torchvision and timm evaluate, so that published accuracies can be met. Smooth pictures: no aliasing to hide behind."""
    across, down = np.meshgrid(np.linspace(0, 200, size[0]), np.linspace(0, 250, size[1]))
    picture = Image.fromarray(np.stack([across, down, (across + down) / 2], -1).round().astype(np.uint8))
    peer = v2.Compose([v2.Resize(round(target / ratio), v2.InterpolationMode(interpolation)), v2.CenterCrop(target)])
    ours = np.asarray(Fit((target, target), ratio, interpolation)(picture)).astype(int)
    difference = np.abs(ours - np.asarray(peer(picture)).astype(int))
    assert difference.max() <= (250 // min(size) + 1 if interpolation == "nearest" else 1) and difference.mean() < 0.1


def test_crop_and_squash():
    picture = Image.new("RGB", (300, 100))
    picture.paste((255, 255, 255), (100, 0, 200, 100))
    cropped = eval_transform(Preprocess(image_size=(50, 50), crop_ratio=1.0, **RAW))(picture)
    squashed = eval_transform(Preprocess(image_size=(50, 50), crop_ratio=0.0, **RAW))(picture)
    assert cropped.min() > 0.9
    assert squashed[:, :, :15].max() < 0.1 and squashed[:, :, 18:32].min() > 0.9


def test_normalisation_and_value_range():
    pre = Preprocess(image_size=(8, 8), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    tensor = eval_transform(pre)(Image.new("RGB", (8, 8), (255, 0, 51)))
    assert torch.allclose(tensor[:, 3, 3], torch.tensor([1.0, -1.0, 0.1]), atol=1e-6)
    assert torch.equal(train_transform(pre, OFF)(noise(20, 30)), eval_transform(pre)(noise(20, 30))), "everything off is evaluation"


def test_pad_keeps_pixels_and_fills_with_zero():
    """A picture of the image size is only moved, by up to 1/8, and what comes in is 0 after normalisation."""
    pre = Preprocess(image_size=(32, 32), crop_ratio=1.0, mean=(0.2, 0.4, 0.6))
    transform, white, seen = train_transform(pre, Augment(crop="pad", flip=0)), Image.new("RGB", (32, 32), (255, 255, 255)), set()
    for _ in range(60):
        tensor = transform(white)
        kept = tensor[0] > 1
        rows, columns = int(kept.any(1).sum()), int(kept.any(0).sum())
        assert rows >= 28 and columns >= 28 and kept.sum() == rows * columns
        assert tensor[:, ~kept].abs().sum() == pytest.approx(0, abs=0.02 * 3 * 32 * 32)  # the mean, to a grey level
        seen.add((rows, columns))
    assert len(seen) > 8


def test_pad_never_zooms_a_picture_of_the_image_size():
    picture = noise(32, 32)
    transform = train_transform(Preprocess(image_size=(32, 32), crop_ratio=0.875, **RAW), Augment(crop="pad", flip=0))
    padded = torch.nn.functional.pad(v2.functional.to_dtype(v2.functional.pil_to_tensor(picture), torch.float32, scale=True), [4] * 4)
    windows = padded.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 9, 9, 32, 32): every crop there is
    tensor = transform(picture)
    assert (windows == tensor[:, None, None]).all(dim=(0, 3, 4)).sum() == 1


def test_order_of_the_papers():
    names = [type(step).__name__ for step in train_transform(Preprocess(), Augment(randaugment=2, erase=0.25, color_jitter=0.4)).transforms]
    tail = ["PILToTensor", "ToDtype", "Normalize"]
    assert names == ["RandomResizedCrop", "RandomHorizontalFlip", "RandAugment", *tail, "RandomErasing"]
    names = [type(step).__name__ for step in train_transform(Preprocess(), Augment(color_jitter=0.4)).transforms]
    assert names == ["RandomResizedCrop", "RandomHorizontalFlip", "ColorJitter", *tail]
    crop = train_transform(Preprocess(interpolation="bilinear"), Augment(scale=(0.5, 0.6), ratio=(1.0, 2.0))).transforms[0]
    assert (crop.interpolation.value, tuple(crop.scale), tuple(crop.ratio), crop.antialias) == ("bilinear", (0.5, 0.6), (1.0, 2.0), True)


def test_erasing_is_noise_after_normalisation():
    tensor = train_transform(Preprocess(image_size=(64, 64), **RAW), Augment(crop="none", flip=0, erase=1.0))(Image.new("RGB", (64, 64)))
    erased = tensor[tensor != 0]
    assert erased.numel() > 0.01 * tensor.numel() and abs(erased.std() - 1) < 0.2 and erased.min() < -1


def test_randaugment_magnitudes():
    def drawn(magnitude: float, std: float) -> np.ndarray:
        transform = RandAugment(0, magnitude, std, fill=[0, 0, 0])
        return np.array([(transform(noise(2, 2)), transform.magnitude)[1] for _ in range(400)])

    assert set(drawn(9, 0)) == {27} and set(drawn(10, 0)) == {30} and set(drawn(0, 0)) == {0}
    spread = drawn(9, 0.5)
    assert 26 < spread.mean() < 28 and 1 < spread.std() < 2 and spread.max() <= 30
    wide = drawn(5, 100)
    assert wide.min() == 0 and wide.max() == 30


def test_randomness_is_torchs():
    """The loader seeds torch alone: nothing here may draw from `random` or numpy."""
    transform = train_transform(Preprocess(image_size=(32, 32)), Augment(randaugment=3, erase=0.5))
    jitter = train_transform(Preprocess(image_size=(32, 32)), Augment(crop="pad", color_jitter=0.4))
    for each in (transform, jitter):
        tensors = []
        for seed in [*range(20), *range(20)]:
            torch.manual_seed(seed)
            tensors.append(each(noise(40, 50)))
        assert all(map(torch.equal, tensors[:20], tensors[20:])) and not torch.equal(tensors[0], tensors[1])


MIXES = {
    "nothing": Augment(),
    "smoothing": Augment(smoothing=0.1),
    "mixup": Augment(mixup=0.8),
    "cutmix": Augment(cutmix=1.0),
    "all": Augment(mixup=0.8, cutmix=1.0, smoothing=0.1),
}


@pytest.mark.parametrize("augment", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("count", [0, 1, 6])
def test_targets_sum_to_one(augment, count):
    labels = torch.arange(count)
    images, targets = mix(augment, 10)(torch.rand(count, 3, 8, 8), labels)
    assert images.shape == (count, 3, 8, 8) and targets.shape == (count, 10) and targets.dtype == torch.float32
    assert torch.allclose(targets.sum(1), torch.ones(count)) and (targets >= augment.smoothing / 10 - 1e-6).all()


def test_plain_targets():
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([3, 0, 1, 1])
    same, targets = mix(Augment(), 4)(images, labels)
    assert torch.equal(same, images) and torch.equal(targets, torch.eye(4)[labels])
    _, targets = mix(Augment(smoothing=0.2), 4)(images, labels)
    assert torch.allclose(targets, torch.eye(4)[labels] * 0.8 + 0.05)


@pytest.mark.parametrize("augment", [Augment(mixup=0.8), Augment(cutmix=1.0)], ids=["mixup", "cutmix"])
def test_targets_say_how_much_of_each_picture_is_there(augment):
    """Picture i is all i: the mean of a mixed picture is the mean its targets promise."""
    values = torch.arange(5.0)
    for seed in range(10):
        torch.manual_seed(seed)
        images, targets = mix(augment, 5)(values[:, None, None, None].expand(5, 3, 16, 16).clone(), torch.arange(5))
        assert torch.allclose(images.mean((1, 2, 3)), targets @ values, atol=1e-4)


def test_mix_switch():
    def cut(switch: float) -> float:
        mixer, images = mix(Augment(mixup=1.0, cutmix=1.0, mix_switch=switch), 2), torch.tensor([0.0, 1.0])
        images = images[:, None, None, None].expand(2, 3, 8, 8)
        return np.mean([((mixed == 0) | (mixed == 1)).all().item() for mixed, _ in (mixer(images, torch.arange(2)) for _ in range(200))])

    torch.manual_seed(0)
    assert cut(0.0) == 0 and cut(1.0) == 1 and 0.35 < cut(0.5) < 0.65


def test_mixing_follows_the_global_seed():
    mixer, images, labels = mix(MIXES["all"], 10), torch.rand(6, 3, 8, 8), torch.arange(6)
    mixed = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        mixed.append(mixer(images, labels)[0])
    assert torch.equal(mixed[0], mixed[1]) and not torch.equal(mixed[0], mixed[2])


class Pictures:
    """A source of ready pictures; None is a bad file."""

    def __init__(self, *pictures: Image.Image | None) -> None:
        self.pictures, self.asked = pictures, []

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, index: int) -> Image.Image:
        self.asked.append(index)
        if self.pictures[index] is None:
            raise BadImage(self.path(index), "empty file")
        return self.pictures[index]

    def path(self, index: int) -> str:
        return f"{index}.png"


def test_statistics_are_those_of_the_pixels():
    source = Digits(held_out=False)
    pixels = np.stack([np.asarray(source.read(index)) for index in range(len(source))]).reshape(-1, 3) / 255
    mean, std = measure_statistics(source)
    assert np.allclose(mean, pixels.mean(0), atol=1e-4) and np.allclose(std, pixels.std(0), atol=1e-4)
    assert (mean, std) == measure_statistics(source)


def test_statistics_of_few_bad_and_plain_pictures():
    white, black = Image.new("RGB", (2, 2), (255, 255, 255)), Image.new("RGB", (400, 400))
    assert measure_statistics(Pictures(white, None, black)) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), "every picture counts the same"
    assert measure_statistics(Pictures(white))[1] == (0.0039,) * 3
    source = Pictures(*[black] * 10)
    measure_statistics(source, limit=4)
    assert source.asked == [0, 3, 6, 9]
    with pytest.raises(ValueError, match=r"not one of the pictures can be read; 1\.png: empty file"):
        measure_statistics(Pictures(None, None))


def test_preprocess_for():
    source = Pictures(Image.new("RGB", (2, 2), (255, 0, 51)))
    pre = preprocess_for(Input(crop_ratio=0.9, interpolation="bilinear"), (64, 32), source)
    assert pre == Preprocess(image_size=(64, 32), crop_ratio=0.9, interpolation="bilinear") and not source.asked
    assert preprocess_for(Input(statistics="half"), (8, 8), source).std == (0.5, 0.5, 0.5)
    assert preprocess_for(Input(statistics="own"), (8, 8), source).mean == (1.0, 0.0, 0.2)
