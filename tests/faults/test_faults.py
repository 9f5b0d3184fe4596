"""Faults of cases.py that no other test tries, and that the tables of faults name tests which are there."""

import errno
import json
import math
import os
import shutil
from pathlib import Path

import mutations
import numpy as np
import pytest
import torch
from cases import CASES
from conftest import ROOT
from ranks import run_ranks
from safetensors.torch import load_file
from test_eval_cir import run_stage, write_world
from test_gen_deltas import clean as clean_gen  # noqa: F401  (a fixture of every test here)
from test_gen_deltas import generate, mined, truth, vdg  # noqa: F401
from test_mine_pairs import OUTPUTS, mine, picture
from test_train_cir import arguments, clean, log_of, train, world  # noqa: F401
from test_vdg_align import chat, records, stage
from zoo import draw

import eval_cir
import mine_pairs
import train_cir
import vdg_align
import vdg_tune
from common.annotations import read_cirr
from common.console import UserError, run
from common.encoding import Compute
from common.files import lock_folder, save_state
from common.images import ImageStore, unreadable
from common.llama import load_llm
from common.ranks import all_sum
from common.retrieval import index
from common.streams import Batch, Draw, Everyone
from common.submission import write_submission
from common.validation import Validation, begin_validation
from kernels.negatives import draw_negatives


@pytest.fixture
def chats(zoo, tmp_path) -> list[str]:
    """Flags of two epochs over ten captions; --batch, --out and the like are for each test to add."""
    chat(tmp_path / "data", 10)
    models = ["--vision", str(zoo / "instructblip"), "--llm", str(zoo / "llama")]
    files = ["--chat", str(tmp_path / "data/chat.json"), "--images", str(tmp_path / "data/images")]
    return [*models, *files, "--epochs", "2", "--device", "cpu", "--workers", "0"]


# ---- the tables ----


def test_every_number_has_a_test_that_is_there():
    assert sorted(CASES) == list(range(1, 59))
    absent = []
    for number, case in CASES.items():
        assert case.fault and case.tests, number
        for test in case.tests:
            file, _, function = test.partition("::")
            path = ROOT / "tests" / file
            if not path.is_file() or f"\ndef {function}(" not in path.read_text(encoding="utf-8"):
                absent.append(f"{number}: {test}")
    assert not absent


def test_each_bug_can_still_be_put_back():
    assert mutations.faults_of_list(ROOT) == []


# ---- bugs that no test saw ----


def test_embeddings_get_their_name_when_they_are_whole(tmp_path):
    path, seen = tmp_path / "rows.npy", []

    def blocks():
        yield np.ones((2, 3), np.float32)
        seen.append(path.exists())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mine_pairs.write_array(path, (4, 3), blocks())
    assert seen == [False] and not path.exists()
    path.write_bytes(b"of an earlier run")
    with pytest.raises(KeyboardInterrupt):
        mine_pairs.write_array(path, (4, 3), blocks())
    assert path.read_bytes() == b"of an earlier run"


def test_query_files_get_their_name_when_they_are_whole(vdg, mined, truth, tmp_path, monkeypatch):  # noqa: F811
    """A kill while the second batch of images is encoded leaves no .npy, and the same command goes on."""
    real, calls = vdg_align.VisionProjector.queries, []

    def dying(self, pixels):
        calls.append(sorted(path.suffix for path in (tmp_path / "out/queries").iterdir()))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, pixels)

    monkeypatch.setattr(vdg_align.VisionProjector, "queries", dying)
    with pytest.raises(KeyboardInterrupt):
        generate(vdg, mined, tmp_path / "out")
    assert calls == [[".tmp"], [".tmp"]] and not list((tmp_path / "out/queries").glob("*.npy"))
    monkeypatch.setattr(vdg_align.VisionProjector, "queries", real)
    assert generate(vdg, mined, tmp_path / "out") == truth[1]


