"""Every file a data set may hold: decoded as documented, or refused in a few words. Never a hang, a crash or a warning."""

import os
import pickle
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from manyscale.data.images import FORMATS, BadImage, read_image
from tests.pictures import NOISE, chunk, encoded, png

LIMIT = 64_000_000


def bad_tag_exif() -> bytes:
    """One tag whose data would lie far outside the file: Pillow warns about it."""
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x010E, 2, 5000, 4000) + b"\0\0\0\0"


JPEG, PNG = encoded(NOISE, "JPEG"), encoded(NOISE, "PNG")
BAD = {
    "empty": (b"", "empty file"),
    "html": (b"<html><body>404</body></html>", "not an image: starts with b'<htm'"),
    "random": (bytes(np.random.default_rng(1).integers(0, 256, 500, dtype=np.uint8)), "not an image: starts with"),
    "psd": (b"8BPS\0\x01" + bytes(100), "not an image: starts with b'8BPS', none of JPEG"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image: starts with b'%!PS'"),
    "magic only": (b"\x89PNG\r\n\x1a\n", "damaged PNG header"),
    "jpeg header only": (JPEG[:100], "damaged JPEG header"),
    "sound": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), "damaged WEBP header"),
    "zero width": (png(0, 5, zlib.compress(bytes(5))), "damaged PNG header"),
    "text bomb": (png(5, 5, before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))), "damaged PNG header"),
    "bomb": (png(60_000, 60_000), "60000 x 60000 pixels is more than max_pixels 64000000"),
    "13300 squared": (png(13_300, 13_300), "13300 x 13300 pixels is more than max_pixels"),
    "bad zlib": (png(5, 5, b"nonsense"), "cannot be decoded"),
    "short data": (png(5, 5, zlib.compress(bytes(7))), "cannot be decoded"),
    "no data": (png(5, 5), "cannot be decoded"),
    "truncated png": (PNG[: len(PNG) // 2], "truncated"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "jpeg less 2 bytes": (JPEG[:-2], "truncated"),
    "truncated gif": (encoded(NOISE, "GIF")[:-300], "truncated"),
    "truncated bmp": (encoded(NOISE, "BMP")[:-300], "truncated"),
    "truncated tiff": (encoded(NOISE, "TIFF")[:300], "truncated"),
    "truncated webp": (encoded(NOISE, "WEBP")[:-300], "WEBP"),
    "truncated ppm": (encoded(NOISE, "PPM")[:-300], "truncated"),
    "floats": (encoded(Image.new("F", (4, 4)), "TIFF"), "mode F have no set range"),
    "32-bit": (encoded(Image.new("I", (4, 4)), "TIFF"), "mode I have no set range"),
}


@pytest.mark.parametrize("content, reason", BAD.values(), ids=BAD)
def test_bad_files_say_what_is_wrong(tmp_path, content, reason):
    path = tmp_path / "cat.jpg"
    path.write_bytes(content)
    with pytest.raises(BadImage) as caught:
        read_image(path, LIMIT)
    assert reason in caught.value.reason
    assert caught.value.path == str(path) and str(caught.value) == f"{path}: {caught.value.reason}"
    assert " at 0x" not in caught.value.reason and "\n" not in caught.value.reason


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    for path, reason in [(tmp_path, "not a regular"), (tmp_path / "fifo.png", "not a regular"), (tmp_path / "gone.png", "No such file")]:
        with pytest.raises(BadImage, match=reason):
            read_image(path, LIMIT)


def test_pixel_limit_is_inclusive_and_ours_alone(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(NOISE, "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own, which a picture of over twice as many would trip
    assert read_image(path, 1200).size == (30, 40)
    with pytest.raises(BadImage, match="30 x 40 pixels is more than max_pixels 1199"):
        read_image(path, 1199)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (3, 5000), (5000, 3), (30, 40)])
def test_every_format_and_odd_sizes(tmp_path, kind, size):
    path = tmp_path / "picture.png"  # the name says nothing: content decides
    path.write_bytes(encoded(Image.new("RGB", size, (200, 100, 50)), kind))
    picture = read_image(path, LIMIT)
    assert picture.mode == "RGB" and picture.size == size
    assert np.abs(np.asarray(picture).astype(int) - (200, 100, 50)).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, kind):
    path = tmp_path / "deep"
    path.write_bytes(encoded(Image.fromarray(np.array([[0, 20000, 40000, 60000, 65535]], dtype=np.uint16)), kind))
    assert np.asarray(read_image(path, LIMIT))[0].tolist() == [[level] * 3 for level in (0, 78, 156, 234, 255)]


