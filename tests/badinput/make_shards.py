"""Folders and tars that are no sets: rows 74 to 80 of the list of bad inputs, one function each."""

import io
import shutil
import tarfile
from pathlib import Path
from typing import NamedTuple

from tests.badinput.make_weights import Payload


class Case(NamedTuple):
    """A set, and what is expected of it."""

    data: str
    trains: bool  # whether it is used for what it has
    said: tuple[str, ...]  # in the message, or in what `data verify` finds


def tarred(path: Path, members: dict[str, bytes], *more: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
        for header in more:
            tar.addfile(header, io.BytesIO(b"x" * header.size) if header.isreg() else None)
    return path


def contents(pictures: Path) -> dict[str, bytes]:
    """A good set's members."""
    return {str(path.relative_to(pictures)): path.read_bytes() for path in sorted(pictures.rglob("*.png"))}


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, link
    return header


def row_74_labels(folder: Path, pictures: Path) -> dict[str, Case]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(pictures, folder / name))

    unknown, empty, one, stems = copy("unknown"), copy("empty"), copy("one"), copy("stems")
    (unknown / "val" / "dog").rename(unknown / "val" / "emu")
    (empty / "train" / "emu").mkdir()
    (empty / "val" / "emu").mkdir()
    for split in ("train", "val"):
        shutil.rmtree(one / split / "dog")
    shutil.copy(stems / "train" / "cat" / "0.png", stems / "train" / "cat" / "0.jpg")
    return {
        "unknown class": Case(str(unknown), False, ("emu",)),
        "empty class": Case(str(empty), False, ("emu",)),
        "one class": Case(str(one), False, ("only one class, cat",)),
        "same stem": Case(str(stems), True, ("ending",)),
    }


def row_75_not_below(folder: Path, pictures: Path) -> dict[str, Case]:
    outside = {"../up.png": b"x", "/tmp/absolute.png": b"x", "train/../../up.png": b"x"}
    links = [special("train/cat/s.png", tarfile.SYMTYPE, "/etc/passwd"), special("train/cat/h.png", tarfile.LNKTYPE, "/etc/passwd")]
    devices = [special("train/cat/zero.png", tarfile.CHRTYPE), special("train/cat/fifo.png", tarfile.FIFOTYPE)]
    path = tarred(folder / "outside.tar", contents(pictures) | outside, *links, *devices)
    return {"outside": Case(str(path), True, ("skipped", "up.png", "s.png", "h.png", "zero.png", "fifo.png"))}


def row_76_damaged(folder: Path, pictures: Path) -> dict[str, Case]:
    whole = tarred(folder / "whole.tar", contents(pictures)).read_bytes()
    spoilt = {
        "truncated": whole[:-20_000],
        "garbage": whole[:4096] + b"\x07" * 2048 + whole[6144:],
        "html": b"<html>404</html>" * 99,
        "nothing": b"",
        "joined": whole + whole,
        "zipped": b"\x1f\x8b\x08" + whole,
    }
    for name, content in spoilt.items():
        (folder / f"{name}.tar").write_bytes(content)
    return {name: Case(str(folder / f"{name}.tar"), False, (f"{name}.tar",)) for name in spoilt}


def row_77_bombs(folder: Path, pictures: Path) -> dict[str, Case]:
    huge = tarfile.TarInfo("train/cat/huge.png")
    huge.size = 10**12
    (folder / "huge.tar").write_bytes(huge.tobuf() + bytes(1024))
    negative = bytearray(tarfile.TarInfo("train/cat/negative.png").tobuf(tarfile.GNU_FORMAT))
    negative[124:136] = b"\xff" * 8 + (-1024 & 0xFFFFFFFF).to_bytes(4, "big")  # base-256: tarfile before 2025 went round in circles
    negative[148:156] = b"%06o\0 " % (256 + sum(negative[:148]) + sum(negative[156:512]))
    (folder / "negative.tar").write_bytes(bytes(negative) + bytes(1024))
    pax = tarfile.TarInfo("train/cat/pax.png")
    pax.pax_headers = {"comment": "x" * 10_000_000}
    (folder / "pax.tar").write_bytes(pax.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    with open(folder / "million.tar", "wb") as file:
        block = b"".join(tarfile.TarInfo(f"train/cat/{i}.png").tobuf(tarfile.USTAR_FORMAT) for i in range(1000))
        for _ in range(20):
            file.write(block)
        file.write(bytes(1024))
    said = {"huge": "1,000,000,000,000 bytes", "negative": "says -1,024 bytes", "pax": "describes a member", "million": "twice"}
    return {name: Case(str(folder / f"{name}.tar"), False, (f"{name}.tar", words)) for name, words in said.items()}


def row_78_pickled_members(folder: Path, pictures: Path) -> dict[str, Case]:
    import pickle

    payload = pickle.dumps(Payload())
    more = {f"train/cat/0.{ending}": payload for ending in ("pkl", "pyd", "pth", "cls")} | {"train/cat/bad.png": payload}
    return {"pickled": Case(str(tarred(folder / "pickled.tar", contents(pictures) | more)), True, ("not-an-image", "other-file"))}


def row_79_addresses(folder: Path, pictures: Path) -> dict[str, Case]:
    words = ("pipe:touch 'code ran'; cat set.tar", "http://127.0.0.1:9/set.tar", "s3://bucket/set.tar", "file:///etc/passwd", "gopher://x")
    return {address.split(":")[0]: Case(address, False, ("field `data`", "an address or a command")) for address in words}


ROWS = (row_74_labels, row_75_not_below, row_76_damaged, row_77_bombs, row_78_pickled_members, row_79_addresses)