def test_l_tdm_is_a_share_of_one_mean_however_the_negatives_lie(zoo, monkeypatch):
    """Ranks whose rows have more or fewer negatives: their shares add up to the mean over all pairs, none weighs more.

    Of one rank's two rows and the other's two, one has no negative: cross entropies of 4 + 2 * 3 pairs in all."""
    model = train_cir.build_cir("blip_tdm", str(zoo / "blip")).eval()
    pixels = torch.randn(4, 3, model.preprocess.size, model.preprocess.size, generator=torch.manual_seed(0))
    with torch.no_grad():
        tokens, x = model.image(pixels)
    everyone = Everyone(x, x.flip(0), tokens)
    texts = ["make it red", "has two dogs", "is blue", "more of them"]
    draws = [Draw((0, f"r{i}"), (0, f"t{i}"), text, (0, 0, i)) for i, text in enumerate(texts)]

    def some_without(*given):
        drawn = draw_negatives(*given)
        return type(drawn)(*(part[:3] for part in drawn))

    monkeypatch.setattr(train_cir, "draw_negatives", some_without)

    def share(own: list[int]) -> float:
        noise = torch.Generator().manual_seed(0)
        return train_cir.matching_loss(model, everyone, Batch(0, draws, own), noise, Compute(4)).item()

    drawn = some_without(x, x.flip(0), [d.target for d in draws], float(model.tau), torch.Generator().manual_seed(0))
    with torch.no_grad():
        each = [train_cir.tdm_loss(model, tokens, texts, [i], drawn).double() for i in range(4)]
    assert [len(losses) for losses in each] == [3, 3, 3, 1]
    assert share([0, 1]) + share([2, 3]) == pytest.approx(torch.cat(each).mean().item(), abs=1e-5)
    assert share([0, 1]) == pytest.approx(torch.cat(each[:2]).sum().item() / 10, abs=1e-5)


@pytest.mark.parametrize("kind, folder", [("combiner", "clip"), ("sum", "clip"), ("blip_tdm", "blip")])
def test_frozen_vision_stays_in_eval_mode_while_the_text_trains(zoo, kind, folder):
    model = train_cir.build_cir(kind, str(zoo / folder)).train()
    backbone = model.backbone
    assert not any(module.training for module in backbone.vision_model.modules())
    text = backbone.text_encoder if folder == "blip" else backbone.text_model
    assert all(module.training for module in text.modules())
    for module in backbone.vision_model.modules():  # whatever dropout a vision encoder has, its features stay
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    pixels = torch.randn(2, 3, model.preprocess.size, model.preprocess.size)
    assert torch.equal(model.tokens(pixels), model.tokens(pixels))


def test_frozen_models_are_in_eval_mode(vdg):  # noqa: F811
    vision, llm, _, _ = vdg_tune.load_vdg(str(vdg), torch.device("cpu"), torch.float32, "", "")
    for model in (vision, llm):
        assert not any(module.training for module in model.modules())


def test_evaluation_stops_at_one_missing_gallery_image_before_a_model_loads(tmp_path, monkeypatch):
    """main() itself: the picture is in no query, so that a number over fewer would look like any other."""
    drawn = write_world(tmp_path / "world")
    loaded = []
    monkeypatch.setattr(eval_cir, "load_system", lambda device: loaded.append(device))
    (drawn / "img_raw/val/val-3-img5.png").unlink()
    with pytest.raises(UserError, match="1 of 24 images missing: 'val-3-img5'"):
        run_stage(monkeypatch, tmp_path, ROOT=str(drawn / "cirr"), OFFICIAL=False, DEVICE="cpu")
    assert not loaded and not (tmp_path / "out").exists()


def test_a_submission_has_no_byte_to_spare(tmp_path):
    drawn = write_world(tmp_path / "world", "test1", labelled=False, subgroups=10)
    benchmark = read_cirr(drawn / "cirr", "test1")
    at = index(benchmark, True)
    features = torch.randn(len(at.names), 4, generator=torch.manual_seed(0))
    origin = {"protocol": "", "checkpoint": "", "sha256": ""}
    write_submission(str(tmp_path), benchmark, features[: len(benchmark.queries)], features, at, origin)
    for name in ("recall.json", "recall_subset.json"):
        text = (tmp_path / name).read_text()
        assert text == json.dumps(json.loads(text), separators=(",", ":")) and not set(" \n\t") & set(text)


# ---- data ----


