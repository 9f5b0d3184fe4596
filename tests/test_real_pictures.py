"""Pictures as people have them: every format, links, damage, sizes; none stops a folder of one's own, all count."""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import mixed
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_gen_deltas import tiny_vdg

import eval_cir
import gen_deltas
import mine_pairs
from common import images as images_file
from common import pixels
from common.console import UserError
from common.flags import constants_of, override
from common.images import (
    ImageStore,
    Preprocess,
    check_report,
    leave_out,
    list_images,
    load_bytes,
    unreadable,
    write_faults,
)
from common.pixels import check_image, open_image, verify_image

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest undoes pixels.py's


def photographs(count: int) -> list[Path]:
    folder = ROOT.parent / "shared" / "data" / "clothing"
    return sorted(folder.rglob("*.jpg"))[:count] if folder.is_dir() else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(root, names that can be read, names that cannot) of the mixed folder; a hang ends the test."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(120)
    root = tmp_path_factory.mktemp("mixed") / "mine"
    yield root, *mixed.build(root, photographs(280))
    signal.alarm(0)


# ---- the mixed folder ----
def test_every_picture_of_a_mixed_folder_is_read_or_counted(folder, tmp_path, capsys):
    root, good, bad = folder
    names = list_images(root)
    assert names == sorted(good + bad) and len(names) == mixed.TOTAL
    store = ImageStore(str(root), own=True)
    faults = unreadable(names, store, workers=4)
    assert sorted(faults) == bad
    assert faults == unreadable(names, store)
    for name, wanted in (
        ("phone.heic", "HEIC"), ("cut short.jpg", "truncated"), ("empty.jpg", "is empty"), ("fifo.jpg", "regular file"),
        ("dangling.jpg", "gone.jpg, where nothing is"), ("page.jpg", "web page"), ("pointer.jpg", "git lfs pull"),
        ("bomb.png", "178 million pixels"), ("ribbon.png", "1 x 5000"),
    ):  # fmt: skip
        assert wanted in faults[name] and name in faults[name] and "\n" not in faults[name]

    kept = leave_out(names, faults, f"{tmp_path}/out/unreadable.txt")
    assert kept == good
    said = capsys.readouterr().out
    assert f"9 of {mixed.TOTAL} pictures" in said and "unreadable.txt" in said
    lines = (tmp_path / "out/unreadable.txt").read_text().splitlines()
    assert sorted(lines) == sorted(faults.values()) and len(lines) == 9
    to_pixels = lambda image: images_file.np.asarray(image.resize((8, 8))).copy()  # noqa: E731
    pictures = [store.open(name, to_pixels) for name in kept]
    assert len({pixels.tobytes() for pixels in pictures}) > len(kept) - 5  # text.png and profile.png are alike

    text, ok = check_report(names, store, decode=True, workers=4, listing=f"{tmp_path}/all.txt")
    assert not ok and f"300 expected, {len(good)} present, 8 unreadable, 1 missing" in text and "all.txt" in text
    assert len((tmp_path / "all.txt").read_text().splitlines()) == 9
    text, _ = check_report(names, store)  # headers alone do not show what is cut short
    assert f"300 expected, {len(good) + 1} present, 7 unreadable, 1 missing" in text
    text, ok = check_report(good, store, decode=True, listing=f"{tmp_path}/all.txt")
    assert ok and not (tmp_path / "all.txt").exists()  # the list of an earlier look does not stay


def run_stage(stage, **given) -> None:
    """stage.main() with these flags, in this process."""
    constants = constants_of(vars(stage))
    try:
        override(vars(stage), [word for name, value in given.items() for word in (f"--{name}", str(value))])
        stage.main()
    finally:
        vars(stage).update(constants)


