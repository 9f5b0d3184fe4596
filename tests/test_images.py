"""common/images.py against hostile files and names and transformers' own processors; what each augmentation does."""

import json
import os
import random
import signal
import struct
import zlib

import numpy as np
import pytest
import torch
from pictures import noise, put, smooth
from PIL import Image, ImageEnhance, ImageOps

from common.augment import Augmentation, Ready, augment, random_resized_crop, with_contrast_and_brightness
from common.console import UserError
from common.images import (
    ImageStore,
    Preprocess,
    check_report,
    leave_out,
    list_images,
    load_bytes,
    load_pixels,
    open_image,
    open_store,
    safe_name,
    unreadable,
    verify_image,
)
from common.seeds import seeded_rng

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


# ---- one picture ----
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_every_format_decodes_and_is_refused_when_cut(tmp_path, name):
    path, picture = tmp_path / name, smooth(61, 47)
    picture.save(path, quality=95)
    opened = open_image(path)
    assert opened.mode == "RGB" and opened.size == (61, 47)
    assert np.abs(np.asarray(opened, int) - np.asarray(picture, int)).mean() < 6
    noise(61, 47).save(path)
    whole = path.read_bytes()
    for part in (0, 0.01, 0.3, 0.6, 0.95):
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(UserError, match=name):
            open_image(path)


def test_other_formats_are_refused_whatever_they_are_called(tmp_path):
    for kind in ("PPM", "ICO", "TGA", "JPEG2000"):
        path = tmp_path / f"{kind}.jpg"
        noise(32, 32).save(path, format=kind)
        with pytest.raises(UserError, match="JPEG, PNG, WEBP"):
            open_image(path)
    for text in (b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"8BPS\0\1", b"hello"):
        path = tmp_path / "text.jpg"
        path.write_bytes(text)
        with pytest.raises(UserError):
            open_image(path)