def test_what_is_no_picture(tmp_path):
    """Every kind of thing named x.jpg is one line for each, whoever asks, and nobody waits."""
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "to-pipe.jpg").symlink_to("pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "nothing.jpg").symlink_to("absent.jpg")
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(1 << 40)
    names = sorted(os.listdir(tmp_path)) + ["absent.jpg"]
    for decode in (False, True):
        found = unreadable(names, ImageStore(str(tmp_path)), workers=2, decode=decode)
        assert sorted(found) == sorted(names)
        assert all("\n" not in line and len(line) < 300 for line in found.values())


CAPTIONS = [
    "",
    "   ",
    "\u3000\n",
    "red " * 2500,
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u05d0\u05d3\u05d5\u05dd \u202emirrored\u202c",
    "\x1b[31mred\x1b[0m\x07",
    "</s> <s> [INST]",
    "[SEP] [CLS] [ENC] <|endoftext|>",
    "<script>alert(1)</script>",
    "a\u2028b\u2029c",
]


@pytest.mark.parametrize("kind", ["blip_tdm", "combiner"])
def test_hostile_captions_train(zoo, tmp_path, capsys, kind):
    """Blank ones are left out and counted, long ones cut and counted; of all others the loss is a number."""
    names = draw(tmp_path / "images", 6)
    lines = [
        {"reference": names[i % 6], "target": names[(i + 1) % 6], "delta": delta} for i, delta in enumerate(CAPTIONS)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {"backbone": zoo / ("blip" if kind == "blip_tdm" else "clip"), "model": kind, "dataset": "jsonl"}
    given |= {"root": tmp_path / "t.jsonl", "images": tmp_path / "images", "out": tmp_path / "out", "batch": 8}
    given |= {"steps": 2, "device": "cpu", "log_every": 1, "bidirectional": 0.5}
    train([word for name, value in given.items() for word in (f"--{name}", str(value))])
    said = capsys.readouterr().out
    assert "3 of 11 triplets have no text and are left out" in said
    assert "1 of 8 deltas lose what exceeds" in said
    assert all(math.isfinite(record["loss"]) for record in log_of(tmp_path / "out"))
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "out/model.safetensors").values())


def test_names_that_share_one_picture_are_said_or_stop(tmp_path, monkeypatch, capsys):
    """A few copies (a file, a link) stand in the protocol line; where most of a gallery are, no number is given."""
    drawn = write_world(tmp_path / "world")
    pictures, given = drawn / "img_raw/val", {"ROOT": str(drawn / "cirr"), "OFFICIAL": False, "DEVICE": "cpu"}
    run_stage(monkeypatch, tmp_path, **given)
    assert "copies" not in capsys.readouterr().out
    shutil.copy(pictures / "val-1-img0.png", pictures / "val-3-img5.png")
    (pictures / "val-3-img4.png").unlink()
    (pictures / "val-3-img4.png").symlink_to("val-1-img0.png")
    run_stage(monkeypatch, tmp_path, **given)
    wanted = "cirr val: 2 of 24 gallery images are copies of another ('val-3-img4' of 'val-1-img0')"
    assert wanted in capsys.readouterr().out
    assert wanted in json.loads((tmp_path / "out/metrics.json").read_text())["protocol"]
    # names of the split file that lead to one path count as well
    table = json.loads((drawn / "cirr/image_splits/split.rc2.val.json").read_text())
    one = dict.fromkeys(list(table)[:14], "./val/val-0-img0.png")
    (drawn / "cirr/image_splits/split.rc2.val.json").write_text(json.dumps(table | one))
    with pytest.raises(
        UserError, match="14 of 24 gallery images are copies of another.*wanted gallery images that are"
    ):
        run_stage(monkeypatch, tmp_path, **given)
    with pytest.raises(UserError, match="14 of 24 gallery images are copies"):
        benchmark = read_cirr(str(drawn / "cirr"), "val")
        begin_validation(Validation([benchmark]), "val", 0, str(tmp_path / "out"))


def test_queries_repeated_under_new_ids_are_said_or_stop(tmp_path, monkeypatch, capsys):
    drawn = write_world(tmp_path / "world")
    path, given = drawn / "cirr/captions/cap.rc2.val.json", {"ROOT": str(drawn / "cirr"), "OFFICIAL": False}
    records = json.loads(path.read_text())
    for copies, again in ((3, False), (9, True)):
        more = [records[i % 3] | {"pairid": 1000 + i} for i in range(copies)]
        path.write_text(json.dumps(records + more))
        if again:
            with pytest.raises(UserError, match="9 of 17 queries are copies of another .'1000' of '100'.; recall over"):
                run_stage(monkeypatch, tmp_path, DEVICE="cpu", **given)
        else:
            run_stage(monkeypatch, tmp_path, DEVICE="cpu", **given)
            assert "cirr val: 3 of 11 queries are copies of another ('1000' of '100')" in capsys.readouterr().out


# ---- training ----