def test_a_mixed_folder_is_mined_described_and_queried_without_a_stop(folder, zoo, tmp_path, capsys):
    root, good, bad = folder
    how = {"device": "cpu", "workers": 2}
    rule = {"max_score": 0.9999, "min_gap": 0, "show": 2}
    run_stage(mine_pairs, images=root, encoder=zoo / "resnet", out=tmp_path / "mine", **rule, **how)
    counts = json.loads((tmp_path / "mine/stats.json").read_text())["counts"]
    assert (counts["images"], counts["unreadable"], counts["anchors"]) == (mixed.TOTAL, len(bad), len(good))
    assert json.loads((tmp_path / "mine/names.json").read_text()) == good
    assert len((tmp_path / "mine/unreadable.txt").read_text().splitlines()) == len(bad)
    text = (tmp_path / "mine/pairs.jsonl").read_text()
    assert text and not [name for name in bad if f'"{name}"' in text]

    # every pair that was mined is described
    capsys.readouterr()
    pairs = [json.loads(line) for line in text.splitlines()]
    what = {"vdg": tiny_vdg(zoo, tmp_path), "pairs": tmp_path / "mine/pairs.jsonl", "max_new": 4, "show": 2}
    run_stage(gen_deltas, images=root, out=tmp_path / "deltas", **what, **how)
    lines = [json.loads(line) for line in (tmp_path / "deltas/pseudo.jsonl").read_text().splitlines()]
    assert [(line["reference"], line["target"]) for line in lines] == [(p["reference"], p["target"]) for p in pairs]
    named = {name for pair in pairs for name in (pair["reference"], pair["target"])}
    assert f"pairs {len(pairs):,}, images {len(named):,}" in capsys.readouterr().out and len(named) > 100

    ask = {"reference": root / "108 megapixels.jpg", "text": "in red", "gallery": root, "top": mixed.TOTAL}
    run_stage(eval_cir, baseline="sum", backbone=zoo / "clip", out=tmp_path / "query", **ask, **how)
    said = capsys.readouterr().out
    found = re.findall(r"(?m)^ *\d+  -?\d\.\d{4}  (.*)$", said)
    assert sorted(found) == [name for name in good if name != "108 megapixels.jpg"]
    assert f"9 of {mixed.TOTAL} pictures cannot be read" in said
    for listing in root.parent.glob("mine.*.safetensors"):  # what the query keeps beside the folder
        listing.unlink()


def test_links_lead_anywhere_and_names_nowhere(folder, tmp_path):
    root = folder[0]
    store = ImageStore(str(root))
    assert store.open("album/3").tobytes() == mixed.picture(34).tobytes()
    assert not [name for name in list_images(root) if name.startswith(("loop", "."))]
    for name in ("../x.jpg", "album/../../x.jpg", "/etc/passwd", "loop/../../x.jpg"):
        with pytest.raises(UserError):
            store.find(name)
    for name in ("fifo.jpg", "dangling.jpg"):  # before anything hashes or opens it
        with pytest.raises((UserError, FileNotFoundError), match=name):
            store.path(name)
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    store = ImageStore(str(tmp_path))
    assert store.find("self.jpg") is None and list_images(tmp_path) == ["self.jpg", "zero.jpg"]
    with pytest.raises(UserError, match="regular file"):
        store.path("zero.jpg")


def test_img_raw_on_another_disk_and_a_snapshot_of_the_hub(tmp_path):
    disk, root = tmp_path / "disk", tmp_path / "data/img_raw"
    (disk / "train/34").mkdir(parents=True), root.mkdir(parents=True)
    mixed.picture(1).save(disk / "train/34/a.png")
    (root / "train").symlink_to(disk / "train")
    store = ImageStore(str(root), {"a": "./train/34/a.png"})
    assert store.open("a").tobytes() == mixed.picture(1).tobytes() and list_images(root) == ["train/34/a.png"]

    hub, names = tmp_path / "hub", []
    (hub / "blobs").mkdir(parents=True), (hub / "snapshots/1").mkdir(parents=True)
    for i in range(5):
        mixed.picture(i).save(hub / "blobs" / f"{i}{i}", "PNG")
        (hub / f"snapshots/1/{i}.png").symlink_to(f"../../blobs/{i}{i}")
        names.append(f"{i}.png")
    assert list_images(hub / "snapshots/1") == names
    store = ImageStore(str(hub / "snapshots/1"))
    assert [store.open(name).tobytes() for name in names] == [mixed.picture(i).tobytes() for i in range(5)]


