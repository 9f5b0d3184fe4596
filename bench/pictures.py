"""Pictures per second of one core: decoded, augmented and made ready as train_cir.py does, beside torchvision.

    python bench/pictures.py --images FOLDER             # BLIP's 384 pixels; another size by --size
    python bench/pictures.py                             # without a folder: 256 made-up photographs of 640 x 480

One thread, the files in the page cache. "plain" is what evaluation and alignment do, "augmented" the draws of [S6.1].
torchvision, if it is installed, does the same on the same pictures with its own transforms, in fp32, normalised; ours
ends in bytes that the device normalises. Last, how many cores a number of GPUs keeps busy (--per_gpu images a second).
"""

import contextlib
import io
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import measure  # first: it puts the repository on the path


def make_pictures(folder: Path, count: int = 256) -> None:
    """Smooth noise with edges: about as many bytes a pixel as a photograph has at JPEG quality 88."""
    import numpy as np
    from PIL import Image, ImageDraw

    for i in range(count):
        rng = np.random.default_rng(i)
        small = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8))
        picture = small.resize((640, 480), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(picture)
        for _ in range(12):
            x, y, w, h = rng.integers(0, 400, 4).tolist()
            draw.ellipse((x, y, x + w, y + h), outline=tuple(rng.integers(0, 255, 3).tolist()), width=4)
        picture.save(folder / f"{i:03d}.jpg", quality=88)


@contextlib.contextmanager
def shelf(folder: str, count: int, side: int):
    """(ImageStore, its names, a Preprocess to `side` pixels like BLIP's) of a folder; "": of `count` made-up."""
    from common.images import ImageStore, Preprocess, list_images

    config = {"image_processor_type": "BlipImageProcessor", "size": {"height": side, "width": side}}
    config |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27] * 3}
    with tempfile.TemporaryDirectory() as scratch:
        if not folder:
            make_pictures(Path(scratch), count)
        yield ImageStore(folder or scratch), list_images(folder or scratch), Preprocess.from_config(config)


def slept(side: int, free: float, held: float, picture):
    """The bytes of a picture that took `free` seconds outside of Python and `held` in it, without the work."""
    import numpy as np

    for _ in range(15):  # a picture lets other threads run about so often
        time.sleep(free / 15)
        until = time.thread_time() + held / 15
        while time.thread_time() < until:
            pass
    return np.zeros((side, side, 3), np.uint8)


def torchvision_transforms(size: int):
    """-> (plain, augmented), or None where it is not installed.

    A torchvision built for CUDA finds its operators missing beside a torch for CPUs; its transforms need none."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for _ in range(40):
        try:
            from torchvision.transforms import v2

            break
        except ImportError:
            return None
        except RuntimeError as missing:
            library.define(re.search(r"torchvision::(\w+)", str(missing))[1] + "() -> ()")
            for name in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[name]
    bicubic = v2.InterpolationMode.BICUBIC
    ready = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.48, 0.46, 0.41], [0.27] * 3)]
    crop = v2.RandomResizedCrop(size, (0.8, 1.0), (0.9, 1.1), interpolation=bicubic)
    moved = v2.RandomAffine(10, (0.1, 0.1), interpolation=v2.InterpolationMode.BILINEAR)
    sharp = v2.RandomAdjustSharpness(1.2, p=1.0)
    changed = [crop, v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2), sharp, moved]
    return v2.Compose([v2.Resize((size, size), bicubic), *ready]), v2.Compose([*changed, *ready])


def main() -> None:
    found = measure.arguments(__doc__, images="", size=384, count=256, rounds=3, per_gpu=320, gpus=8)
    import torch

    torch.set_num_threads(1)
    theirs = torchvision_transforms(found.size)  # before transformers, which would look for it too
    from PIL import Image

    import train_cir as cir
    from common.augment import Augmentation, Ready

    drawn = Augmentation(0, cir.CROP_SCALE, cir.CROP_RATIO, cir.FLIP, cir.JITTER, cir.TRANSLATE, cir.ROTATE)
    with shelf(found.images, found.count, found.size) as (images, names, preprocess):
        random.Random(0).shuffle(names)
        names = names[: found.count]

        def ours(augmented: bool) -> None:
            for i, name in enumerate(names):
                images.open(name, Ready(preprocess, drawn if augmented else None, (i,)))

        def torchvision(transform) -> None:
            for name in names:
                with open(images.path(name), "rb") as file:
                    transform(Image.open(io.BytesIO(file.read())).convert("RGB"))

        jobs = {"ours, plain": lambda: ours(False), "ours, augmented": lambda: ours(True)}
        if theirs:
            jobs |= {"torchvision, plain": lambda: torchvision(theirs[0])}
            jobs |= {"torchvision, augmented": lambda: torchvision(theirs[1])}
        jobs["decoding alone"] = lambda: [images.open(name) for name in names]
        runs = {name: lambda job=job: measure.clock(job) for name, job in jobs.items()}
        seconds = measure.interleave(runs, found.rounds)
    pace = {name: [len(names) / s for s in times] for name, times in seconds.items()}
    size = f"{len(names)} pictures to {found.size} px, one thread"
    middle = {name: sorted(values)[len(values) // 2] for name, values in pace.items()}
    rows = measure.pace_rows("pictures", size, "cpu", pace, "images/s", middle["decoding alone"])
    for kind in ("plain", "augmented") if theirs else ():
        value, note = measure.ratio(pace[f"ours, {kind}"], pace[f"torchvision, {kind}"])
        rows.append(measure.row(f"pictures: ours / torchvision, {kind}", size, "cpu", value, "x", note=note))
    measure.publish(rows)
    cores = found.gpus * found.per_gpu / middle["ours, augmented"]
    print(f"{found.gpus} GPUs of {found.per_gpu} images a second each keep {cores:.0f} such cores busy (arithmetic)")


if __name__ == "__main__":
    main()
