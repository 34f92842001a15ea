"""Reading one picture from a file nobody vouches for: an RGB image, or a `BadImage` that says why not."""

import contextlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

# First bytes -> reader. `Image.open` would do, but for its pixel limit: it fires first, hides the picture's size and caps ours.
_READERS: dict[bytes, type[ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"RIFF": WebPImageFile,
    b"BM": BmpImageFile,
    b"GIF8": GifImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
    b"II+\0": TiffImageFile,  # + for *: files above 4 GB
    b"MM\0+": TiffImageFile,
    **{b"P%d" % kind: PpmImageFile for kind in range(1, 7)},
}
FORMATS = tuple(dict.fromkeys(reader.format for reader in _READERS.values()))
ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
EXTENSIONS = tuple(ending for endings in ENDINGS.values() for ending in endings)
LARGEST = 1 << 30  # bytes of a file that is read whole

_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WARNINGS = threading.Lock()
if hasattr(os, "register_at_fork"):  # a worker forked while another thread reads must not inherit a lock that nobody will release
    os.register_at_fork(before=_WARNINGS.acquire, after_in_parent=_WARNINGS.release, after_in_child=_WARNINGS.release)


class BadImage(Exception):
    """A picture that cannot be read: `path`, in a few words `reason`, and in one its `kind`. Its text is one printable line."""

    def __init__(self, path: str, reason: str, kind: str = "damaged") -> None:
        super().__init__(path, reason, kind)
        self.path, self.reason, self.kind = path, reason, kind

    def __str__(self) -> str:
        return f"{self.path if self.path.isprintable() else ascii(self.path)}: {self.reason}"


class Mark(NamedTuple):
    """What an index knows of a sample's bytes."""

    bytes: int
    xxh3_128: str  # hexadecimal

    @classmethod
    def of(cls, content: bytes) -> "Mark":
        """The mark of these bytes."""
        return cls(len(content), xxhash.xxh3_128_hexdigest(content))


def read_image(path: str | os.PathLike[str], max_pixels: int) -> Image.Image:
    """The picture in a file, upright and in RGB, 8 bits per channel.

    JPEG, PNG, WEBP, BMP, GIF, TIFF or PPM by content, whatever the file is called; of animations and multi-page files
    the first picture. EXIF orientation is applied, and ignored where it is damaged. Transparency is dropped, not blended:
    pixels keep the colour that is stored under it, as timm and torchvision do. 16-bit grey is scaled to 8 bits; colour
    profiles are ignored. Damage that still decodes (a flipped bit in a JPEG) cannot be seen here, but by its `Mark`.

    Args:
        max_pixels: pictures of more pixels are refused by their header, before anything is decoded.

    Raises:
        BadImage: anything else; no other error and no warning of Pillow's gets out. Safe in threads and in workers.
    """
    path = os.fsdecode(path)
    with _opened(path) as stream:
        return _read(stream, path, max_pixels)


def decode_image(content: bytes, path: str, max_pixels: int) -> Image.Image:
    """As `read_image`, the picture in these bytes; `path` is what errors call them."""
    return _read(io.BytesIO(content), path, max_pixels)


def read_content(path: str) -> bytes:
    """All bytes of a file.

    Raises:
        BadImage: no regular file, not readable, or larger than `LARGEST`.
    """
    with _opened(path) as stream:
        check_size(path, os.fstat(stream.fileno()).st_size)
        return stream.read()


def check_size(path: str, size: int) -> None:
    """See that so many bytes may be held in memory. Raises `BadImage`."""
    if size > LARGEST:
        raise BadImage(path, f"{size:,} bytes, more than the {LARGEST:,} that a picture may have", "too-large")


def check_mark(content: bytes, mark: Mark, path: str) -> None:
    """See that these are the bytes that were indexed. Raises `BadImage`."""
    found = Mark.of(content)
    if found.bytes != mark.bytes:
        raise BadImage(path, f"changed since it was indexed: {mark.bytes:,} bytes then, {found.bytes:,} now", "changed")
    if found != mark:
        raise BadImage(path, "changed since it was indexed: as many bytes, others", "changed")


def remarks(content: bytes, path: str) -> Iterator[tuple[str, str]]:
    """What is odd about a picture that can be read: kind and reason of each oddity."""
    reader = _reader(content[:16])
    ending = os.path.splitext(path)[1].lower()
    if reader and ending not in ENDINGS[reader.format]:
        yield "ending", f"a {reader.format}, by its name {ending or 'nothing'}; read by its content"
    if reader in (GifImageFile, WebPImageFile, PngImageFile, TiffImageFile):
        with contextlib.suppress(Exception), _quiet():
            if getattr(reader(io.BytesIO(content)), "is_animated", False):
                yield "several-pictures", "an animation or several pages; the first picture is taken"


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before opening: opening a fifo waits for a writer
            raise BadImage(path, "not a regular file", "not-a-file")
        with open(path, "rb") as stream:
            yield stream
    except OSError as error:
        kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        raise BadImage(path, f"cannot be read: {error.strerror or error}", kind) from None


def _reader(head: bytes) -> type[ImageFile] | None:
    return next((reader for magic, reader in _READERS.items() if head.startswith(magic)), None)


def _read(stream: BinaryIO, path: str, max_pixels: int) -> Image.Image:
    head = stream.read(16)
    if not head:
        raise BadImage(path, "empty file", "empty")
    reader = _reader(head)
    if reader is None:
        page = head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))
        what = "a web page, " if page else ""
        raise BadImage(
            path, f"not an image: starts with {head[:4]!r}, {what}none of {', '.join(FORMATS)}", "web-page" if page else "not-an-image"
        )
    stream.seek(0)
    # Pillow raises nearly everything on damaged bytes: OSError, SyntaxError, ValueError, ZeroDivisionError, zlib.error, ...
    try:
        with _quiet():
            image = reader(stream)  # the header only
    except Exception as error:
        raise BadImage(path, f"damaged {reader.format} header: {_message(error)}") from None
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(path, f"{width} x {height} pixels is more than max_pixels {max_pixels}", "too-large")
    try:
        with _quiet() if reader is TiffImageFile else contextlib.nullcontext():  # TIFF reads metadata once more when it decodes
            image.load()
        turn = _TURNS.get(_orientation(image))
        image = _to_rgb(image)
    except Exception as error:
        reason = _message(error)
        raise BadImage(path, f"cannot be decoded: {reason}", "truncated" if "truncated" in reason else "damaged") from None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow's own conversion of these modes clips at 255 instead of scaling. 16-bit PPM arrives in mode I, 0 to 65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no set range; save it with 8 or 16 bits")
    image.info.pop("transparency", None)  # Pillow warns where it has to drop it itself
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        with _quiet():
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1


def _message(error: Exception) -> str:
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences Pillow's remarks on metadata, but makes errors of its bomb warnings.

    Python's warning filters belong to the process, so readers take turns. What is slow, decoding, stays outside.
    """
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
