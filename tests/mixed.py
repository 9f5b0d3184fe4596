"""A folder of 300 pictures such as people have: photographs, every format, links, capitals, and nine broken ones."""

import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

HIDDEN = (".hidden.jpg", "._photo.jpg", ".thumbs/one.jpg")
TOTAL = 300


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes, *chunks: bytes, colour: int = 2) -> bytes:
    """A PNG of 8 bits a channel (colour 2: RGB, 3: palette, 0: grey) with more chunks before its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    body = b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def grey_png(*chunks: bytes) -> bytes:
    """8 x 8, each row 0, 1, ... 7."""
    return png(8, 8, b"".join(b"\0" + bytes(range(8)) for _ in range(8)), *chunks, colour=0)


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    """A smooth picture, another for each seed."""
    y, x = np.mgrid[0:height, 0:width]
    a, b, c = np.random.default_rng(seed).uniform(1, 6, 3)
    waves = (np.sin(x / a) + np.cos(y / b), np.sin((x + y) / c), np.cos(x / b - y / a) + np.sin(y / c))
    return Image.fromarray(np.stack([60 * wave + 128 for wave in waves], -1).clip(0, 255).astype(np.uint8))


def upright(width: int = 40, height: int = 24) -> Image.Image:
    """Blue, its top left quarter red."""
    image = Image.new("RGB", (width, height), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, width // 2, height // 2))
    return image


def build(root: Path, photos: list[Path]) -> tuple[list[str], list[str]]:
    """Writes root/ with 300 pictures, and what it links to beside it -> names that can be read, and those that cannot.

    photos: files to copy; with fewer than needed the rest is drawn."""
    root.mkdir()
    beside = root.parent / f"{root.name} on another disk"
    (beside / "album").mkdir(parents=True)
    good, bad = [], []

    def save(name: str, image: Image.Image, **options) -> None:
        image.save(root / name, **options)
        good.append(name)

    # every format, colour and turn
    for i, suffix in enumerate(("tif", "gif", "bmp", "avif", "webp", "png", "jpeg", "jfif")):
        save(f"format.{suffix}", picture(i), **({"format": "JPEG"} if suffix == "jfif" else {}))
    save("frames.gif", picture(20), save_all=True, append_images=[picture(21), picture(22)])
    save("cmyk.jpg", picture(23).convert("CMYK"))
    save("CAPITALS.JPG", picture(24))
    exif = Image.Exif()
    exif[0x0112] = 6
    save("turned.jpg", upright().transpose(Image.Transpose.ROTATE_90), exif=exif, quality=100, subsampling=0)
    save("jpeg inside.png", picture(25), format="JPEG")
    huge = Image.new("L", (12000, 9000))
    huge.paste(255, (6000, 0, 12000, 9000))
    save("108 megapixels.jpg", huge)
    (root / "text.png").write_bytes(grey_png(chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 2_000_000))))
    (root / "profile.png").write_bytes(grey_png(chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"x" * 2_000_000))))
    good += ["text.png", "profile.png"]

    # links to elsewhere, and one that leads back
    picture(30).save(beside / "one.jpg")
    for i in range(5):
        picture(31 + i).save(beside / f"album/{i}.png")
    (root / "linked.jpg").symlink_to(beside / "one.jpg")
    (root / "album").symlink_to(beside / "album")
    (root / "loop").symlink_to(root)
    good += ["linked.jpg", *(f"album/{i}.png" for i in range(5))]

    # what cannot be read
    (root / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    picture(40, 200, 150).save(root / "cut short.jpg", quality=95)
    os.truncate(root / "cut short.jpg", (root / "cut short.jpg").stat().st_size // 2)
    (root / "empty.jpg").touch()
    (root / "dangling.jpg").symlink_to(beside / "gone.jpg")
    os.mkfifo(root / "fifo.jpg")
    (root / "page.jpg").write_text("<!DOCTYPE html><title>404</title>")
    (root / "bomb.png").write_bytes(png(20000, 20000, b""))
    (root / "ribbon.png").write_bytes(png(1, 5000, b"\0\0\0\0" * 5000))
    (root / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    bad += ["phone.heic", "cut short.jpg", "empty.jpg", "dangling.jpg", "fifo.jpg", "page.jpg", "bomb.png"]
    bad += ["ribbon.png", "pointer.jpg"]

    # what is no picture or not to be looked at
    (root / ".thumbs").mkdir()
    for name in HIDDEN:
        picture(50).save(root / name)
    (root / "notes.txt").write_text("notes")

    (root / "photos").mkdir()
    for i in range(TOTAL - len(good) - len(bad)):
        name = f"photos/{i:03d}.jpg"
        if i < len(photos):
            shutil.copy(photos[i], root / name)
        else:
            picture(100 + i).save(root / name)
        good.append(name)
    return sorted(good), sorted(bad)