def test_linked_folders_are_listed_once(tmp_path, capsys):
    (tmp_path / "z").mkdir()
    (tmp_path / "elsewhere").mkdir()
    mixed.picture(0).save(tmp_path / "z/x.png")
    mixed.picture(1).save(tmp_path / "elsewhere/y.png")
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "z").rename(root / "z")
    for link, goal in (("a", root / "z"), ("b", tmp_path / "elsewhere"), ("c", tmp_path / "elsewhere"), ("d", root)):
        (root / link).symlink_to(goal)
    (tmp_path / "elsewhere/back").symlink_to(root / "b")
    (root / "train").symlink_to(tmp_path / "unmounted")
    assert list_images(root) == ["b/y.png", "z/x.png"]  # the real folder of `root` gives the name, not its link
    assert re.search(r"1 links in .* lead nowhere, first .*/train", capsys.readouterr().err)


def test_a_folder_that_cannot_be_read_stops(tmp_path, monkeypatch):
    mixed.picture(0).save(tmp_path / "x.png")
    (tmp_path / "locked").mkdir()
    mixed.picture(0).save(tmp_path / "locked/y.png")
    locked = str(tmp_path / "locked")
    listdir, look = os.listdir, os.stat

    def refuse(real, at):  # the superuser, who may run the tests, is refused nothing
        def call(path, *more, **options):
            if at(os.fspath(path)):
                raise PermissionError(13, "Permission denied", path)
            return real(path, *more, **options)

        return call

    monkeypatch.setattr(os, "listdir", refuse(listdir, lambda path: path == locked))
    with pytest.raises(UserError, match="locked.*Permission denied.*missing"):
        list_images(tmp_path)
    monkeypatch.setattr(os, "listdir", listdir)
    monkeypatch.setattr(os, "stat", refuse(look, lambda path: path.startswith(locked + "/")))
    with pytest.raises(UserError, match="locked.*Permission denied"):
        ImageStore(str(tmp_path)).find("locked/y.png")
    text, ok = check_report(["x.png", "locked/y.png"], ImageStore(str(tmp_path)))
    assert not ok and "1 present, 1 unreadable, 0 missing" in text


def test_a_path_that_is_too_long_stops(tmp_path, monkeypatch):
    mixed.picture(0).save(tmp_path / "x.png")
    monkeypatch.chdir(tmp_path)
    for _ in range(25):  # 5,000 characters: each step is short, the whole is more than the system takes
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    mixed.picture(0).save("y.png")
    with pytest.raises(UserError, match="File name too long") as error:
        list_images(tmp_path)
    assert len(str(error.value)) < 600
    assert ImageStore(str(tmp_path)).find("x" * 300) is None  # a name out of a file that no file can have


def test_suffixes_in_capitals(tmp_path):
    for name in ("B00X.JPG", "b/c.PNG", "d.jpeg", "d.PNG", "e.v2.Jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        mixed.picture(len(name)).save(tmp_path / name, "PNG")
    store = ImageStore(str(tmp_path), {"t": "./b/c.jpg"})
    for name, file in (
        ("B00X", "B00X.JPG"), ("B00X.jpg", "B00X.JPG"), ("b/c", "b/c.PNG"), ("d", "d.PNG"), ("t", "b/c.PNG"),
        ("e.v2", "e.v2.Jpg"), ("B00X.png", "B00X.JPG"),
    ):  # fmt: skip
        assert os.path.samefile(store.find(name), tmp_path / file)
    assert store.missing(["b00x", "e", "b00x.jpg", "B00", "b"]) == ["b00x", "e", "b00x.jpg", "B00", "b"]
    assert store.relative("B00X") == "./B00X.JPG" and store.relative("t") == "./b/c.jpg"


# ---- formats ----
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_upright_in_every_format(tmp_path, suffix, orientation):
    # how the pixels must lie in the file so that this orientation makes them upright: the opposite turn
    undo = dict(pixels.UPRIGHT)
    undo[6], undo[8] = undo[8], undo[6]
    stored = mixed.upright().transpose(undo[orientation]) if orientation > 1 else mixed.upright()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"x.{suffix}", exif=exif, **({"quality": 100} if suffix != "tif" else {}))
    found = np.asarray(open_image(tmp_path / f"x.{suffix}"), int)
    assert found.shape == (24, 40, 3)
    inner = np.abs(found - np.asarray(mixed.upright(), int))[[2, 2, -3, -3], [2, -3, 2, -3]]  # the four corners
    assert inner.max() < 16


