"""Few-shot regression against scikit-learn's, its draws against their definition, its pictures against torchvision's."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import Ridge
from torch import nn
from torchvision.transforms import v2

import manyscale as ms
from manyscale.config import Preprocess
from manyscale.data.images import BadImage
from manyscale.data.sources import Digits
from manyscale.data.transforms import Squash, few_shot_transform
from manyscale.models import Features
from manyscale.tasks.fewshot import FewShot, Scores, choose, common_l2, draw, embed, few_shot, ridge, whiten
from tests.conftest import loud

GRID = tuple(2.0**exponent for exponent in (-10, 0, 4, 6, 8, 10, 12))


def sample(count, width, classes, seed=0):
    """Features (count, width) that lie around a centre of their class, on scales of their own, and labels (count,)."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres, scales = np.random.default_rng(99).normal(size=(classes, width)), np.geomspace(0.01, 100, width)
    return (centres[labels] + generator.normal(size=(count, width))) * scales + 3, labels


def prepared(few, other):
    """As the definition says it, in numpy."""
    mean, std = few.mean(0), np.sqrt(((few - few.mean(0)) ** 2).mean(0)) + 1e-5
    return [np.concatenate([(x - mean) / std, np.full((len(x), 1), 100.0)], 1) for x in (few, other)]


# --- regression --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "width"), [(12, 40), (40, 12), (13, 12), (12, 13), (4, 1)])
def test_ridge_is_that_of_scikit_learn(count, width):
    features, labels = sample(count, width, 4)
    few, other = prepared(features, sample(30, width, 4, seed=1)[0])
    ours = whiten(torch.from_numpy(features), torch.from_numpy(sample(30, width, 4, seed=1)[0]))
    np.testing.assert_allclose(ours[0].numpy(), few, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ours[1].numpy(), other, rtol=1e-12, atol=1e-12)
    targets = np.where(labels[:, None] == np.arange(4), 1.0, -1.0)
    l2s = (2.0**-10, 1.0, 2.0**6, 2.0**10, 2.0**19)
    for l2, weights in zip(l2s, ridge(torch.from_numpy(few), torch.from_numpy(targets), l2s), strict=True):
        peer = Ridge(alpha=l2, fit_intercept=False, solver="svd").fit(few, targets)
        close = 1e-8 if l2 >= 1 else 1e-6  # bias and l2 lie 10 orders of magnitude apart
        assert np.abs(weights.numpy() - peer.coef_.T).max() <= close * np.abs(peer.coef_).max()
        said = peer.predict(other)
        assert np.abs(other @ weights.numpy() - said).max() <= close * np.abs(said).max()


