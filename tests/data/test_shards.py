"""Sets in tars: the same pictures, labels and hold-outs as in folders, read in place; anything odd is refused or passed over by name."""

import io
import os
import pickle
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from manyscale.config import Input
from manyscale.data import index as index_file
from manyscale.data import shards
from manyscale.data.images import BadImage
from manyscale.data.index import index_path, look, make_index, open_set, read_index, write_index
from manyscale.data.loader import eval_batches
from manyscale.data.shards import list_shard, pack
from manyscale.data.sources import find_folder, open_split, open_splits
from manyscale.data.transforms import eval_transform
from tests.data.test_sources import ids, make


def tarred(path, members: dict[str, bytes], format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def picture(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def members(splits=("train", "val"), count=5) -> dict[str, bytes]:
    names = [f"{split}/{label}/{i}.png" for split in splits for label in ("cat", "dog") for i in range(count)]
    return {name: picture(shade) for shade, name in enumerate(names)}


def indexed(root) -> str:
    write_index(index_path(str(root)), make_index(look(str(root)), workers=2)[0])
    return index_path(str(root))


@pytest.fixture(params=["scanned", "indexed"])
def shard(request, tmp_path):
    path = tarred(tmp_path / "set.tar", members())
    if request.param == "indexed":
        indexed(path)
    return path


def test_a_tar_is_a_set_as_a_folder_is(tmp_path, shard):
    folder = make(tmp_path / "set", "train/cat", "train/dog", "val/cat", "val/dog")
    for split in ("train", "val"):
        there, here = (open_split(Input(data=str(place)), split, 0) for place in (folder, shard))
        assert ids(here.source) == ids(there.source) and here.classes == there.classes == ("cat", "dog")
        assert [here.source.label(i) for i in range(10)] == [there.source.label(i) for i in range(10)]
    assert here.source.read(0).getpixel((0, 0)) == (10, 0, 0) and here.source.path(9) == f"{shard}:val/dog/4.png"
    assert open_splits(Input(data=str(shard)), 0).name == "set.tar"


@pytest.mark.parametrize("labelled", [True, False])
def test_hold_outs_are_those_of_the_folder(tmp_path, labelled):
    folder = make(tmp_path / "set", "cat", "dog/old", "dog/young", count=20)
    subprocess.run(["tar", "-cf", str(tmp_path / "set.tar"), "-C", folder, "."], check=True)  # names start with ./
    for share in (1.0, 0.3):
        one, other = (open_splits(Input(data=str(p), share=share), 3, labelled=labelled) for p in (folder, tmp_path / "set.tar"))
        assert ids(one.train) == ids(other.train) and ids(one.val) == ids(other.val)


def test_several_tars_are_one_set(tmp_path):
    (tmp_path / "sets" / "flowers").mkdir(parents=True)
    root = tmp_path / "sets" / "flowers"
    tarred(root / "a.tar", members(("train",)))
    tarred(root / "b.tar", members(("val",)))
    for _ in range(2):  # without an index, and with one
        splits = open_splits(Input(data=str(root)), 0)
        assert (len(splits.train), len(splits.val), splits.ignored) == (10, 10, ())
        assert splits.val.path(0) == f"{root}/b.tar:val/cat/0.png" and splits.val.read(3).size == (4, 3)
        assert indexed(root) == str(root / "index.jsonl")
    tarred(root / "c.tar", {"train/cat/0.png": picture(1)})
    with pytest.raises(ValueError, match=r"other shards than those in .*index.jsonl; run `manyscale data index"):
        open_set(str(root))
    os.remove(root / "index.jsonl")
    with pytest.raises(ValueError, match=r"c.tar: 'train/cat/0.png' is there twice"):
        open_set(str(root))


def test_by_name_and_never_by_address(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYSCALE_DATA", str(tmp_path))
    tarred(tmp_path / "set.tar", members())
    assert find_folder("set.tar") == str(tmp_path / "set.tar")
    for address in ("pipe:cat set.tar", "http://x/set.tar", "s3://x/set.tar", "file:///set.tar"):
        with pytest.raises(ValueError, match=r"field `data`: .* is an address or a command; only files of this machine"):
            find_folder(address)


def test_forked_workers_read_what_one_process_reads(shard):
    source = open_split(Input(data=str(shard)), "train", 0).source
    transform = eval_transform(preprocess())
    one, two = (list(eval_batches(source, transform, batch=4, workers=workers)) for workers in (0, 2))
    for a, b in zip(one, two, strict=True):
        assert a.ids == b.ids and np.array_equal(a.images.numpy(), b.images.numpy())
    assert pickle.loads(pickle.dumps(source)).read(3).tobytes() == source.read(3).tobytes()


def preprocess():
    from manyscale.config import Preprocess

    return Preprocess(image_size=(8, 8))


# --- what an index sees ----------------------------------------------------------------------------------------------------------


def flip(path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_a_shard_that_changed_is_refused_before_anything_is_read(tmp_path):
    path = tarred(tmp_path / "set.tar", members())
    indexed(path)
    member = list_shard(str(path)).members[3]
    flip(path, member.offset + 20)
    with pytest.raises(ValueError, match=rf"changed since it was indexed, at '{member.name}'; run `manyscale data index"):
        open_splits(Input(data=str(path)), 0)
    flip(path, member.offset + 20)
    assert len(open_splits(Input(data=str(path)), 0).train) == 10, "another time and the same bytes: a copy"
    with open(path, "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match=r"changed since it was indexed: 30,720 bytes then, 31,232 now"):
        open_splits(Input(data=str(path)), 0)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_verify_sees_a_flipped_bit_while_loading(tmp_path, kind):
    if kind == "folder":
        root = make(tmp_path / "set", "train/cat", "train/dog", "val/cat", "val/dog")
    else:
        root = str(tarred(tmp_path / "set.tar", members()))
    with pytest.raises(ValueError, match=r"field `verify`: .* has no index; run `manyscale data index"):
        open_splits(Input(data=root, verify=True), 0)
    indexed(root)
    train = open_splits(Input(data=root, verify=True), 0).train
    plain = open_splits(Input(data=root), 0).train
    assert all(train.read(i).tobytes() == plain.read(i).tobytes() for i in range(10))
    place = 0 if kind == "folder" else list_shard(root).members[0].offset
    flip(os.path.join(root, "train/cat/0.png") if kind == "folder" else root, place + 26)  # interlacing or the like
    with pytest.raises(BadImage, match=r"changed since it was indexed: as many bytes, others") as caught:
        train.read(0)
    assert caught.value.kind == "changed" and train.read(1).size == (4, 3)
    if kind == "folder":
        Image.new("RGB", (4, 3)).save(tmp_path / "set" / "train" / "cat" / "new.png")
        with pytest.raises(ValueError, match=r"1 pictures of .* are not in its index, such as 'train/cat/new.png'"):
            open_splits(Input(data=root, verify=True), 0)


def test_an_index_survives_the_disk_and_strange_names(tmp_path):
    root = make(tmp_path / "set", "cat", "dog")
    os.rename(os.fsencode(root) + b"/cat/0.png", os.fsencode(root) + b"/cat/\xff\n.png")
    found, _ = make_index(look(root), workers=2)
    write_index(tmp_path / "i.jsonl", found)
    assert read_index(str(tmp_path / "i.jsonl")) == found and len(found.marks) == 10


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda text: text[:-30], "not whole: .* run `manyscale data index` again"),
        (lambda text: text.replace('"samples": 20', '"samples": 19'), "not whole: 20 lines for 19"),
        (lambda text: "{}\n" + text, "not an index of this package"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format 2; this manyscale reads up to 1"),
        (lambda text: text.replace('"offset": ', '"offset": 99'), "line 2: 'train/cat/0.png' lies outside of its shard"),
        (lambda text: text.replace('"offset": ', '"offset": -'), "line 2: 'train/cat/0.png' lies outside"),
        (lambda text: text.replace('"shard": 0', '"shard": 7'), "line 2: .* lies outside"),
        (lambda text: text.replace('"shard": 0', '"shard": "0"'), "line 2: expected name, bytes"),
        (lambda text: text.replace("train/cat/1.png", "train/cat/0.png"), "line 3: 'train/cat/0.png' is there twice"),
        (lambda text: text.replace('"folders": [', '"folders": [1, '), "are lists of names"),
        (lambda text: text.replace('"name": "train/cat/0.png"', '"name": "x", "name": "train/cat/0.png"'), "line 2: .*`name` stands twice"),
    ],
)
def test_an_index_is_input_too(tmp_path, spoil, message):
    path = tarred(tmp_path / "set.tar", members())
    file = Path(indexed(path))
    text = file.read_text()
    assert spoil(text) != text
    file.write_text(spoil(text))
    with pytest.raises(ValueError, match=rf"set\.tar\.index\.jsonl(?s:.*){message}"):
        open_set(str(path))


def test_packing_gives_the_same_bytes_and_plain_tar_reads_them(tmp_path):
    folder = make(tmp_path / "set", "cat", "dog")
    os.utime(os.path.join(folder, "cat", "0.png"), (1, 1))
    names = look(folder).pictures()
    pack(folder, names, tmp_path / "a.tar", lambda count: None)
    os.utime(os.path.join(folder, "cat", "0.png"), (9, 9))
    pack(folder, names, tmp_path / "b.tar", lambda count: None)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    listed = subprocess.run(["tar", "-tf", str(tmp_path / "a.tar")], capture_output=True, text=True, check=True).stdout.split()
    assert listed == names == [member.name for member in list_shard(str(tmp_path / "a.tar")).members]


# --- headers ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_and_long_names(tmp_path, format):
    long = "cat/" + "n" * 90 + ".png" if format == tarfile.USTAR_FORMAT else "cat/" + "ü" * 200 + ".png"
    given = {long: picture(1), "dog/1.png": picture(2), "notes.txt": b"x"}
    found = list_shard(str(tarred(tmp_path / "a.tar", given, format)))
    content = (tmp_path / "a.tar").read_bytes()
    assert {m.name: content[m.offset : m.offset + m.bytes] for m in found.members} == given and not found.skipped


def test_what_is_no_regular_member_is_passed_over_and_told(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("/etc/passwd.png", "../up.png", "cat/../../up.png", "cat//two.png", "cat/.hidden.png", "cat/good.png", "dog/good.png"):
            header = tarfile.TarInfo(name)
            header.size = 3
            tar.addfile(header, io.BytesIO(b"abc"))
        for name, kind in (("cat/s.png", tarfile.SYMTYPE), ("cat/h.png", tarfile.LNKTYPE), ("cat/f.png", tarfile.FIFOTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "/etc/passwd"
            tar.addfile(header)
        header = tarfile.TarInfo("cat/d.png")
        header.type = tarfile.CHRTYPE
        tar.addfile(header)
    found = list_shard(str(tmp_path / "a.tar"))
    assert [member.name for member in found.members] == ["cat/good.png", "dog/good.png"]
    assert [name for name, _ in found.skipped][4:] == ["cat/s.png", "cat/h.png", "cat/f.png", "cat/d.png"] and len(found.skipped) == 8
    ignored = open_split(Input(data=str(tmp_path / "a.tar")), "all", 0).ignored
    assert f"{tmp_path}/a.tar:cat/s.png (a symbolic link)" in ignored and len(ignored) == 8


def test_limits(tmp_path, monkeypatch):
    path = str(tarred(tmp_path / "a.tar", members()))
    monkeypatch.setattr(shards, "MAX_MEMBERS", 19)
    with pytest.raises(ValueError, match="more than 19 members"):
        list_shard(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_a_listing_or_a_sentence(tmp_path, data):
    """A damaged tar ends in an error or in members that lie within it; never in a hang, and never silently short of whole blocks."""
    content = bytearray(tarred(tmp_path / "whole.tar", {f"{'n' * 120}/{i}.png": b"x" * (i * 300) for i in range(5)}).read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, 6000))
        patch = data.draw(st.binary(min_size=1, max_size=12))
        content[place : place + len(patch)] = patch
    path = tmp_path / "damaged.tar"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = list_shard(str(path))
    except ValueError as error:
        assert str(error).startswith(str(path))
    else:
        assert all(0 <= member.offset <= member.offset + member.bytes <= path.stat().st_size for member in found.members)


def test_a_shard_that_changes_under_the_index_is_told(tmp_path, monkeypatch):
    path = tarred(tmp_path / "set.tar", members())
    stamps = iter([(1, 1), (2, 2)])
    monkeypatch.setattr(index_file, "_stamp", lambda path: next(stamps))
    with pytest.raises(ValueError, match="a shard changed while it was being indexed"):
        make_index(look(str(path)), workers=1)