def modes() -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    return {
        "grey": (encoded(Image.new("L", (2, 2), 90), "PNG"), (90, 90, 90)),
        "grey transparent": (encoded(Image.new("L", (2, 2), 90), "PNG", transparency=90), (90, 90, 90)),
        "one bit": (encoded(Image.new("1", (2, 2), 1), "PNG"), (255, 255, 255)),
        "LA": (encoded(Image.new("LA", (2, 2), (90, 0)), "PNG"), (90, 90, 90)),
        "RGBA": (encoded(Image.new("RGBA", (2, 2), (200, 100, 50, 0)), "PNG"), (200, 100, 50)),
        "palette": (encoded(palette, "PNG"), (200, 100, 50)),
        "palette with alpha": (encoded(palette, "PNG", transparency=b"\xff\x80"), (200, 100, 50)),
        "palette with one clear colour": (encoded(palette, "GIF", transparency=1), (200, 100, 50)),
        "CMYK tiff": (encoded(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        "CMYK jpeg": (encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100), (254, 0, 0)),
    }


@pytest.mark.parametrize("content, colour", modes().values(), ids=modes())
def test_every_mode_becomes_rgb(tmp_path, content, colour):
    path = tmp_path / "picture"
    path.write_bytes(content)
    pixels = np.asarray(read_image(path, LIMIT)).reshape(-1, 3).astype(int)
    assert np.abs(pixels - colour).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, kind, orientation):
    """Corners of an upright picture: red top left, green top right. Stored turned, read back upright."""
    upright = np.full((32, 48, 3), 255, dtype=np.uint8)
    upright[:16, :16], upright[:16, 32:] = (255, 0, 0), (0, 255, 0)
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1)}
    stored |= {6: np.rot90(upright), 7: np.rot90(upright, 2).swapaxes(0, 1), 8: np.rot90(upright, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned"
    path.write_bytes(encoded(Image.fromarray(np.ascontiguousarray(stored[orientation])), kind, exif=exif.tobytes()))
    picture = read_image(path, LIMIT)
    assert picture.size == (48, 32)
    for place, colour in [((5, 5), (255, 0, 0)), ((43, 5), (0, 255, 0)), ((5, 27), (255, 255, 255))]:
        assert max(abs(a - b) for a, b in zip(picture.getpixel(place), colour, strict=True)) < 40


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", bad_tag_exif()])
def test_garbage_exif_is_ignored(tmp_path, kind, exif):
    path = tmp_path / "picture"
    path.write_bytes(encoded(NOISE, kind, exif=exif))
    assert read_image(path, LIMIT).size == (30, 40)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_picture_of_many(tmp_path, kind):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    path = tmp_path / "many"
    path.write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    red, green, blue = read_image(path, LIMIT).getpixel((10, 5))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("name", [b"a\nb.png", b"caf\xe9.png", "\u00fc.png".encode()])
def test_strange_names(tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as stream:
        stream.write(b"<html>")
    with pytest.raises(BadImage) as caught:
        read_image(os.fsdecode(path), LIMIT)
    assert str(caught.value).isprintable()
    assert os.fsencode(caught.value.path) == path


def test_bad_image_survives_pickling():
    copy = pickle.loads(pickle.dumps(BadImage("a.png", "empty file")))
    assert (copy.path, copy.reason, str(copy)) == ("a.png", "empty file", "a.png: empty file")


ORIGINALS = {kind: encoded(NOISE, kind) for kind in FORMATS} | {"deflate": encoded(NOISE, "TIFF", compression="tiff_deflate")}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(list(ORIGINALS)), st.lists(st.tuples(st.floats(0, 0.999), st.binary(min_size=1, max_size=4)), max_size=4), st.data())
def test_any_damage_gives_a_picture_or_a_bad_image(tmp_path, kind, patches, data):
    content = bytearray(ORIGINALS[kind])
    for place, patch in patches:
        start = int(place * min(len(content), 400))  # headers are where it hurts
        content[start : start + len(patch)] = patch
    path = tmp_path / "damaged"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            assert read_image(path, 1_000_000).mode == "RGB"
        except BadImage as bad:
            assert bad.reason


def test_threads_and_the_process_state(tmp_path):
    """Readers silence Pillow by the process's warning filters: side by side they must leave those as they were."""
    warning, good = tmp_path / "warns.jpg", tmp_path / "good.tiff"
    warning.write_bytes(encoded(NOISE, "JPEG", exif=bad_tag_exif()))
    good.write_bytes(encoded(NOISE, "TIFF", compression="tiff_deflate"))
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as threads:
        sizes = set(threads.map(lambda path: read_image(path, LIMIT).size, [warning, good] * 200))
    assert sizes == {(30, 40)} and warnings.filters == before
    assert not ImageFile.LOAD_TRUNCATED_IMAGES and Image.MAX_IMAGE_PIXELS == 89_478_485
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1_048_576