def test_a_resume_on_other_ranks_stops_or_is_the_same_run(world, zoo, chats, tmp_path):  # noqa: F811
    """Stage 1: the same global batch goes on, on 2 -> 1 and on 1 -> 2 ranks, with the weights of an unbroken run.

    Stages whose draws depend on the ranks stop and show the difference."""
    from common import ranks

    stage("vdg_align", *chats, "--batch", "4", "--out", str(tmp_path / "whole"))
    one, two = ("--batch", "4"), ("--batch", "2")
    for first, second in (((2, two), (1, one)), ((1, one), (2, two))):
        out = tmp_path / f"from-{first[0]}"
        argv = [*chats, "--out", str(out)]

        def begin(argv=argv, how=first[1]):
            asked = iter([False, False, True])
            ranks.stop_requested = lambda: next(asked)  # in the third step
            try:
                stage("vdg_align", *argv, *how)
            except SystemExit as stopped:
                return stopped.code

        def go_on(argv=argv, how=second[1]):
            ranks.stop_requested = lambda: False
            stage("vdg_align", *argv, *how)

        kept = ranks.stop_requested
        try:
            if first[0] == 1:
                assert begin() == 143
            else:
                assert run_ranks(2, begin) == [143, 143]
            run_ranks(second[0], go_on) if second[0] == 2 else go_on()
        finally:
            ranks.stop_requested = kept
        assert [r["step"] for r in records(out)] == [1, 2, 3, 4, 5, 6]
        unbroken, resumed = (load_file(folder / "projection.safetensors") for folder in (tmp_path / "whole", out))
        for key in unbroken:  # Adam moves a weight by its rate however small the gradient (lr 1e-3)
            torch.testing.assert_close(resumed[key], unbroken[key], rtol=0, atol=5e-6)
    with pytest.raises(UserError, match="items a step: 4 there, 5 now"):
        stage("vdg_align", *chats, "--batch", "5", "--out", str(tmp_path / "from-1"))

    train(arguments(world, zoo, tmp_path / "cir", "sum", steps=2, batch=3))
    with pytest.raises(RuntimeError, match="RANKS: 1 there, 2 now"):
        run_ranks(2, train, arguments(world, zoo, tmp_path / "cir", "sum", steps=2, batch=3))
    assert [r["step"] for r in log_of(tmp_path / "cir")] == [1, 2]


@pytest.mark.parametrize("kind", ["sum", "blip_tdm"])
def test_a_loss_that_is_no_number_on_one_rank_stops_both(world, zoo, tmp_path, monkeypatch, kind):  # noqa: F811
    real, steps = train_cir.l_tcc_ranks, []

    def poisoned(*given, **more):
        steps.append(0)
        bad = len(steps) == 3 and os.environ.get("RANK") == "1"
        return real(*given, **more) * (math.nan if bad else 1.0)

    monkeypatch.setattr(train_cir, "l_tcc_ranks", poisoned)

    def work() -> str:
        try:
            train(arguments(world, zoo, tmp_path, kind, batch=3, save_every=1))
        except UserError as fault:
            all_sum(0)  # both are here: neither waits for the other in a collective
            return str(fault)
        return "went on"

    for said in run_ranks(2, work):
        assert "not finite at step 3" in said
    assert sorted(path.name for path in (tmp_path / "last").glob("step-*")) == ["step-1", "step-2"]
    assert not (tmp_path / "model.safetensors").exists()


def test_a_last_batch_that_leaves_a_rank_without_items(chats, tmp_path):
    """Three ranks of two items each, over ten: in the last step of an epoch the third has none."""
    stage("vdg_align", *chats, "--batch", "6", "--out", str(tmp_path / "one"))
    run_ranks(3, stage, "vdg_align", *chats, "--batch", "2", "--out", str(tmp_path / "three"))
    one, three = (load_file(tmp_path / name / "projection.safetensors") for name in ("one", "three"))
    for name in one:
        torch.testing.assert_close(one[name], three[name], rtol=0, atol=5e-6)
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "three"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5


def test_an_llm_that_is_not_whole(zoo, tmp_path):
    """No folder; half a shard; a shard that is not there: one line that names it."""
    with pytest.raises(UserError, match="absent"):
        load_llm(str(tmp_path / "absent"), torch.float32, "cpu")
    shutil.copytree(zoo / "llama", tmp_path / "llama")
    shards = sorted((tmp_path / "llama").glob("model*.safetensors"))
    data = shards[-1].read_bytes()
    shards[-1].write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged") as error:
        load_llm(str(tmp_path / "llama"), torch.float32, "cpu")
    assert shards[-1].name in str(error.value)
    shards[-1].unlink()
    with pytest.raises(UserError, match=str(tmp_path / "llama")):
        load_llm(str(tmp_path / "llama"), torch.float32, "cpu")


