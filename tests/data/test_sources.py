"""Sets, splits and hold-outs: the same on every machine, and errors that name the folder and the fix."""

import os
import pickle
import shutil
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from manyscale.config import Input
from manyscale.data.images import BadImage
from manyscale.data.sources import Cached, Digits, find_folder, open_split, open_splits


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYSCALE_DATA", str(tmp_path / "home"))
    return tmp_path / "home"


def make(root, *parts: str, count: int = 5, shade: int = 0) -> str:
    """Class folders such as `train/cat` with `count` pictures each."""
    for part in parts:
        (root / part).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (4, 3), (shade + index, 0, 0)).save(root / part / f"{index}.png")
    return str(root)


def ids(source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def test_digits():
    train, val, classes, name, _ = open_splits(Input(), 0)
    assert (len(train) + len(val), len(classes), name) == (1797, 10, "digits")
    assert not set(ids(train)) & set(ids(val))
    assert ids(open_splits(Input(), 1).val) == ids(val), "the run's seed must not move the hold-out"
    counts = np.bincount([val.label(index) for index in range(len(val))])
    assert len(val) == 359 and counts.min() >= 35 and counts.max() <= 37
    pixels = np.stack([np.asarray(val.read(index)) for index in range(50)])
    assert pixels.shape == (50, 8, 8, 3) and pixels.max() == 255 and pixels.min() == 0
    assert val.path(0) == "digits/" + val.name(0) and val.name(0).startswith(f"{val.label(0)}/")
    assert set(np.unique(pixels)) <= {round(level * 255 / 16) for level in range(17)}


def test_folder_without_splits_is_held_out_by_class(tmp_path):
    root = make(tmp_path / "set", "cat", "dog", count=20)
    train, val, classes, name, _ = open_splits(Input(data=root, holdout=0.25), 0)
    assert classes == ("cat", "dog") and name == "set"
    assert len(train) == 30 and len(val) == 10
    assert sorted(ids(train) + ids(val)) == sorted(ids(open_split(Input(data=root), "all", 0).source))
    assert [val.label(index) for index in range(10)] == [0] * 5 + [1] * 5
    assert all(classes[val.label(index)] == val.name(index).split("/")[0] for index in range(10))


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_what_learns_later_was_not_pre_trained_on_its_held_out_pictures(tmp_path, share):
    root = make(tmp_path / "set", "cat", "dog/young", "dog/old", count=17)
    labelled, loose = (open_splits(Input(data=root, share=share), 3, labelled=flag) for flag in (True, False))
    assert (len(loose.train), len(loose.val)) == ({1.0: 46, 0.5: 24}[share], 5)
    assert set(ids(loose.train)) == set(ids(labelled.train)) and set(ids(loose.val)) == set(ids(labelled.val))
    assert {loose.train.label(index) for index in range(len(loose.train))} == {0}


def test_many_small_folders_are_held_out_and_shared_together(tmp_path):
    root = make(tmp_path / "set", *(f"person{number}" for number in range(40)), count=2)
    splits = open_splits(Input(data=root, share=0.25), 0, labelled=False)
    assert (len(splits.train), len(splits.val)) == (18, 8)


@pytest.mark.parametrize("cache", [False, True])
def test_a_share_is_of_every_class_and_the_smaller_lies_in_the_larger(tmp_path, cache):
    root = make(tmp_path / "set", "train/cat", "train/dog", "val/cat", "val/dog", count=20)
    whole, half, tenth = (open_splits(Input(data=root, share=share, cache=cache), 0) for share in (1.0, 0.5, 0.1))
    assert [len(s.train) for s in (whole, half, tenth)] == [40, 20, 4] and {len(s.val) for s in (whole, half, tenth)} == {40}
    for splits, each in ((half, 10), (tenth, 2)):
        assert np.bincount([splits.train.label(index) for index in range(len(splits.train))]).tolist() == [each] * 2
    assert set(ids(tenth.train)) < set(ids(half.train)) < set(ids(whole.train))
    assert ids(half.train) == [name for name in ids(whole.train) if name in ids(half.train)]  # in the set's order
    for index in range(4):
        name = tenth.train.name(index)
        assert tenth.train.path(index) == os.path.join(root, name)
        with Image.open(os.path.join(root, name)) as picture:
            assert tenth.train.read(index).tobytes() == picture.convert("RGB").tobytes()
    assert ids(open_splits(Input(data=root, share=0.5), 1).train) != ids(half.train)
    assert len(open_splits(Input(data=root, share=0.001), 0).train) == 2  # at least one of each
    assert len(open_splits(Input(data=root, share=0.5), 0, labelled=False).train) == 20
    assert len(open_splits(Input(share=0.1), 0).train) == 143  # rounded class by class
    for wrong in (0.0, 1.5, -0.1):
        with pytest.raises(ValueError, match="field `share`"):
            Input(share=wrong)


def test_hold_out_is_a_function_of_seed_and_names(tmp_path):
    first = make(tmp_path / "one", "cat", "dog", count=20)
    second = tmp_path / "elsewhere"
    for name in sorted(ids(open_split(Input(data=first), "all", 0).source), reverse=True):  # another order on disk, other pixels
        (second / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(second / name)
    chosen = [ids(open_splits(Input(data=str(root)), seed).val) for root in (first, second) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] == chosen[3] == chosen[4]
    assert chosen[2] == chosen[5] != chosen[0]
    (second / "cat" / "new.png").write_bytes((second / "cat" / "0.png").read_bytes())
    assert len(set(chosen[0]) - set(ids(open_splits(Input(data=str(second)), 0).val))) <= 1, "a new file must not reshuffle the rest"


@pytest.mark.parametrize("fraction, kept", [(0.01, 1), (0.99, 4)])
def test_no_hold_out_takes_all_or_nothing(tmp_path, fraction, kept):
    root = make(tmp_path / "set", "cat", "dog")
    assert len(open_split(Input(data=root, holdout=fraction), "val", 0).source) == 2 * kept


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_split_folders(tmp_path, name):
    root = make(tmp_path / "set", "train/cat", "train/dog", f"{name}/cat", f"{name}/dog")
    train, val, classes, *_ = open_splits(Input(data=root), 0)
    assert len(train) == len(val) == 10 and classes == ("cat", "dog")
    assert train.name(0) == "train/cat/0.png" and val.name(9) == f"{name}/dog/4.png"
    assert ids(open_split(Input(data=root), name, 0).source) == ids(val)


def test_val_is_preferred_and_test_stays_reachable(tmp_path):
    root = make(tmp_path / "set", *(f"{split}/{name}" for split in ("train", "val", "test") for name in ("cat", "dog")))
    assert open_splits(Input(data=root), 0).val.name(0) == "val/cat/0.png"
    assert open_split(Input(data=root), "test", 0).source.name(0) == "test/cat/0.png"
    with pytest.raises(ValueError, match="has no split `tets`; did you mean `test`"):
        open_split(Input(data=root), "tets", 0)


def test_train_alone_is_held_out(tmp_path):
    root = make(tmp_path / "set", "train/cat", "train/dog")
    train, val, *_ = open_splits(Input(data=root, holdout=0.2), 0)
    assert len(train) == 8 and len(val) == 2 and val.name(0).startswith("train/cat/")


def test_test_alone_can_be_evaluated(tmp_path):
    root = make(tmp_path / "set", "test/cat", "test/dog")
    assert open_split(Input(data=root), "test", 0).classes == ("cat", "dog")
    with pytest.raises(ValueError, match="no split `train`; known: test, val"):
        open_splits(Input(data=root), 0)


def test_a_class_may_be_called_train(tmp_path):
    root = make(tmp_path / "set", "train", "plane", "val")
    assert open_splits(Input(data=root), 0).classes == ("plane", "train", "val")


def test_what_a_folder_listing_takes(tmp_path):
    root = tmp_path / "set"
    make(root, "cat", "dog/deep/er", "dog/.hidden", ".git")
    for name in ("cat/.a.png", "cat/notes.txt", "dog/UPPER.JPEG", "readme.md"):
        (root / name).write_bytes(b"x")
    os.symlink(root / "dog", root / "dog" / "deep" / "circle")
    os.symlink(root / "cat" / "0.png", root / "dog" / "link.png")
    source, classes, _ = open_split(Input(data=str(root)), "all", 0)
    assert classes == ("cat", "dog")
    deep = [f"dog/deep/er/{index}.png" for index in range(5)]
    assert ids(source) == [f"cat/{index}.png" for index in range(5)] + ["dog/UPPER.JPEG", *deep, "dog/link.png"]


def test_names_that_are_no_text(tmp_path):
    root = make(tmp_path / "set", "cat", "dog")
    os.rename(os.fsencode(root) + b"/cat/0.png", os.fsencode(root) + b"/cat/\xff\n.png")
    source = open_split(Input(data=root), "all", 0).source
    index = next(index for index in range(10) if source.name(index) == os.fsdecode(b"cat/\xff\n.png"))
    assert source.read(index).size == (4, 3)


def test_by_name_under_the_data_home(tmp_path, home, monkeypatch):
    make(home / "flowers", "rose", "tulip")
    assert open_splits(Input(data="flowers"), 0).classes == ("rose", "tulip")
    with pytest.raises(ValueError, match=r"`data`.*'flowres'.*give the path of a folder.*did you mean `flowers`"):
        open_splits(Input(data="flowres"), 0)
    with pytest.raises(ValueError, match="known: digits, flowers"):
        open_splits(Input(data="/no/such/thing"), 0)
    monkeypatch.chdir(home)
    assert find_folder("flowers") == find_folder("./flowers") == str(home / "flowers")


def test_home_may_be_missing():
    with pytest.raises(ValueError, match="known: digits"):
        open_splits(Input(data="x"), 0)


def empty(root):
    root.mkdir()


def flat(root):
    root.mkdir()
    Image.new("RGB", (4, 3)).save(root / "a.png")


def flat_splits(root):
    root.mkdir()
    flat(root / "train")
    flat(root / "val")


def no_images(root):
    make(root, "cat", "dog", count=0)


def empty_class(root):
    make(root, "cat", "dog")
    make(root, "emu", "fox", count=0)


def one_class(root):
    make(root, "cat")


def other_classes(root):
    make(root, "train/cat", "train/dog", "val/cat", "val/emu", "val/fox")


def lone_image(root):
    make(root, "cat")
    make(root, "dog", count=1)


ERRORS = {
    empty: "set holds no class folders and no images at all; put each class's pictures into a folder of its own",
    flat: "set holds pictures but no class folders; put each class's",
    flat_splits: "set/train holds pictures but no class folders",
    no_images: "set holds no images at all",
    empty_class: "set: no images for the class emu, fox; add some, or remove",
    one_class: "set holds only one class, cat; add a folder",
    other_classes: "set/val and the train split .* has besides emu, fox and lacks dog",
    lone_image: "class dog has a single image, dog/0.png, which cannot be split",
}


@pytest.mark.parametrize("prepare, message", ERRORS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_errors_name_the_folder_and_the_fix(tmp_path, prepare, message):
    prepare(tmp_path / "set")
    with pytest.raises(ValueError, match=message):
        open_splits(Input(data=str(tmp_path / "set")), 0)


def test_pixel_limit_reaches_the_files(tmp_path):
    root = make(tmp_path / "set", "cat", "dog")
    with pytest.raises(BadImage, match="more than max_pixels 11"):
        open_splits(Input(data=root, max_pixels=11), 0).train.read(0)


def test_cache_keeps_the_pixels_and_the_bad_files(tmp_path):
    root = tmp_path / "set"
    make(root, "cat", "dog")
    Image.fromarray(np.arange(75, dtype=np.uint8).reshape(5, 5, 3)).save(root / "dog" / "9.png")
    (root / "cat" / "3.png").write_bytes(b"")
    plain, cached = (open_split(Input(data=str(root), cache=cache), "all", 0).source for cache in (False, True))
    shutil.rmtree(root / "dog")  # what is kept needs no file
    assert isinstance(cached, Cached) and ids(cached) == ids(plain)
    for source in (cached, pickle.loads(pickle.dumps(cached))):
        assert np.array_equal(np.asarray(source.read(10)).ravel(), np.arange(75))
        assert np.array_equal(np.asarray(source.read(4)), np.asarray(plain.read(4))) and source.read(4).mode == "RGB"
        with pytest.raises(BadImage) as caught:
            source.read(3)
        assert (caught.value.path, caught.value.reason) == (str(root / "cat/3.png"), "empty file")
        assert [source.label(index) for index in range(11)] == [0] * 5 + [1] * 6


def test_sources_pickle():
    source = Digits(held_out=True)
    assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(source)).read(7)), np.asarray(source.read(7)))