def png_of_nothing(width: int, height: int) -> bytes:
    """A PNG header that claims a size, and no pixels worth the name."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest undoes the filter of images.py
@pytest.mark.parametrize("size", [(20000, 20000), (9487, 9487), (8001, 8000), (1, 5000), (5000, 1), (21, 1)])
def test_bombs_and_ribbons_are_refused_by_their_header(tmp_path, size):
    path = tmp_path / "x.png"
    path.write_bytes(png_of_nothing(*size))
    with pytest.raises(UserError, match="x.png"):
        open_image(path)
    with pytest.raises(UserError, match="x.png"):
        verify_image(path)


def test_an_aspect_ratio_of_twenty_is_read(tmp_path):
    noise(400, 20).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png").size == (400, 20)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for the other end of a FIFO"))
    signal.alarm(20)
    for path in (tmp_path / "fifo.jpg", tmp_path / "folder.jpg", "/dev/zero"):
        with pytest.raises(UserError, match="regular file"):
            open_image(path)
    signal.alarm(0)
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "absent.jpg")


def test_exif_orientation_is_applied_once(tmp_path):
    upright = smooth(40, 24)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.png"
        upright.save(path, exif=exif)
        truth = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        opened = open_image(path)
        assert opened.tobytes() == truth.tobytes() and opened.size == truth.size
        opened.save(tmp_path / "again.png")
        assert open_image(tmp_path / "again.png").tobytes() == opened.tobytes()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about EXIF that is cut short
def test_damaged_bytes_give_a_picture_or_one_line(tmp_path):
    exif, rng = Image.Exif(), np.random.default_rng(0)
    exif[0x0112], exif[0x010E] = 6, "a description"
    for name in ("x.jpg", "x.png", "x.webp"):
        path = tmp_path / name
        smooth(20, 30).save(path, exif=exif)
        whole = path.read_bytes()
        for i in range(150):
            broken = bytearray(whole)
            for _ in range(1 + i % 9):
                broken[rng.integers(len(whole) if i % 2 else min(200, len(whole)))] = rng.integers(256)
            path.write_bytes(broken)
            for read in (verify_image, open_image):
                try:
                    read(path)  # any other exception fails the test
                except UserError as error:
                    assert name in str(error) and "\n" not in str(error)


def test_colour_modes(tmp_path):
    def opened(image: Image.Image, name="x.png", **options) -> np.ndarray:
        image.save(tmp_path / name, **options)
        found = open_image(tmp_path / name)
        assert found.mode == "RGB"
        return np.asarray(found)

    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = np.repeat(ramp[:, :, None], 3, 2)
    assert (opened(Image.fromarray(ramp)) == grey).all()
    assert (opened(Image.fromarray(ramp > 99)) == (grey > 99) * 255).all()
    assert (opened(Image.fromarray(ramp.astype(np.uint16) * 257)) == grey).all()  # 16 bit, scaled and not clipped
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 2, 4))
    expected = np.array([[BLUE, BLUE, WHITE, WHITE]] * 4)
    assert (opened(half) == expected).all()
    assert (opened(half, "x.webp", lossless=True) == expected).all()
    assert (opened(Image.new("RGBA", (4, 4), (255, 0, 0, 128)))[0, 0] == (255, 127, 127)).all()
    assert (opened(Image.new("LA", (4, 4), (0, 0))) == 255).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([*RED, *GREEN, *BLUE])
    assert (opened(palette) == np.array(GREEN)).all()
    assert (opened(palette, transparency=1) == 255).all()
    assert (opened(Image.new("RGB", (4, 4), GREEN), transparency=GREEN) == 255).all()
    cmyk = opened(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "x.jpg", quality=95)
    assert np.abs(cmyk.astype(int) - np.array(RED)).max() < 12


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    for name in ("x.png", "x.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=50, lossless=True)
        assert (np.asarray(open_image(tmp_path / name)) == np.array(RED)).all()


# ---- names and stores ----
TRAVERSALS = [
    "/etc/passwd", "//etc/passwd", "../x.jpg", "a/../../x.jpg", "a/..", "..", "./../x.jpg", "a/./../x", "\\x.jpg",
    "..\\x.jpg", "a\\..\\..\\x.jpg", "C:\\x.jpg", "C:/x.jpg", "x\0.jpg", "", ".", "./", "a" * 1025, "x\n.jpg",
    "\x1b[31mx.jpg", "\ud800.jpg", "~/x.jpg", None, 7, 1.5, True, ["a.jpg"], {"a": 1},
]  # fmt: skip


@pytest.mark.parametrize("name", TRAVERSALS, ids=range(len(TRAVERSALS)))
def test_names_that_could_leave_the_root_are_refused(tmp_path, name):
    with pytest.raises(UserError) as error:
        safe_name(name)
    assert str(error.value).isprintable() and len(str(error.value)) < 250
    if isinstance(name, str):
        with pytest.raises(UserError):
            ImageStore(str(tmp_path), {"id": name}).find("id")


def test_ordinary_names_pass():
    for name in ("a.jpg", "./train/34/a.png", "train-1-img0", "ä ö/ü.jpg", "a..b.jpg", "...jpg", "服.webp", "a" * 1024):
        assert safe_name(name) == name


def test_store_looks_in_the_table_then_for_the_name_then_for_extensions(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one / "train/3/a.png", one / "b.jpg", two / "c.webp", two / "b.jpg", two / "train/4/d.jpg"):
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(8, 8).save(path)
    (two / "e").mkdir()
    table = {"a": "./train/3/a.png", "b": "./train/3/b.png", "d": "./train/4/d.png"}
    for roots in ([str(one), str(two)], f"{one}{os.pathsep}{two}"):
        store = ImageStore(roots, table)
        assert os.path.samefile(store.find("a"), one / "train/3/a.png")
        assert os.path.samefile(store.find("b"), one / "b.jpg")  # not where the table says; the first root wins
        assert os.path.samefile(store.find("c"), two / "c.webp")
        assert os.path.samefile(store.find("d"), two / "train/4/d.jpg")  # converted from .png
        assert store.find("e") is None and store.missing(["a", "e", "c", "f"]) == ["e", "f"]
        assert store.open("a").size == (8, 8)
        with pytest.raises(FileNotFoundError) as error:
            store.path("f")
        assert "'f'" in str(error.value) and str(two) in str(error.value)


def test_a_folder_may_have_the_separator_in_its_name(tmp_path):
    """One of several too: of "trip:12:uploads:x" those parts are taken whole that are folders."""
    trip, uploads, plain = tmp_path / "trip:12", tmp_path / "out/trip:12/uploads", tmp_path / "plain"
    for i, folder in enumerate((trip, uploads, plain)):
        folder.mkdir(parents=True)
        noise(8, 8).save(folder / f"{i}.png")
    for roots in ([trip], [plain, trip], [trip, uploads], [uploads, plain, trip], [trip, tmp_path / "none", plain]):
        assert ImageStore(os.pathsep.join(map(str, roots))).roots == [str(root) for root in roots]
    assert ImageStore(f"{trip}{os.pathsep}{os.pathsep}{plain}").roots == [str(trip), str(plain)]
    with pytest.raises(UserError, match=f"image folder {tmp_path}/none not found"):
        open_store(f"{trip}{os.pathsep}{tmp_path}/none", [])


def test_links_in_the_root_are_followed(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir(), outside.mkdir()
    noise(8, 8).save(outside / "x.png")
    noise(8, 8).save(root / "y.png")
    (root / "out.png").symlink_to(outside / "x.png")
    (root / "in.png").symlink_to(root / "y.png")
    (root / "folder").symlink_to(outside)
    (tmp_path / "alias").symlink_to(root)
    for name in ("out.png", "out", "folder/x.png"):
        assert ImageStore(str(root)).open(name).tobytes() == noise(8, 8).tobytes()
    assert ImageStore(str(root)).open("in.png").size == (8, 8)
    assert ImageStore(str(tmp_path / "alias")).open("y").size == (8, 8)  # the root itself may be a link
    assert list_images(root) == ["folder/x.png", "in.png", "out.png", "y.png"]


@pytest.mark.parametrize(
    "file, name",
    [
        ("re\u0301sume\u0301.png", "r\u00e9sum\u00e9.png"),  # NFD on the disk, NFC in the file, and the other way round
        ("r\u00e9sum\u00e9.png", "re\u0301sume\u0301"),
        ("a/x.jpg", "a/x.png"),  # converted
        ("re\u0301sume\u0301.JPG", "r\u00e9sum\u00e9.webp"),
    ],
)
def test_a_picture_spelled_or_converted_otherwise_is_found(tmp_path, file, name):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    store = ImageStore(tmp_path)
    assert store.find(name) == str(tmp_path / file) and store.relative(name) == f"./{file}"
    assert store.find(f"2{name}") is None
    (tmp_path / name).touch()  # the name as it is goes before all others
    assert ImageStore(tmp_path).find(name) == str(tmp_path / name)


def test_list_images(tmp_path):
    for name in ("b.JPG", "a/z.png", "a/b/c.webp", "a.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("a/notes.txt", "._b.jpg", "c.psd"):
        (tmp_path / name).touch()
    assert list_images(tmp_path) == ["a.jpeg", "a/b/c.webp", "a/z.png", "b.JPG"]
    for folder in (tmp_path / "absent", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=folder.name):
            list_images(folder)
    with pytest.raises(UserError, match="not found; wanted one: put links to several into a folder"):
        list_images(f"{tmp_path}{os.pathsep}{tmp_path / 'a'}")
    for name in ("all", "d"):
        (tmp_path / name).mkdir()
    (tmp_path / "d/z.png").touch()
    for name in ("a", "d"):  # the remedy: equal names of two folders stay two pictures
        (tmp_path / "all" / name).symlink_to(tmp_path / name)
    assert list_images(tmp_path / "all") == ["a/b/c.webp", "a/z.png", "d/z.png"]


def test_a_picture_with_an_odd_name_is_listed_and_unreadable(tmp_path):
    odd = [b"M\374tze.jpg", b"b: rot.jpg", b"a\nb.jpg", b"\\c.jpg"]
    for name in [*odd, b"good.jpg", "m\u00fctze.jpg".encode()]:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            noise(8, 8).save(file, "PNG")
    names, store = list_images(tmp_path), ImageStore(tmp_path, own=True)
    assert sorted(map(os.fsencode, names)) == sorted([*odd, b"good.jpg", "m\u00fctze.jpg".encode()])
    faults = unreadable(names, store)
    assert sorted(map(os.fsencode, faults)) == sorted(odd) and all("rename it" in text for text in faults.values())
    assert leave_out(names, faults, f"{tmp_path}/out.txt") == ["good.jpg", "m\u00fctze.jpg"]
    lines = (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 and any("M\\udcfctze.jpg" in line for line in lines)


def test_clothing_photographs(shared):
    root = shared / "data" / "clothing"
    names = list_images(root)
    assert len(names) == 3409
    text, ok = check_report(names[::40], ImageStore(str(root)))
    assert ok and "86 expected, 86 present, 0 unreadable, 0 missing" in text


# ---- picture -> tensor ----
SIZES = [(224, 224), (225, 224), (37, 301), (301, 37), (500, 333), (17, 19), (640, 481), (223, 400)]


def processors(config: dict):
    """transformers' own Pillow processor of a preprocessor_config.json."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

    classes = {"CLIP": CLIPImageProcessorPil, "Blip": BlipImageProcessorPil, "ConvNext": ConvNextImageProcessorPil}
    kind = config.get("image_processor_type") or config["feature_extractor_type"]
    settings = {key: value for key, value in config.items() if not key.endswith("_type")}
    return next(cls for name, cls in classes.items() if kind.startswith(name))(**settings)


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SQUARE_28 = {"height": 28, "width": 28}
CONFIGS = [
    {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 224, "size": 224, "do_center_crop": True},
    {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "crop_size": SQUARE_28},
    {"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 31}, "crop_size": 35, **IMAGENET},
    {"image_processor_type": "BlipImageProcessor", "size": {"height": 384, "width": 384}},
    {"image_processor_type": "BlipImageProcessor", "size": {"height": 33, "width": 33}, "resample": 2},
    {"image_processor_type": "BlipImageProcessor", "size": {"height": 20, "width": 20}, "do_normalize": False},
    {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": 0.875, "resample": 3, **IMAGENET},
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "crop_pct": 0.875},
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 61}},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_preprocess_equals_transformers(tmp_path, config):
    put(tmp_path / "preprocessor_config.json", config)
    ours, theirs = Preprocess.from_folder(tmp_path), processors(config)
    for i, (width, height) in enumerate(SIZES):
        image = noise(width, height, i)
        pixels = ours(image)
        assert pixels.dtype == torch.float32 and pixels.shape == (3, ours.size, ours.size)
        assert torch.equal(pixels, theirs(image, return_tensors="pt")["pixel_values"][0])
    assert len(ours.mean) == len(ours.std) == 3


