"""common/encoding.py: the pictures of training steps as bytes, prepared ahead, against one picture at a time."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo as writer
from ranks import run_ranks
from transforms import turned

from common import encoding
from common.console import UserError
from common.encoding import Compute, TrainingImages, image_jobs
from common.images import ImageStore, Preprocess
from common.ranks import World, barrier
from common.streams import Item, Source, draw_batch

PROCESSORS = [
    {"image_processor_type": "BlipImageProcessor", "size": {"height": 24, "width": 24}},
    {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 24}, "crop_size": 24},
    {"image_processor_type": "CLIPImageProcessor", "size": 12, "crop_size": 20, "do_normalize": False},
]


class Encoder(torch.nn.Module):
    """Its tokens are the pixels themselves; how many came at once is noted."""

    def __init__(self, preprocess: Preprocess):
        super().__init__()
        self.preprocess, self.sizes = preprocess, []

    def tokens(self, pixels):
        self.sizes.append(len(pixels))
        return pixels.clone()


@pytest.fixture
def source(tmp_path):
    files = writer.draw(tmp_path, 8, 3)
    items = [Item((0, files[i]), (0, files[(i + 1) % 8]), (("a",),)) for i in range(8)]
    return Source(ImageStore(str(tmp_path)), items)


@pytest.mark.parametrize("config", PROCESSORS)
def test_a_steps_pictures_have_the_bits_of_one_picture_at_a_time(source, monkeypatch, config):
    monkeypatch.setattr(encoding, "AT_ONCE", 3)
    model, world = Encoder(Preprocess.from_config(config)), World(0, 1, 0, torch.device("cpu"))
    images = TrainingImages(model, [source], turned, Compute(4, workers=3))
    followed = list(images.follow(range(2, 5), lambda step: draw_batch([source], step, 4, 7, world), 7))
    assert [batch.step for batch, _ in followed] == [2, 3, 4]
    assert model.sizes == [3, 3, 2] * 3, "never more than fit"
    for batch, tokens in followed:
        assert batch == draw_batch([source], batch.step, 4, 7, world)
        for row, ((_, name), key) in zip(tokens, image_jobs(batch.draws), strict=True):
            picture = turned(source.images.open(name), key, model.preprocess.size)
            assert torch.equal(row, model.preprocess(picture))


def test_the_next_batch_is_drawn_and_decoded_while_a_step_runs(source):
    model, world = Encoder(Preprocess.from_config(PROCESSORS[0])), World(0, 1, 0, torch.device("cpu"))
    drawn = [threading.Event() for _ in range(3)]

    def draw(step: int):
        drawn[step].set()
        assert threading.current_thread() is not threading.main_thread()
        return draw_batch([source], step, 4, 7, world)

    images = TrainingImages(model, [source], turned, Compute(4, workers=2))
    for batch, _ in images.follow(range(3), draw, 7):
        for step in range(min(batch.step + 2, 3)):
            assert drawn[step].wait(10), step


def test_a_picture_that_cannot_be_read_is_one_line(source, tmp_path):
    (tmp_path / source.items[0].reference[1]).write_bytes(b"")
    model, world = Encoder(Preprocess.from_config(PROCESSORS[0])), World(0, 1, 0, torch.device("cpu"))
    images = TrainingImages(model, [source], turned, Compute(8, workers=2))
    with pytest.raises(UserError, match="is empty"):
        list(images.follow(range(1), lambda step: draw_batch([source], step, 8, 7, world), 7))


def test_normalise_has_the_bits_of_the_whole_preprocessing():
    for config in PROCESSORS:
        preprocess = Preprocess.from_config(config)
        bytes_ = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
        bytes_[0] = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)  # every value
        wanted = [np.stack([preprocess.table[c][picture[..., c]] for c in range(3)]) for picture in bytes_]
        assert torch.equal(preprocess.normalise(torch.from_numpy(bytes_)), torch.from_numpy(np.stack(wanted)))


def test_a_gallery_is_decoded_ahead_and_the_model_gets_its_modes_back(source, monkeypatch):
    model = Encoder(Preprocess.from_config(PROCESSORS[0]))
    model.image = lambda pixels: (pixels, pixels.mean((2, 3)))
    loaded, load_bytes = [], encoding.load_bytes

    def noted(images, names, *rest):
        assert threading.current_thread() is not threading.main_thread()
        loaded.append(names)
        return load_bytes(images, names, *rest)

    monkeypatch.setattr(encoding, "load_bytes", noted)
    names = [item.reference[1] for item in source.items]
    for rows, tokens, _ in encoding.encode(model, source.images, names, Compute(3), "test"):
        assert not model.training
        for i, row in zip(rows, tokens, strict=True):
            assert torch.equal(row, model.preprocess(source.images.open(names[i])))
    assert model.training and sum(loaded, []) == names
    Path(source.images.path(names[0])).write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        list(encoding.encode(model, source.images, names, Compute(3), "test"))
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ranks_of_a_machine_share_one_copy(tmp_path, dtype):
    def share() -> list:
        rows = encoding.rows_of_machine(str(tmp_path), (4, 3), dtype)
        if encoding.local_rank() == 0:
            rows.copy_(torch.arange(12).view(4, 3))
        barrier()
        return [rows, list(tmp_path.iterdir())]

    for rows, files in run_ranks(2, share):
        assert rows.dtype == dtype and torch.equal(rows.long(), torch.arange(12).view(4, 3)) and not files


def test_no_room_for_the_views_is_one_line_on_every_rank(tmp_path):
    (tmp_path / "none").write_bytes(b"a file")

    def share() -> str:
        with pytest.raises(UserError, match="views-0.tmp: .* GB for --views .*fewer --views") as fault:
            encoding.rows_of_machine(str(tmp_path / "none"), (4, 3), torch.float32)
        return str(fault.value)

    assert len(set(run_ranks(2, share))) == 1
