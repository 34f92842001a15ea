"""Pictures that are none, one function for each row of the list of bad inputs (31 to 50). Each fills a folder and says what is bad.

Idea and many of the files: Pillow's and torchvision's own reports of crashes; see docs/data.md.
"""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.pictures import NOISE, chunk, encoded, png

Said = dict[str, str]
"""File name -> what `data verify` calls it (its kind); a warning, or nothing where the picture is fine, in brackets."""
FINE = "(fine)"


def _write(folder: Path, files: dict[str, tuple[bytes, str]]) -> Said:
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    return {name: said for name, (_, said) in files.items()}


def row_31_no_picture(folder: Path) -> Said:
    random = b"\x07" + np.random.default_rng(1).bytes(500)
    files = {"empty.jpg": (b"", "empty"), "html.jpg": (b"\n <html><body>404</body></html>", "web-page")}
    return _write(folder, {**files, "random.jpg": (random, "not-an-image"), "magic.png": (b"\x89PNG\r\n\x1a\n", "damaged")})


def row_32_png_pixels(folder: Path) -> Said:
    rows = bytes(6 * 5)
    files = {
        "bad_zlib.png": png(5, 5, b"nonsense"),
        "short_data.png": png(5, 5, zlib.compress(bytes(7))),
        "bad_filter.png": png(5, 5, zlib.compress(b"\xf0" + rows[1:])),
        "empty_idat.png": png(5, 5),
        "no_adler.png": png(5, 5, zlib.compress(rows)[:-4]),
    }
    said = {"no_adler.png": "truncated", "short_data.png": "truncated"}
    return _write(folder, {name: (content, said.get(name, "damaged")) for name, content in files.items()})


def row_33_truncated(folder: Path) -> Said:
    whole_png, whole_jpeg = encoded(NOISE, "PNG"), encoded(NOISE, "JPEG")
    files = {"half.png": whole_png[: len(whole_png) // 2], "half.jpg": whole_jpeg[: len(whole_jpeg) // 2], "less_2.jpg": whole_jpeg[:-2]}
    return _write(folder, {name: (content, "truncated") for name, content in files.items()})


def row_36_many_pixels(folder: Path) -> Said:
    rows = zlib.compress(bytes((13_300 // 8 + 2) * 13_300))
    return _write(folder, {"13300.png": (png(13_300, 13_300, rows, depth=1), "too-large")})


def row_37_header_only(folder: Path) -> Said:
    return _write(folder, {"65500.png": (png(65_500, 65_500), "too-large")})


def row_38_text_bomb(folder: Path) -> Said:
    return _write(folder, {"text.png": (png(5, 5, before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 1))), "damaged")})


def row_39_many_text_chunks(folder: Path) -> Said:
    return _write(folder, {"chunks.png": (png(5, 5, zlib.compress(bytes(30)), before=chunk(b"tEXt", b"a\0b") * 100_000), FINE)})


def row_40_many_frames(folder: Path) -> Said:
    frames = [Image.new("RGB", (4, 4), (i % 256, i // 256, 0)) for i in range(2000)]
    many = {kind: encoded(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("GIF", "WEBP")}
    return _write(folder, {f"frames.{kind.lower()}": (content, "(several-pictures)") for kind, content in many.items()})


def row_41_other_formats(folder: Path) -> Said:
    loop = bytearray(encoded(Image.new("RGB", (4, 4)), "TIFF"))
    first = struct.unpack_from("<I", loop, 4)[0]
    count = struct.unpack_from("<H", loop, first)[0]
    struct.pack_into("<I", loop, first + 2 + 12 * count, first)  # the next picture is this one
    files = {
        "psd.jpg": b"8BPS\0\x01" + bytes(100),
        "eps.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "gz.jpg": b"\x1f\x8b\x08" + bytes(50),
    }
    said = {name: (content, "not-an-image") for name, content in files.items()}
    return _write(
        folder, {**said, "fits.jpg": (b"SIMPLE  =                    T" + bytes(80), "not-an-image"), "loop.tif": (bytes(loop), FINE)}
    )


def row_42_other_ending(folder: Path) -> Said:
    return _write(folder, {"jpeg.png": (encoded(NOISE, "JPEG"), "(ending)")})


def row_43_16_bits(folder: Path) -> Said:
    return _write(folder, {"deep.png": (encoded(Image.fromarray(np.array([[0, 20000, 60000]], dtype=np.uint16)), "PNG"), FINE)})


def row_44_modes(folder: Path) -> Said:
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    files = {
        "cmyk.jpg": encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"),
        "la.png": encoded(Image.new("LA", (2, 2), (90, 0)), "PNG"),
        "bit.png": encoded(Image.new("1", (2, 2), 1), "PNG"),
        "palette.png": encoded(palette, "PNG", transparency=b"\xff\x80"),
    }
    return _write(folder, {name: (content, FINE) for name, content in files.items()})


def row_45_slivers(folder: Path) -> Said:
    sizes = {"tall.png": (1, 60_000), "wide.png": (60_000, 1)}
    return _write(folder, {name: (encoded(Image.new("RGB", size), "PNG"), FINE) for name, size in sizes.items()})


def row_46_zero_width(folder: Path) -> Said:
    return _write(folder, {"none.png": (png(0, 5, zlib.compress(bytes(5))), "damaged")})


def row_47_exif(folder: Path) -> Said:
    turned = Image.Exif()
    turned[0x0112] = 6
    far = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x010E, 2, 5000, 4000) + b"\0\0\0\0"
    given = {"turned.jpg": turned.tobytes(), "garbage.jpg": b"Exif\0\0garbage", "far.jpg": far}
    return _write(folder, {name: (encoded(NOISE, "JPEG", exif=exif), FINE) for name, exif in given.items()})


def row_48_colour_profile(folder: Path) -> Said:
    bomb = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200_000_000), 1))
    return _write(
        folder,
        {
            "bomb.png": (png(5, 5, zlib.compress(bytes(30)), before=bomb), "damaged"),
            "bad.jpg": (encoded(NOISE, "JPEG", icc_profile=b"no profile" * 9), FINE),
        },
    )


def row_49_no_file(folder: Path) -> Said:
    os.mkfifo(folder / "fifo.jpg")
    os.symlink("/dev/zero", folder / "device.jpg")
    os.symlink("loop.jpg", folder / "loop.jpg")
    os.symlink("nowhere.jpg", folder / "dangling.jpg")
    return {"fifo.jpg": "not-a-file", "device.jpg": "not-a-file", "loop.jpg": "unreadable", "dangling.jpg": "missing"}


def row_50_names(folder: Path) -> Said:
    names = [os.fsdecode(name) for name in (b"a\nb.jpg", b"caf\xe9.jpg", b"\x1b[31mred.jpg")]
    return _write(folder, {**dict.fromkeys(names, (b"<html>", "web-page")), "\u00fc\n.jpg": (encoded(NOISE, "JPEG"), FINE)})


ROWS: dict[int, Callable[[Path], Said]] = {
    int(name.split("_")[1]): function for name, function in list(globals().items()) if name.startswith("row_")
}