def test_preprocess_of_the_zoo(zoo):
    for name, use in (("clip", "clip"), ("blip", "blip"), ("instructblip", "vision"), ("resnet", "encoder")):
        ours = Preprocess.from_folder(str(zoo / name), use)
        theirs = processors(json.loads((zoo / name / "preprocessor_config.json").read_text()))
        image = noise(90, 61)
        assert torch.equal(ours(image), theirs(image, return_tensors="pt")["pixel_values"][0])


def test_what_describes_pixels_differs_where_they_do():
    """The same picture gives the same pixels if and only if the descriptions agree; the usual one is that of repr()."""
    changes = [{}, {"do_normalize": None}, {"do_rescale": True}, {"rescale_factor": 0.00392156862745098}]
    changes += [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 0.004}, {"resample": 2}]
    changes += [{"image_mean": [0.5, 0.5, 0.5]}, {"image_std": [0.5, 0.5, 0.5]}, {"do_normalize": False} | IMAGENET]
    made = [Preprocess.from_config(CONFIGS[1] | change) for change in changes]
    pixels = [one(noise(90, 61)) for one in made]
    for i, one in enumerate(made):
        for j, other in enumerate(made):
            alike = torch.equal(pixels[i], pixels[j])
            assert alike or one.described() != other.described(), (changes[i], changes[j])
    assert {one.described() for one in made[:4]} == {repr(made[0])} and len({one.described() for one in made}) == 8
    assert made[4].with_pad(1.25).described() not in (made[4].described(), made[0].with_pad(1.25).described())


