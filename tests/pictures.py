"""Pictures as bytes, whole ones and such as no program would write."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def make_set(root: Path, *, side: int = 20, **counts: int) -> Path:
    """Noise in two classes, cat and dog: so many pictures of each class in each split, such as train=4, val=2."""
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                picture = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
                picture.save(root / split / label / f"{i}.png")
    return root


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes = b"", *, depth: int = 8, before: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + (chunk(b"IDAT", data) if data else b"") + chunk(b"IEND", b"")