@pytest.mark.parametrize("name, sizes, classes", [("cifar10", (50_000, 10_000), 10), ("clothing", (3068, 341), 10)])
def test_real_sets(monkeypatch, name, sizes, classes):
    monkeypatch.delenv("MANYSCALE_DATA")
    try:
        find_folder(name)
    except ValueError:
        pytest.skip(f"the set {name} is not on this machine")
    splits = open_splits(Input(data=name), 0)
    assert (len(splits.train), len(splits.val)) == sizes and len(splits.classes) == classes
    assert splits.val.read(len(splits.val) - 1).mode == "RGB"


def test_files_that_are_no_pictures_are_named(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(4):
            Image.new("RGB", (4, 4)).save(tmp_path / label / f"{i}.png")
    (tmp_path / "cat" / "photo.heic").write_bytes(b"x")
    (tmp_path / "dog" / "notes.txt").write_bytes(b"x")
    splits = open_splits(Input(data=str(tmp_path), holdout=0.5), 0)
    assert [os.path.basename(path) for path in splits.ignored] == ["photo.heic", "notes.txt"]
    assert len(splits.train) == len(splits.val) == 4


def test_evaluating_on_some_of_the_held_out_pictures():
    whole = open_splits(Input(data="digits"), 0)
    some = open_splits(Input(data="digits", held_out=10), 0)
    names = [whole.val.name(index) for index in range(len(whole.val))]
    places = [names.index(some.val.name(index)) for index in range(len(some.val))]
    assert len(places) == 10 and places[0] == 0 and places[-1] == len(names) - 1
    assert max(b - a for a, b in pairwise(places)) - min(b - a for a, b in pairwise(places)) <= 1
    assert len(some.train) == len(whole.train) and len(open_splits(Input(data="digits", held_out=10**6), 0).val) == len(names)
    assert len(open_split(Input(data="digits", held_out=10), "val", 0).source) == len(names), "what scores a saved model sees all"
    with pytest.raises(ValueError, match="field `held_out`"):
        Input(held_out=-1)