def test_preprocess_from_a_processor_config(tmp_path):
    put(tmp_path / "processor_config.json", {"image_processor": CONFIGS[4], "processor_class": "InstructBlipProcessor"})
    assert Preprocess.from_folder(tmp_path).size == 33
    put(tmp_path / "preprocessor_config.json", CONFIGS[3])
    assert Preprocess.from_folder(tmp_path).size == 384


def test_preprocess_not_there_or_not_usable_is_one_line(tmp_path):
    for name in (tmp_path, tmp_path / "absent", "../x", "nobody/no-such-model-here", "a b", ""):
        with pytest.raises(UserError, match="text tower.*preprocessor_config.json") as error:
            Preprocess.from_folder(name, "text tower")
        assert "\n" not in str(error.value)
    for config in (
        [],
        {"image_processor_type": "PixtralImageProcessor"},
        {**CONFIGS[3], "size": {"height": 384, "width": 224}},
        {**CONFIGS[3], "size": {"longest_edge": 384}},
        {**CONFIGS[3], "size": [224]},
        {**CONFIGS[3], "size": -1},
        {**CONFIGS[0], "do_center_crop": False},
        {**CONFIGS[0], "do_resize": False},
    ):
        path = put(tmp_path / "preprocessor_config.json", config)
        with pytest.raises(UserError) as error:
            Preprocess.from_folder(tmp_path)
        assert path in str(error.value)


