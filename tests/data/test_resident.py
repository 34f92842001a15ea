"""Crops on the device: the pixels Pillow gives, torchvision's distribution, and the loader's promises."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from manyscale.config import Augment, Preprocess
from manyscale.data.loader import train_batches
from manyscale.data.resident import crop, draw, resident_batches
from manyscale.data.transforms import train_transform
from manyscale.train.loop import train
from tests.data.test_loader import Shades, same
from tests.train.test_loop import fingerprint, train_in_pieces

CPU = torch.device("cpu")
PRE = Preprocess(image_size=(16, 12))
PLAIN = Augment(scale=(0.3, 1.0))


def by_pillow(image, box, flip, size, interpolation):
    """Each channel as a picture of floats: no rounding, and not torch's resize, which is wrong for pictures one pixel wide."""
    top, left, height, width = box
    kind = Image.Resampling[interpolation.upper()]
    channels = [Image.fromarray(c.numpy()).crop((left, top, left + width, top + height)).resize(size[::-1], kind) for c in image]
    cropped = torch.stack([torch.from_numpy(np.array(channel)) for channel in channels])
    return cropped.flip(-1) if flip else cropped


@given(st.data(), st.sampled_from(["bilinear", "bicubic"]), st.tuples(st.integers(1, 40), st.integers(1, 40)))
@settings(max_examples=60, deadline=None)
def test_a_crop_is_pillows(data, interpolation, size):
    height, width = data.draw(st.tuples(st.integers(1, 30), st.integers(1, 30)))
    images = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0))
    crops = []
    for _ in images:
        top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
        crops.append([top, left, data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))])
    flips = [False, True, True]
    found = crop(images, torch.tensor(crops), torch.tensor(flips), size, interpolation)
    for image, box, flip, ours in zip(images, crops, flips, found, strict=True):
        torch.testing.assert_close(ours, by_pillow(image, box, flip, size, interpolation), rtol=0, atol=2e-5)


def test_nearest_is_pillows():
    """At sizes where no centre falls between two pixels."""
    images = torch.rand(1, 3, 20, 18)
    ours = crop(images, torch.tensor([[3, 2, 14, 13]]), torch.tensor([True]), (9, 21), "nearest")
    assert torch.equal(ours[0], by_pillow(images[0], (3, 2, 14, 13), True, (9, 21), "nearest"))


@pytest.mark.parametrize("size", [(32, 32), (20, 40)])
def test_crops_are_drawn_as_torchvision_draws_them(size):
    """Means and deviations of position and size over 4,000 draws, within five standard errors."""
    torch.manual_seed(0)
    augment = Augment(scale=(0.2, 1.0), flip=0.3)
    theirs = v2.RandomResizedCrop(size, augment.scale, augment.ratio)
    blank = torch.zeros(3, *size)
    wanted = torch.tensor([[p[k] for k in ("top", "left", "height", "width")] for p in (theirs.make_params([blank]) for _ in range(4000))])
    crops, flips = draw(4000, augment, size, 7)
    both = torch.stack([crops, wanted]).double()
    error = (2 * both.std(1).square().mean(0) / 4000).sqrt()
    assert ((both[0].mean(0) - both[1].mean(0)).abs() < 5 * error).all()
    assert ((both[0].std(0) / both[1].std(0)).log().abs() < 0.08).all()
    assert flips.double().mean().item() == pytest.approx(0.3, abs=0.04)


@given(st.integers(1, 50), st.integers(1, 50), st.floats(0.01, 1), st.floats(0.2, 5), st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_a_crop_lies_inside_its_picture(height, width, least, ratio, seed):
    crops, flips = draw(20, Augment(scale=(least, 1.0), ratio=(ratio, 1.5 * ratio), flip=1.0), (height, width), seed)
    top, left, high, wide = crops.T
    assert (top >= 0).all() and (left >= 0).all() and (high >= 1).all() and (wide >= 1).all() and flips.all()
    assert (top + high <= height).all() and (left + wide <= width).all()


def test_where_no_crop_fits_it_is_torchvisions_middle():
    for size in ((4, 90), (90, 4)):
        augment = Augment(scale=(0.9, 1.0))
        params = v2.RandomResizedCrop(size, augment.scale, augment.ratio).make_params([torch.zeros(3, *size)])
        crops, _ = draw(3, augment, size, 0)
        assert crops.tolist() == [[params[k] for k in ("top", "left", "height", "width")]] * 3


def read(source=None, *, batch=6, start=0, steps=9, augment=PLAIN, policy="skip"):
    source = source or Shades(20, broken=(4, 11))  # 3 steps an epoch, 3 epochs
    return list(resident_batches(source, PRE, augment, batch=batch, seed=3, start_step=start, steps=steps, device=CPU, policy=policy))


def test_order_labels_and_bad_files_are_the_loaders():
    transform = train_transform(PRE, PLAIN)
    theirs = list(train_batches(Shades(20, broken=(4, 11)), transform, batch=6, seed=3, start_step=0, steps=9, workers=0))
    ours = read()
    assert [(b.ids, set(b.bad)) for b in ours] == [(b.ids, set(b.bad)) for b in theirs] and sum(len(b.bad) for b in ours) > 3
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.labels, b.labels) and a.images.shape == b.images.shape and a.images.dtype == b.images.dtype
        torch.testing.assert_close(a.images, b.images, rtol=0, atol=1e-5)  # plain pictures look the same in every crop


def test_batches_go_on_anywhere_and_pixels_do_not_depend_on_the_batch():
    whole = read()
    for start in (1, 3, 5):
        assert same(read(start=start), whole[start:])
    by_name = [
        {name: image for b in read(batch=size, steps=20 // size) for name, image in zip(b.ids, b.images, strict=True)} for size in (4, 5)
    ]
    assert by_name[0].keys() == by_name[1].keys()
    assert all(torch.equal(image, by_name[1][name]) for name, image in by_name[0].items())


class Noise(Shades):
    def read(self, index):
        size = (20, 18) if index != self.odd else (21, 18)
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))

    odd = -1


def test_every_epoch_crops_anew():
    epochs = [dict(zip(b.ids, b.images, strict=True)) for b in read(Noise(20), batch=20, steps=2)]
    assert not any(torch.equal(image, epochs[1][name]) for name, image in epochs[0].items())


def test_what_it_cannot_do_it_says():
    for augment in (replace(PLAIN, randaugment=2), replace(PLAIN, color_jitter=0.4), replace(PLAIN, erase=0.1), replace(PLAIN, crop="pad")):
        with pytest.raises(ValueError, match=r"`resident`.*--no-resident"):
            read(augment=augment)
    odd = Noise(20)
    odd.odd = 7
    with pytest.raises(ValueError, match=r"`resident`: /set/0.png has 20 x 18 pixels, /set/7.png 21 x 18; .* use --no-resident"):
        read(odd)
    with pytest.raises(ValueError, match=r"/set/4\.png: empty file; repair"):
        read(policy="stop")


def test_a_run_resumes_on_it_bit_by_bit(micro, tmp_path, monkeypatch):
    micro = replace(micro, input=replace(micro.input, resident=True), augment=replace(micro.augment, color_jitter=0, erase=0))
    train(micro)
    run = replace(micro, out=str(tmp_path / "pieces"))
    assert train_in_pieces(run, monkeypatch, 3) >= 2
    assert fingerprint(run.out) == fingerprint(micro.out)


def test_nothing_is_read_twice():
    reads = []

    class Counted(Shades):
        def read(self, index):
            reads.append(index)
            return super().read(index)

    read(Counted(20))
    assert sorted(reads) == list(range(20))
