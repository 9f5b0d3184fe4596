"""One picture file -> upright RGB pixels: which kinds are read, how large they may be, and what a damaged one says.

open_image decodes for every stage. A file is judged by its content, never by its suffix."""

import contextlib
import os
import re
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from common.console import UserError, reason_of

# Pillow reads 40 more, some of them by running other programs (EPS); of an animation the first frame is taken
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 64_000_000  # a 65-byte PNG can claim 400 million
MAX_ASPECT = 20  # a 1 x 5000 picture becomes 250 million pixels when its shortest edge is resized to 224
# A picture of 64 million pixels takes 0.25 GB decoded and twice that while its colours are converted; above this many
# pixels one picture is decoded and transformed at a time, however many threads there are.
BIG = 16_000_000
# Bytes that Pillow takes at once for a picture. What it takes in its own 16 MB the C library keeps for each thread when
# it is freed (eight threads held 3.4 GB); from 32 MB on it is given back.
Image.core.set_block_size(64 << 20)
# A progressive JPEG is decoded as often as it has scans: ten as a rule, and a file of 2 MB can hold 10,000.
MAX_SCANS = 100
MAX_SCANNED = 20 * MAX_PIXELS  # scans times pixels: some ten seconds of decoding
# Camera makers and image generators put a profile or a text of some MB into a PNG; Pillow stops at 1 MB. What all texts
# of a file may take together stays at Pillow's 64 MB.
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20
# Pillow's warning from 89 million pixels on would only repeat what MAX_PIXELS says; its error from 179 million on stays
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# EXIF orientation -> the transpose that makes the picture upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# what Pillow's decoders raise on damaged bytes
DAMAGED = (OSError, EOFError, SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, struct.error)
DAMAGED += (zlib.error, Image.DecompressionBombError, RuntimeError)  # RuntimeError: AVIF
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # brands in the first box of the file
big_picture = threading.RLock()  # held while there is one; decoders.py has a lock of processes


def open_image(path: str | os.PathLike, large: str = "refuse", then: Callable[[Image.Image], Any] | None = None) -> Any:
    """Decodes a file of one of FORMATS (first frame) to an upright RGB picture; transparency is laid on white.

    large: "refuse" a picture of more than MAX_PIXELS, or "reduce" it to a half, quarter or eighth of its sides, which
    JPEG alone can do while it decodes. then: what is made of the picture, returned in its place; a big picture is held
    by one thread at a time until then() is done. UserError if the file cannot be read, with its path as `picture`."""
    try:
        with _opened(path, large) as (image, pixels), _turn(pixels):
            image = _decode(image, path)
            return then(image) if then else image
    except UserError as fault:
        fault.picture = os.fspath(path)  # a run notes it (common/resume.py)
        raise


def check_image(path: str | os.PathLike, large: str = "refuse") -> None:
    """Decodes the whole file, a JPEG to an eighth of its sides (quicker); UserError where open_image raises one."""
    with _opened(path, large, smallest=True) as (image, pixels), _turn(pixels):
        _decode(image, path)


def verify_image(path: str | os.PathLike, large: str = "refuse") -> None:
    """A quick look: header, size, and checksums where the format has them; does not decode. UserError if bad."""
    with _opened(path, large) as (image, _):
        try:
            image.verify()
        except DAMAGED as error:
            raise UserError(f"{path}: is damaged ({reason_of(error)}); replace or remove the file") from None