def test_an_out_that_cannot_be_written(world, zoo, chats, tmp_path, monkeypatch, capsys):  # noqa: F811
    """A file in the place of OUT, and a disk that is read-only: one line each, and the file is as it was."""
    (tmp_path / "file").write_text("mine")

    def one_line(work, words: str) -> None:
        with pytest.raises(SystemExit) as stopped:
            run(work)
        said = capsys.readouterr().err.strip()
        assert stopped.value.code == 1 and said.startswith("error: ") and "\n" not in said and words in said, said

    stages = {
        "align": lambda out: stage("vdg_align", *chats, "--out", str(out)),
        "cir": lambda out: train(arguments(world, zoo, out, "sum", steps=1)),
        "mine": lambda out: mine(zoo, world / "aux", out),
    }
    for work in stages.values():
        one_line(lambda work=work: work(tmp_path / "file"), "is a file; wanted a folder")
        assert (tmp_path / "file").read_text() == "mine"

    def read_only(path, flags, *more, real=os.open):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(tmp_path / "frozen")):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *more)

    (tmp_path / "frozen").mkdir()
    monkeypatch.setattr(os, "open", read_only)
    for work in stages.values():
        one_line(lambda work=work: work(tmp_path / "frozen"), "Read-only file system: ")
    one_line(lambda: save_state(tmp_path / "frozen", 1, {"a": 1}, {}), "Read-only file system: ")
    one_line(lambda: lock_folder(tmp_path / "frozen" / "new"), "Read-only file system: ")


# ---- mining and generation ----


def test_the_order_of_files_does_not_decide_ties(zoo, tmp_path, monkeypatch):
    """Pictures that are equal in threes, made in two orders in two folders and listed in two orders: the same bytes."""
    names = [f"p{i:02}.png" for i in range(24)]

    def fill(folder: Path, order: list[str]) -> None:
        for name in order:
            picture(folder / f"{name[1:3]}.png", int(name[1:3]) // 3 % 4, 0.0)

    fill(tmp_path / "a", names)
    fill(tmp_path / "b", names[::-1])
    mine(zoo, tmp_path / "a", tmp_path / "one")
    monkeypatch.setattr(os, "listdir", lambda *given, real=os.listdir: real(*given)[::-1])
    mine(zoo, tmp_path / "b", tmp_path / "two", block=5)
    for name in OUTPUTS:
        if name != "subgroups.html":
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_three_ranks_write_the_same(vdg, mined, truth, tmp_path):  # noqa: F811
    run_ranks(3, lambda: generate(vdg, mined, tmp_path / "out", batch=3) and None)
    assert (tmp_path / "out/pseudo.jsonl").read_bytes() == truth[1]
    assert len(list((tmp_path / "out/parts").glob("*.jsonl"))) == 3


# ---- retrieval ----


@pytest.mark.parametrize("kind", ["sum", "blip_tdm"])
def test_odd_sets_of_pseudo_triplets(world, zoo, tmp_path, kind):  # noqa: F811
    """None: one line. A hundred times as many as human ones, or all with one target: the loss is a number."""
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(UserError, match="none.jsonl holds no triplet"):
        train(arguments(world, zoo, tmp_path / "none", kind, pseudo=tmp_path / "none.jsonl"))
    lines = (world / "pseudo.jsonl").read_text().splitlines()
    many = [json.dumps(json.loads(lines[i % 20]) | {"delta": f"number {i}"}) for i in range(2400)]
    (tmp_path / "many.jsonl").write_text("\n".join(many))
    target = json.loads(lines[0])["target"]
    alike = [json.dumps(json.loads(line) | {"target": target}) for line in lines]
    (tmp_path / "alike.jsonl").write_text("\n".join(alike))
    for name in ("many", "alike"):
        out = tmp_path / name
        given = {"pseudo": tmp_path / f"{name}.jsonl", "steps": 2, "beta": 0.5, "tau": 0.01, "bidirectional": 0.1}
        train(arguments(world, zoo, out, kind, **given))
        assert all(math.isfinite(record["loss"]) for record in log_of(out))
        assert all(torch.isfinite(t).all() for t in load_file(out / "model.safetensors").values())
    with pytest.raises(UserError, match="every step has one target"):  # and no human triplet beside it
        train(arguments(world, zoo, tmp_path / "one", kind, pseudo=tmp_path / "alike.jsonl", triplets=False))