@pytest.mark.parametrize(
    "key, values",
    [
        ("image_mean", [3, "cls", [0.5, 0.5], [0.5, "x", 0.5], [True, 0, 0], [[0.5], 0, 0], {"0": 1}, [1e30, 0, 0]]),
        ("image_std", [True, [0.5, 0.5, 0], [0.5] * 4, [None] * 3]),
        ("rescale_factor", ["1/255", [1], None, 0, -1, 1e30, True]),
        ("resample", ["bicubic", 3.5, None, 6, -1, True, [3]]),
        *((key, [[], 0, 1, "false", {}]) for key in ("do_normalize", "do_rescale", "do_resize", "do_center_crop")),
    ],
)
def test_preprocess_that_no_picture_survives_is_one_line(zoo, tmp_path, key, values):
    record = json.loads((zoo / "clip/preprocessor_config.json").read_text())
    for value in values:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(record | {key: value}))
        with pytest.raises(UserError, match=f'preprocessor_config.json: "{key}" is .*, wanted') as error:
            Preprocess.from_folder(tmp_path)
        assert "\n" not in str(error.value)


def test_load_bytes_and_pixels(tmp_path):
    for i in range(5):
        noise(20 + i, 30, i).save(tmp_path / f"{i}.png")
    store, names = ImageStore(str(tmp_path)), ["3", "0", "4", "0.png"]
    put(tmp_path / "preprocessor_config.json", CONFIGS[4])
    transform = Preprocess.from_folder(tmp_path)
    pixels = load_pixels(store, names, transform)
    assert pixels.shape == (4, 3, 33, 33)
    for row, name in zip(pixels, names, strict=True):
        assert torch.equal(row, transform(store.open(name)))
    assert torch.equal(transform.normalise(load_bytes(store, names, transform, workers=3)), pixels)
    drawn = Augmentation(0, (0.5, 1.0), (0.75, 1.3333), 0.5, 0.2, 0.05, 10.0)
    transforms = [Ready(transform, drawn, (i,)) for i in range(4)]
    each = [load_bytes(store, names, transform, workers, transforms) for workers in (0, 3)]
    assert torch.equal(*each) and not torch.equal(transform.normalise(each[0]), pixels)
    for i, name in enumerate(names):
        strengths = ((0.5, 1.0), (0.75, 1.3333), 0.5, 0.2, 0.05, 10.0)
        changed = augment(store.open(name), seeded_rng(0, i), *strengths, transform.size)
        assert (each[0][i].numpy() == transform.crop(changed)).all()
    for workers in (0, 3):
        with pytest.raises(FileNotFoundError, match="'9'"):
            load_bytes(store, ["3", "9"], transform, workers)