def regular_file(path: str | os.PathLike) -> str | os.PathLike:
    """`path` if it is a regular file, behind links too: reading a FIFO would wait for ever, a device never ends."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"{path}: is not a regular file, wanted a picture ({', '.join(FORMATS)})")
    return path


def _turn(pixels: int):
    return big_picture if pixels > BIG else contextlib.nullcontext()


@contextlib.contextmanager
def _opened(path: str | os.PathLike, large: str, smallest: bool = False):
    """(image, pixels in the file): header read and judged, nothing decoded yet, a JPEG set to the scale wanted."""
    if os.stat(regular_file(path)).st_size == 0:
        raise UserError(f"{path}: is empty (0 bytes); replace or remove the file")
    try:
        image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS // 1_000_000  # Pillow's own limit
        raise UserError(f"{path}: has more than {most} million pixels; resize or crop it") from None
    except DAMAGED as error:
        reason = _other_kind(path) or reason_of(error)
        raise UserError(f"{path}: is no readable {', '.join(FORMATS)} picture ({reason})") from None
    with image:
        width, height = image.size
        jpeg = image.format in ("JPEG", "MPO")
        needed = 1
        if jpeg and large == "reduce":
            needed = max([1, *(scale for scale in (2, 4, 8) if width * height > MAX_PIXELS * (scale // 2) ** 2)])
        if reason := _refused(image, width * height // needed**2):
            raise UserError(f"{path}: is {width} x {height}, {reason}")
        if jpeg:
            _check_scans(path, width * height)
            scale = 8 if smallest else needed
            image.draft(None, (max(1, width // scale), max(1, height // scale)))
        yield image, width * height


def _refused(image: Image.Image, pixels: int) -> str:
    """Why a picture is not decoded, by its header alone; empty: it is."""
    width, height = image.size
    if pixels > MAX_PIXELS:
        return f"more than {MAX_PIXELS // 1_000_000} million pixels; resize or crop it"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"longer than {MAX_ASPECT} times its width; resize or crop it"
    if image.mode == "P" and image.palette is None:
        return "a PNG with a palette whose palette is missing; replace or remove the file"
    if image.mode == "F":
        return "a picture of floating point numbers, whose range nothing says; save it with 8 bits a channel"
    tags = getattr(image, "tag_v2", {})  # TIFF: a decoder takes memory for a whole tile, however small the picture
    tile = [side for side in (tags.get(322, 1), tags.get(323, 1)) if isinstance(side, int)]
    if len(tile) < 2 or tile[0] * tile[1] > MAX_PIXELS:
        return "a TIFF with tiles of more than 64 million pixels; replace or remove the file"
    return ""


def _check_scans(path: str | os.PathLike, pixels: int) -> None:
    """UserError for a JPEG of so many scans that it would take minutes."""
    with open(path, "rb") as file:
        data = file.read()
    most = min(MAX_SCANS, MAX_SCANNED // pixels)
    if data.count(b"\xff\xda") > most and _scans(data) > most:  # some of those may lie in a thumbnail or a profile
        raise UserError(f"{path}: is a JPEG of more than {most} scans, which takes too long to decode; save it anew")


def _scans(data: bytes) -> int:
    """Start-of-scan markers of a JPEG, up to its end; markers inside of other segments are passed over."""
    marker, at, count = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])"), 2, 0  # FF 00 is a byte FF, D0 to D7 are restarts
    while found := marker.search(data, at):
        kind = found[1]
        if kind == b"\xd9":  # end of the picture: a second one may follow
            break
        count += kind == b"\xda"
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2])  # past the segment's own bytes
    return count


def _decode(image: Image.Image, path: str | os.PathLike) -> Image.Image:
    try:
        image.load()
        orientation = image.getexif().get(0x0112, 1)  # after load: TIFF turns itself, and then says so
        image = _rgb(image)
    except DAMAGED as error:
        raise UserError(f"{path}: cannot be decoded ({reason_of(error)}); replace or remove the file") from None
    # applied here and nowhere else: the stored pixels of a phone's photograph lie on their side
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _other_kind(path: str | os.PathLike) -> str:
    """What a file that Pillow does not know is, where a user can do something about it."""
    with open(path, "rb") as file:
        head = file.read(64)
    if head[4:8] == b"ftyp" and head[8:12] in HEIC:
        return "it is HEIC, which Pillow does not read; save it as JPEG"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of git LFS, not the picture; run git lfs pull"
    if head.lstrip().startswith(b"<"):
        return "it is a web page or other markup, not a picture"
    return ""