@pytest.mark.parametrize(("count", "width"), [(9, 20), (20, 9), (10, 10)])
def test_primal_and_dual_are_one(count, width):
    """A row of zeros more or a column of zeros more changes no weight, but which of the two forms is taken."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64)
    y = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    taller = torch.cat([x, torch.zeros(30, width)]), torch.cat([y, torch.zeros(30, 3)])
    wider = torch.cat([x, torch.zeros(count, 30)], 1)
    for plain, primal, dual in zip(ridge(x, y, GRID), ridge(*taller, GRID), ridge(wider, y, GRID), strict=True):
        torch.testing.assert_close(primal, plain, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(dual[:width], plain, rtol=1e-8, atol=1e-9)
        assert (dual[width:] == 0).all()


@pytest.mark.parametrize("width", [6, 60])
def test_whole_evaluation_is_that_of_scikit_learn(width):
    (features, labels), (other, truth) = sample(90, width, 5), sample(200, width, 5, seed=1)
    ours = few_shot(*map(torch.from_numpy, (features, labels, other, truth)), shots=(10, 1, 5), seeds=2, l2s=(64, 1))
    assert ours.shots == (1, 5, 10) and ours.l2s == (1, 64) and ours.pictures == (5, 25, 50) and ours.test_pictures == 200
    for s, shots in enumerate(ours.shots):
        for seed in range(2):
            generator = np.random.default_rng(seed)
            pick = np.concatenate([generator.permutation(np.flatnonzero(labels == c))[:shots] for c in range(5)])
            few, test = prepared(features[pick], other)
            for place, l2 in enumerate(ours.l2s):
                peer = Ridge(alpha=l2, fit_intercept=False, solver="cholesky").fit(few, np.eye(5)[labels[pick]] * 2 - 1)
                accuracy = (peer.predict(test).argmax(1) == truth).mean()
                assert ours.accuracy[s, seed, place].item() == pytest.approx(accuracy, abs=1e-12)
    assert 0.4 < ours.mean[2, 0] <= 1


def test_digits_show_the_interpolation_peak():
    """Pixels of 8 x 8 digits: with next to no penalty, 50 pictures of 64 features are worse than 10, and than 100."""
    parts = []
    for source in (Digits(held_out=False), Digits(held_out=True)):
        parts.append(torch.tensor(np.stack([np.asarray(source.read(i))[..., 0].ravel() for i in range(len(source))]), dtype=torch.float64))
        parts.append(torch.tensor([source.label(i) for i in range(len(source))]))
    mean = few_shot(*parts, seeds=10, l2s=GRID).mean * 100
    measured = torch.tensor([36.0, 73.2, 82.3, 82.7, 81.1, 78.5, 76.6])  # on another split, 3 seeds
    assert (mean[1] - measured).abs()[1:].max() < 2 and (mean[1] - measured).abs()[0] < 4
    assert mean[1, 0] < mean[0, 0] - 10 and mean[1, 0] < mean[2, 0] - 30
    assert mean[3, 0] > 88 and mean.argmax(1).tolist()[1] == 3  # 2^6: small features want less than 2^10


# --- draws -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    shots=st.integers(1, 6),
    more=st.integers(0, 6),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_choice(labels, shots, more, seed, data):
    labels = np.array(labels)
    chosen = choose(labels, shots, seed)
    generator = np.random.default_rng(seed)
    by_definition = [generator.permutation(np.where(labels == c)[0])[:shots] for c in range(5)]
    assert chosen.tolist() == np.concatenate(by_definition).tolist()
    assert np.bincount(labels[chosen], minlength=5).tolist() == np.minimum(np.bincount(labels, minlength=5), shots).tolist()
    assert set(chosen) <= set(choose(labels, shots + more, seed)) and len(set(chosen)) == len(chosen)
    usable = np.array(data.draw(st.lists(st.booleans(), min_size=len(labels), max_size=len(labels))))
    instead = choose(labels, shots, seed, usable)
    assert usable[instead].all() and set(chosen[usable[chosen]]) <= set(instead)


def test_classes_too_small():
    labels = [0] * 9 + [1] * 3 + [2] * 4
    with pytest.raises(
        ValueError, match=r"field `shots`: class dog has 3 readable pictures in the train split, not 5; ask for fewer shots"
    ):
        draw(labels, (1, 5), classes=("cat", "dog", "cow"))
    with pytest.raises(ValueError, match="class 1 has 3 readable"):
        draw(labels, (4,))
    drawn = draw(labels, (1, 4, 5), 2, classes=("cat", "dog", "cow"), fewer=True)
    assert drawn.short == {4: {"dog": 3}, 5: {"dog": 3, "cow": 4}}
    assert [len(picks[0]) for picks in drawn.picks] == [3, 11, 12] and all(len(picks) == 2 for picks in drawn.picks)
    assert draw([0, 0, 5, 5], (2,)).short == {}  # labels that nobody has are no small classes


# --- what is refused ---------------------------------------------------------------------------------------------------


def refused(words, *, train=None, truth=None, test=None, **options):
    features, labels = sample(40, 6, 4)
    features, labels, options = torch.from_numpy(features), torch.from_numpy(labels), {"shots": (2,), **options}
    with pytest.raises(ValueError, match=words):
        few_shot(
            features if train is None else train,
            labels[: len(labels) if train is None else len(train)],
            features if test is None else test,
            labels if truth is None else truth,
            **options,
        )


def test_bad_features_are_refused():
    broken = torch.ones(40, 6).double().cumsum(0)
    broken[3, 2], broken[5, 1], broken[5, 2] = math.nan, math.inf, -math.inf
    refused(r"features of 2 of 40 train pictures are NaN or infinite", train=broken)
    refused(r"features of 2 of 40 test pictures are NaN or infinite", test=broken)
    refused(r"all 40 train pictures have the same features", train=torch.full((40, 6), 0.7))
    refused(r"all 40 train pictures have the same features", train=torch.zeros(40, 6))
    refused(r"all 40 train pictures have the same features", train=0.7 + 1e-8 * torch.rand(40, 6))
    refused("no picture of the train split could be read", train=torch.zeros(0, 6))
    refused("no picture of the test split could be read", test=torch.zeros(0, 6), truth=torch.zeros(0, dtype=torch.int64))
    wanted = torch.arange(40) % 6
    refused("no readable picture of class cow, 5 in the train split", truth=wanted, classes=("a", "b", "c", "d", "cow"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shots": ()}, "field `shots`"),
        ({"shots": (0, 1)}, "field `shots`: .* at least 1"),
        ({"seeds": 0}, "field `seeds`: 0 must be at least 1"),
        ({"l2s": ()}, "field `l2`"),
        ({"l2s": (1.0, 0.0)}, "field `l2`: .* positive"),
        ({"l2s": (math.nan,)}, "field `l2`"),
        ({"l2s": (math.inf,)}, "field `l2`"),
    ],
)
def test_settings_out_of_range(options, words):
    refused(words, **options)
    with pytest.raises(ValueError, match=words):
        FewShot(train=Shades(), test=Shades(), **options)


def test_a_feature_without_variance_does_no_harm():
    features, labels = map(torch.from_numpy, sample(40, 6, 4))
    more = torch.cat([features, torch.full((40, 1), 5.0)], 1)
    plain, with_it = (few_shot(x, labels, x, labels, shots=(5,), l2s=(1.0,)) for x in (features, more))
    assert torch.equal(plain.accuracy, with_it.accuracy)


# --- results -----------------------------------------------------------------------------------------------------------


def result(rows):
    """The scores of one set, two shot counts alike, one seed."""
    return Scores((1, 5), (1.0, 2.0, 4.0), torch.tensor([[rows], [rows[::-1]]], dtype=torch.float64), (2, 10), 100, 2)


def test_means_deviations_and_the_best():
    accuracy = torch.tensor([[[0.1, 0.5], [0.3, 0.7], [0.5, 0.6]]], dtype=torch.float64)
    scores = Scores((5,), (1.0, 64.0), accuracy, (50,), 100, 10)
    assert scores.best() == {5: (64.0, pytest.approx(0.6))}
    torch.testing.assert_close(scores.deviation, torch.tensor([[0.2, 0.1]], dtype=torch.float64))
    row = scores.rows()[0]
    assert row == {"shots": 5, "l2": 1.0, "accuracy": pytest.approx(0.3), "deviation": pytest.approx(0.2), "seeds": [0.1, 0.3, 0.5]}
    assert scores.as_json()["best"] == [{"shots": 5, "l2": 64.0, "accuracy": pytest.approx(0.6)}]
    one = result([0.5, 0.5, 0.4])
    assert one.deviation.isnan().all() and one.rows()[0]["deviation"] is None
    assert one.best()[1] == (1.0, 0.5)  # the smallest of equals


def test_one_l2_for_several_sets():
    """A set where much is to be gained has no more say than any other: ranks count."""
    wide, narrow, other = result([0.9, 0.2, 0.1]), result([0.50, 0.52, 0.51]), result([0.60, 0.62, 0.61])
    assert common_l2([wide]) == {1: 1.0, 5: 4.0}
    assert common_l2([wide, narrow, other]) == {1: 2.0, 5: 2.0}
    assert common_l2([result([0.5, 0.5, 0.5])]) == {1: 1.0, 5: 1.0}
    assert common_l2([result([0.4, 0.5, 0.5]), result([0.9, 0.8, 0.7])])[1] == 2.0  # equals share the rank 1.5
    with pytest.raises(ValueError, match="the same shots and the same l2s"):
        common_l2([])
    with pytest.raises(ValueError, match="2 sets; give one or more, all with the same"):
        common_l2([wide, Scores((1, 5), (1.0,), torch.zeros(2, 1, 1), (2, 10), 100, 2)])


# --- from pictures to features -----------------------------------------------------------------------------------------


class Shades:
    """Pictures of 3 classes, each of a colour with noise, some of them bad."""

    def __init__(self, count=30, bad=(), seed=0):
        self.bad, self.labels = set(bad), np.arange(count) % 3
        pixels = np.random.default_rng(seed).normal(90, 60, (count, 9, 12, 3)) + 60 * np.eye(3)[self.labels][:, None, None]
        self.pixels = pixels.clip(0, 255).astype(np.uint8)

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        if index in self.bad:
            raise BadImage(self.path(index), "torn")
        return Image.fromarray(self.pixels[index])

    def label(self, index):
        return int(self.labels[index])

    def name(self, index):
        return f"{index:03d}.png"

    def path(self, index):
        return f"shades/{index:03d}.png"


class Means(nn.Module):
    """A model that sees 2 x 2 mean colours, noisily while it is trained, and counts what it is shown."""

    def __init__(self):
        super().__init__()
        self.drop, self.seen = nn.Dropout(0.5), 0

    def features(self, images):
        self.seen += len(images)
        return Features((), self.drop(nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)))


PRE = Preprocess(image_size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def evaluate(evaluation, model, report=lambda path, reason: None):
    return evaluation.scores(model, PRE, torch.device("cpu"), torch.float32, report)


def test_embedding():
    source, model, left_out = Shades(10, bad=(0, 4, 5)), Means().train(), []
    found = embed(model, source, few_shot_transform(PRE), lambda *bad: left_out.append(bad), batch=2)
    assert model.training and found.features.dtype == torch.float64 and found.features.shape == (7, 12)
    assert left_out == [(source.path(index), "torn") for index in (0, 4, 5)]
    assert found.kept.tolist() == [1, 2, 3, 6, 7, 8, 9] and found.labels.tolist() == [1, 2, 0, 0, 1, 2, 0]
    images = torch.stack([few_shot_transform(PRE)(source.read(index)) for index in found.kept])
    assert torch.equal(found.features, model.eval().features(images).pooled.double())
    none = embed(model, Shades(2, bad=(0, 1)), few_shot_transform(PRE), lambda *bad: None)
    assert not model.training and not len(none.features) and not len(none.labels) and not len(none.kept)
    with pytest.raises(ValueError, match=r"shades/000\.png: torn"):
        embed(model.train(), source, few_shot_transform(PRE), lambda *bad: None, policy="stop")
    assert model.training, "after a failure too"


def test_only_what_is_drawn_is_looked_at():
    train, test, model, transform = Shades(300), Shades(30, seed=1), Means(), few_shot_transform(PRE)
    evaluation = FewShot(train=train, test=test, shots=(1, 5), l2s=(1.0, 64.0), batch=16)
    scores = evaluate(evaluation, model)
    assert model.seen <= 3 * 5 * 3 + 30
    whole, other = (embed(model, source, transform, lambda *bad: None) for source in (train, test))
    on_all = few_shot(whole.features, whole.labels, other.features, other.labels, shots=(1, 5), l2s=(1.0, 64.0))
    assert torch.equal(scores.accuracy, on_all.accuracy) and scores.rows() == on_all.rows()
    assert scores.mean[1, 0] > 0.6
    numbers = evaluation(model, PRE, torch.device("cpu"), torch.float32, lambda *bad: None)
    assert numbers == {"1shot": scores.mean[0].max().item(), "5shot": scores.mean[1].max().item()}


def test_bad_files_make_way_for_the_next():
    train = Shades(30)
    drawn = choose(train.labels, 4, 0)
    train.bad, left_out = {int(drawn[0]), int(drawn[5])}, []
    scores = evaluate(
        FewShot(train=train, test=Shades(9, bad=(2,), seed=1), shots=(4,), seeds=1), Means(), lambda *bad: left_out.append(bad)
    )
    assert scores.pictures == (12,) and scores.test_pictures == 8 and not scores.short
    assert sorted(path for path, _ in left_out) == sorted([*(train.path(index) for index in train.bad), "shades/002.png"])
    usable = np.array([index not in train.bad for index in range(30)])
    kept = embed(Means(), train, few_shot_transform(PRE), lambda *bad: None)
    other = embed(Means(), Shades(9, bad=(2,), seed=1), few_shot_transform(PRE), lambda *bad: None)
    pick = np.searchsorted(kept.kept, choose(train.labels, 4, 0, usable))
    few, test = whiten(kept.features[pick], other.features)
    targets = 2.0 * torch.eye(3, dtype=torch.float64)[kept.labels[pick]] - 1
    right = (test @ next(iter(ridge(few, targets, [2.0**10])))).argmax(1) == other.labels
    assert scores.accuracy.item() == pytest.approx(right.double().mean().item(), abs=1e-12)


def test_too_many_bad_files():
    train = Shades(12, bad=(0, 3, 6))
    words = "class red has 1 readable pictures in the train split, not 2"
    with pytest.raises(ValueError, match=words):
        evaluate(FewShot(train=train, test=Shades(9), shots=(2,), classes=("red", "green", "blue")), Means())
    scores = evaluate(FewShot(train=train, test=Shades(9), shots=(2,), fewer=True), Means())
    assert scores.short == {2: {"0": 1}} and scores.pictures == (5,)
    train.bad.add(9)
    with pytest.raises(ValueError, match="no readable picture of class red in the train split, but some in the test split"):
        evaluate(FewShot(train=train, test=Shades(9), shots=(2,), fewer=True, classes=("red", "green", "blue")), Means())
    with pytest.raises(ValueError, match="no picture of the train split could be read"):
        evaluate(FewShot(train=Shades(6, bad=range(6)), test=Shades(9), shots=(2,), fewer=True), Means())
    with pytest.raises(ValueError, match="no picture of the test split could be read"):
        evaluate(FewShot(train=Shades(6), test=Shades(6, bad=range(6)), shots=(2,)), Means())
    with pytest.raises(ValueError, match="field `batch`: 0 must be at least 1"):
        FewShot(train=train, test=train, batch=0)


@pytest.mark.parametrize("name", ["swinv2_tiny", "vit_base_patch16"])
def test_models_of_the_house(name):
    """Pooled features of every architecture are of use, in bfloat16 too, and the model does not change."""
    fields = {"depths": (1, 1), "window": 2, "heads": (1, 2)} if name.startswith("swin") else {"depth": 2, "mlp_width": 24, "heads": 2}
    model = loud(ms.create_model(name, image_size=8, patch=2, width=12, classes=0, **fields)).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    evaluation = FewShot(train=Shades(60), test=Shades(30, seed=1), shots=(5, 15), l2s=(1.0,))
    for precision in (torch.float32, torch.bfloat16):
        assert evaluation(model, PRE, torch.device("cpu"), precision, lambda *bad: None)["15shot"] > 0.5
    assert model.training and all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


# --- the picture's way in ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("picture_size", [(300, 200), (31, 57), (256, 256)])
@pytest.mark.parametrize("size", [(224, 224), (32, 32), (48, 32)])
def test_squash_is_resize_to_a_square_and_centre_crop(interpolation, picture_size, size):
    across, down = np.meshgrid(np.linspace(0, 200, picture_size[0]), np.linspace(0, 250, picture_size[1]))
    picture = Image.fromarray(np.stack([across, down, (across + down) / 2], -1).round().astype(np.uint8))
    larger = [round(side * 256 / 224) for side in size]
    peer = v2.Compose([v2.Resize(larger, v2.InterpolationMode(interpolation)), v2.CenterCrop(size)])
    ours = np.asarray(Squash(size, 0.875, interpolation)(picture)).astype(int)
    difference = np.abs(ours - np.asarray(peer(picture)).astype(int))
    assert difference.max() <= (250 // min(picture_size) + 1 if interpolation == "nearest" else 1) and difference.mean() < 0.1


@pytest.mark.parametrize("picture_size", [(1, 1), (8, 8), (3, 5000), (5000, 3), (1, 60_000), (32, 32)])
def test_any_picture_goes_in(picture_size):
    for size in ((1, 1), (3, 3), (32, 32), (48, 32)):
        tensor = few_shot_transform(Preprocess(image_size=size, crop_ratio=0.5))(Image.new("RGB", picture_size, (10, 200, 90)))
        assert tensor.shape == (3, *size) and tensor.dtype == torch.float32 and tensor.isfinite().all()


def test_an_eighth_of_either_side_is_cut_off():
    """256/224, whatever the model's own crop: of 256 x 512 pixels the middle 224 x 448."""
    picture = Image.new("RGB", (512, 256))
    picture.paste((255, 255, 255), (32, 16, 480, 240))
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "nearest"}
    for ratio in (0.0, 0.5, 1.0):
        assert (few_shot_transform(Preprocess(image_size=(224, 224), crop_ratio=ratio, **plain))(picture) == 1).all()
    picture.paste((255, 0, 0), (31, 16, 34, 240))
    tensor = few_shot_transform(Preprocess(image_size=(224, 224), **plain))(picture)
    assert (tensor[1, :, 0] == 0).all() and (tensor[:, :, 1:] == 1).all(), "the crop begins at the 32nd column"


def test_statistics_are_the_models():
    tensor = few_shot_transform(Preprocess(image_size=(8, 8), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0)))(
        Image.new("RGB", (20, 8), (255, 0, 51))
    )
    assert torch.allclose(tensor, torch.tensor([1.0, -1.0, 0.1])[:, None, None].expand(3, 8, 8), atol=1e-6)