# ---- augmentation ----
def test_augmentation_is_a_function_of_its_generator():
    image = smooth(90, 85)
    strengths = ((0.5, 1.0), (0.75, 1.3333), 0.5, 0.2, 0.05, 10.0)
    for change in (lambda *a, **k: augment(*a, *strengths, **k), random_resized_crop):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        one = change(image, seeded_rng(0, 1, 2), size=32)
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        assert change(image, seeded_rng(0, 1, 2), size=32).tobytes() == one.tobytes()
        assert change(image, seeded_rng(0, 1, 3), size=32).tobytes() != one.tobytes()
        assert one.size == (32, 32) and one.mode == "RGB"
    assert image.tobytes() == smooth(90, 85).tobytes()  # the picture given is not changed


def test_resized_crop_keeps_area_and_shape_and_goes_everywhere():
    width, height = 170, 160
    y, x = np.mgrid[0:height, 0:width]
    position = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    corners, areas, rng = [], [], np.random.default_rng(0)
    for _ in range(400):
        window = random_resized_crop(position, rng, (0.8, 1.0), (0.9, 1.1))
        w, h = window.size
        assert 0.79 <= w * h / (width * height) <= 1 and 0.89 <= w / h <= 1.11
        left, top = window.getpixel((0, 0))[:2]
        assert window.getpixel((w - 1, h - 1))[:2] == (left + w - 1, top + h - 1)  # a window, nothing resampled
        corners.append((left, top)), areas.append(w * h / (width * height))
    assert min(areas) < 0.82 and max(areas) > 0.96
    assert min(c[0] for c in corners) == 0 and max(c[0] for c in corners) > 20 and max(c[1] for c in corners) > 15
    thin = random_resized_crop(smooth(300, 20), rng, (0.8, 1.0), (0.9, 1.1))
    assert thin.size == (22, 20)  # no window fits: the largest of an allowed shape
    assert random_resized_crop(smooth(3, 60), rng, (0.8, 1.0), (0.9, 1.1)).size == (3, 3)


@pytest.mark.parametrize("contrast", [0.0, 0.8, 1.0, 1.2, 3.0])
@pytest.mark.parametrize("brightness", [0.0, 0.9, 1.0, 1.7])
def test_contrast_and_brightness_are_those_of_pillow(contrast, brightness):
    """To the byte, with clipping at both ends; pictures of few and of all levels."""
    rng = np.random.default_rng(4)
    for least, most, shape in ((0, 256, (40, 30, 3)), (90, 110, (9, 70, 3)), (200, 256, (1, 1, 3)), (0, 256, (17, 5))):
        image = Image.fromarray(rng.integers(least, most, shape, dtype=np.uint8))
        wanted = ImageEnhance.Brightness(ImageEnhance.Contrast(image).enhance(contrast)).enhance(brightness)
        found = with_contrast_and_brightness(image, contrast, brightness)
        assert found.mode == wanted.mode and found.tobytes() == wanted.tobytes()


def test_each_part_of_the_augmentation_does_what_it_is_called():
    image, rng = smooth(64, 64), np.random.default_rng(0)
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "shift": 0.0, "degrees": 0.0}
    assert augment(image, rng, **whole).tobytes() == image.tobytes()
    assert augment(image, rng, **{**whole, "flip": 1.0}).tobytes() == ImageOps.mirror(image).tobytes()
    flips = [augment(image, rng, **{**whole, "flip": 0.5}).tobytes() != image.tobytes() for _ in range(200)]
    assert 70 < sum(flips) < 130
    grey = Image.new("RGB", (32, 32), (100, 100, 100))
    levels = [augment(grey, rng, **{**whole, "jitter": 0.2}).getpixel((16, 16))[0] for _ in range(200)]
    assert 79 <= min(levels) < 90 and 110 < max(levels) <= 120
    white = Image.new("RGB", (100, 100), WHITE)
    for part in ({"shift": 0.1}, {"degrees": 10.0}):
        uncovered = []
        for _ in range(50):
            pixels = np.asarray(augment(white, rng, **{**whole, **part}), int)
            uncovered.append((pixels < 250).any(-1).mean())
            assert pixels.min() >= 127 and pixels[50, 50].min() == 255
        assert 0.03 < max(uncovered) < 0.25