def test_animations_and_pages_give_the_first(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for suffix in ("gif", "tif", "avif", "webp", "png"):
        frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
        found = np.asarray(open_image(tmp_path / f"x.{suffix}"), int)
        assert np.abs(found - (255, 0, 0)).max() < 8, suffix


def test_colours_of_the_new_formats(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = np.repeat(ramp[:, :, None], 3, 2)
    for kind, image in (("16 bit", Image.fromarray(ramp.astype(np.uint16) * 257)), ("8 bit", Image.fromarray(ramp))):
        for options in ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}):
            image.save(tmp_path / "x.tif", **options)
            assert (np.asarray(open_image(tmp_path / "x.tif")) == grey).all(), kind
    see_through = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    for suffix in ("tif", "avif"):
        see_through.save(tmp_path / f"x.{suffix}")
        assert np.asarray(open_image(tmp_path / f"x.{suffix}")).min() > 250  # on white
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "x.gif")
    assert (np.asarray(open_image(tmp_path / "x.gif")) == (0, 255, 0)).all()
    palette.save(tmp_path / "x.gif", transparency=1)
    assert (np.asarray(open_image(tmp_path / "x.gif")) == 255).all()
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(UserError, match="floating point"):
        open_image(tmp_path / "f.tif")


@pytest.mark.filterwarnings("ignore")  # Pillow's, about tags that are cut short
def test_damaged_bytes_of_the_new_formats_give_a_picture_or_one_line(tmp_path):
    rng = np.random.default_rng(0)
    cases = [("x.tif", {}), ("x.tif", {"compression": "tiff_lzw"}), ("x.gif", {}), ("x.bmp", {}), ("x.avif", {})]
    for name, options in cases:
        path = tmp_path / name
        mixed.picture(0, 20, 30).save(path, **options)
        whole = path.read_bytes()
        for i in range(150):
            broken = bytearray(whole)
            for _ in range(1 + i % 9):
                broken[rng.integers(len(whole) if i % 2 else min(200, len(whole)))] = rng.integers(256)
            path.write_bytes(broken)
            for read in (verify_image, open_image, check_image):
                try:
                    read(path)  # any other exception fails the test
                except UserError as error:
                    assert name in str(error) and "\n" not in str(error)


# ---- texts, palettes, tiles ----
TEXT = b"x" * 2_000_000


@pytest.mark.parametrize(
    "chunk",
    [
        mixed.chunk(b"tEXt", b"prompt\0" + TEXT),
        mixed.chunk(b"zTXt", b"prompt\0\0" + zlib.compress(TEXT)),
        mixed.chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(TEXT)),
        mixed.chunk(b"iCCP", b"profile\0\0" + zlib.compress(TEXT)),
    ],
    ids=["tEXt", "zTXt", "iTXt", "iCCP"],
)
def test_a_png_with_two_megabytes_of_text_or_profile_is_read(tmp_path, chunk):
    (tmp_path / "x.png").write_bytes(mixed.grey_png(chunk))
    assert (np.asarray(open_image(tmp_path / "x.png"))[:, :, 1] == np.arange(8)).all()
    verify_image(tmp_path / "x.png")


def test_a_text_that_swells_is_refused(tmp_path):
    swells = mixed.chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))
    many = [mixed.chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(10_000_000))) for i in range(9)]
    profile = mixed.chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000)))
    for chunks in ([swells], many, [profile]):
        (tmp_path / "x.png").write_bytes(mixed.grey_png(*chunks))
        with pytest.raises(UserError, match="x.png"):
            open_image(tmp_path / "x.png")


def test_a_palette_that_is_missing_is_one_line(tmp_path):
    (tmp_path / "x.png").write_bytes(mixed.png(8, 8, (b"\0" + bytes(8)) * 8, colour=3))
    for read in (open_image, verify_image, check_image):
        with pytest.raises(UserError, match="x.png.*palette is missing"):
            read(tmp_path / "x.png")


def test_a_small_tiff_with_a_gigantic_tile_is_refused(tmp_path):
    fields = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: 32768, 323: 32768, 324: 8, 325: 64}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    head = struct.pack("<2sHI", b"II", 42, 72) + bytes(64)
    (tmp_path / "x.tif").write_bytes(head + struct.pack("<H", len(fields)) + entries + bytes(4))
    with pytest.raises(UserError, match="x.tif.*tiles"):
        open_image(tmp_path / "x.tif")


# ---- size and time ----
def test_108_megapixels_are_read_small_where_asked(folder, tmp_path):
    path = folder[0] / "108 megapixels.jpg"
    small = open_image(path, large="reduce")
    assert small.size == (6000, 4500)
    assert small.getpixel((2900, 2000)) == (0, 0, 0) and small.getpixel((3100, 2000)) == (255, 255, 255)
    with pytest.raises(UserError, match="12000 x 9000, more than 64 million"):
        open_image(path)
    for read in (verify_image, check_image):
        read(path, "reduce")
        with pytest.raises(UserError, match="12000 x 9000"):
            read(path)
    (tmp_path / "x.png").write_bytes(mixed.png(9000, 9000, b""))  # only JPEG decodes to a smaller size
    with pytest.raises(UserError, match="9000 x 9000"):
        open_image(tmp_path / "x.png", large="reduce")
    mixed.picture(0, 640, 480).save(tmp_path / "x.jpg")
    assert open_image(tmp_path / "x.jpg", large="reduce").tobytes() == open_image(tmp_path / "x.jpg").tobytes()


def test_big_pictures_are_held_one_at_a_time(tmp_path):
    Image.new("RGB", (6000, 5000), (9, 99, 199)).save(tmp_path / "x.jpg")
    for i in range(1, 6):
        os.link(tmp_path / "x.jpg", tmp_path / f"x{i}.jpg")
    code = (
        "import resource, sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from common.images import ImageStore, Preprocess, list_images, load_bytes\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "config = {'image_processor_type': 'BlipImageProcessor', 'size': {'height': 4, 'width': 4}}\n"
        "store, names, small = ImageStore(sys.argv[1]), list_images(sys.argv[1]), Preprocess.from_config(config)\n"
        "with ThreadPoolExecutor(6) as pool:\n"
        "    list(pool.map(lambda name: store.open(name, small.crop), names))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    found = subprocess.check_output([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert int(found) < 400  # MiB; a picture takes 114, its conversion as much again; six at a time took 1,400


def progressive(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    buffer = io.BytesIO()
    mixed.picture(0, 64, 64).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data[data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda")) : -2]  # with the Huffman table before it
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + b"\xff\xd9"


def test_a_jpeg_of_endless_scans_is_refused(tmp_path):
    assert [pixels._scans(progressive(n)) for n in (10, 57, 100)] == [10, 57, 100]
    (tmp_path / "x.jpg").write_bytes(progressive(10_000))
    began = time.perf_counter()
    for read in (open_image, check_image, verify_image):
        with pytest.raises(UserError, match="x.jpg.*more than 100 scans"):
            read(tmp_path / "x.jpg")
    assert time.perf_counter() - began < 2
    (tmp_path / "x.jpg").write_bytes(progressive(10))
    whole = open_image(tmp_path / "x.jpg").tobytes()
    note = b"\xff\xe5" + struct.pack(">H", 2 + 60_000) + b"\xff\xda" * 30_000  # bytes of a maker's note are no scans
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8" + note + progressive(10)[2:] + b"\xff\xda" * 500)  # nor is a tail
    assert open_image(tmp_path / "x.jpg").tobytes() == whole


# ---- reports ----
def test_write_faults_replaces_and_removes(tmp_path):
    listing = tmp_path / "out" / "unreadable.txt"
    write_faults([], str(listing))
    write_faults(["a: bad", "b\x1b[31m: bad"], str(listing))
    assert listing.read_text() == "a: bad\nb\ufffd[31m: bad\n"
    write_faults([], str(listing))
    assert not listing.exists()


def test_load_bytes_of_a_reducing_store(folder):
    store = ImageStore(str(folder[0]), own=True)
    config = {"image_processor_type": "BlipImageProcessor", "size": {"height": 4, "width": 4}}
    rows = load_bytes(store, ["108 megapixels.jpg", "turned.jpg"], Preprocess.from_config(config), 2)
    assert rows[0, :, 0].max() == 0 and rows[0, :, 3].min() == 255
    assert rows[1, 0, 0, 0] > 200 and rows[1, 3, 3, 2] > 200  # red above, blue below
