"""A run that goes on finds what it began with, or names what changed: pictures, tokenizer."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import zoo as writer
from pictures import noise
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_real_pictures import run_stage
from test_vdg_align import chat

import gen_deltas
import search
import train_cir
import vdg_align
import vdg_tune
from common.batches import epoch_order, stop_together
from common.console import UserError, rank_size
from common.files import save_state
from common.images import ImageStore
from common.resume import note_broken, resume_state


def names(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noise(16, 16, i).save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(count)]


def test_what_changed_is_named(tmp_path):
    """Pictures of another size, gone and new ones, each with their number; the same name in two folders is two."""
    one, two = names(tmp_path / "one", 5), names(tmp_path / "two", 2)
    stores = ImageStore(tmp_path / "one"), ImageStore(tmp_path / "two")
    begun = list(zip(stores, (one, two), strict=True))
    assert resume_state(tmp_path / "out", {"data": "x"}, begun) is None
    save_state(tmp_path / "out", 3, {"w": 1}, {"data": "x"})
    assert resume_state(tmp_path / "out", {"data": "x"}, begun) == (3, {"w": 1})

    (tmp_path / "two/1.png").write_bytes(b"x" * 77)
    with pytest.raises(
        UserError, match=r"1 changed, first '1.png' \(\d+ bytes then, 77 now\); bring the old ones back"
    ):
        resume_state(tmp_path / "out", {"data": "x"}, begun)
    noise(16, 16, 1).save(tmp_path / "two/1.png")
    assert resume_state(tmp_path / "out", {"data": "x"}, begun)[0] == 3

    # other records have another hash: the message holds both, and what became of the pictures
    other = [(stores[0], [*one[2:], *names(tmp_path / "one", 7)[5:]]), begun[1]]
    with pytest.raises(UserError, match="data: .*began, of its pictures 2 gone, first '0.png'; 2 new, first '5.png'"):
        resume_state(tmp_path / "out", {"data": "y"}, other)
    with pytest.raises(UserError, match="with those, or start anew with another --out$"):  # no picture changed
        resume_state(tmp_path / "out", {"data": "x", "LR": 1}, begun)
    (tmp_path / "out/last/pictures.txt").unlink()  # of a run from before there was a list
    assert resume_state(tmp_path / "out", {"data": "x"}, other)[0] == 3


def _resume(out: str, folder: str) -> str:
    try:
        return str(resume_state(out, {}, [(ImageStore(folder), ["0.png", "1.png"])]))
    except UserError as fault:
        return str(fault)


def test_every_rank_stops(tmp_path):
    names(tmp_path / "images", 2)
    resume_state(tmp_path / "out", {}, [(ImageStore(tmp_path / "images"), ["0.png", "1.png"])])
    save_state(tmp_path / "out", 3, {"w": 1}, {})
    (tmp_path / "images/1.png").write_bytes(b"x")
    one, two = run_ranks(2, _resume, str(tmp_path / "out"), str(tmp_path / "images"))
    assert one == two and "'1.png'" in one


def _stop(out: str, folder: str, broken: list[str]) -> str:
    """What a rank says that found its picture broken, or none."""
    images, name = ImageStore(folder), broken[rank_size()[0]]
    try:
        stop_together(name and unreadable_of(images, name), out)
    except UserError as fault:
        return str(fault)
    return ""


def unreadable_of(images: ImageStore, name: str) -> Exception:
    with pytest.raises(UserError) as found:
        images.open(name)
    return found.value


def test_a_picture_that_no_step_could_read_may_be_replaced(tmp_path):
    """Found by rank 1 of two: both say the same, and the list of the run takes the new file as it is from then on."""
    folder, out = tmp_path / "images", tmp_path / "out"
    three = names(folder, 3)
    pictures = [(ImageStore(folder), three)]
    os.truncate(folder / "1.png", 90)
    os.truncate(folder / "2.png", 90)
    resume_state(out, {}, pictures)
    save_state(out, 3, {"w": 1}, {})
    one, two = run_ranks(2, _stop, str(out), str(folder), ["", "1.png"])
    assert one == two and one.endswith("; replace or remove the file; once it is replaced, the same command goes on")
    assert (out / "last/broken.txt").read_text() == f"90 {folder}/1.png\n"
    assert resume_state(out, {}, pictures)[0] == 3  # nothing was done about it yet

    noise(16, 16, 1).save(folder / "1.png")
    assert resume_state(out, {}, pictures)[0] == 3
    for name in ("1.png", "2.png"):  # now a step may have used the one; nobody found the other broken
        before = (folder / name).read_bytes()
        noise(20, 20, 5).save(folder / name)
        with pytest.raises(UserError, match=f"1 changed, first '{name}'"):
            resume_state(out, {}, pictures)
        (folder / name).write_bytes(before)

    # one that changed after the run began: earlier steps may have used what it was
    later = (out / "last/pictures.txt").stat().st_mtime + 5
    os.utime(folder / "2.png", (later, later))
    said = run_ranks(2, _stop, str(out), str(folder), ["2.png", ""])
    assert said[0] == said[1] and said[0].endswith("; replace or remove the file")
    assert "2.png" not in (out / "last/broken.txt").read_text()


def test_what_could_not_be_read_may_come_back_in_another_format(tmp_path):
    """And a list of before, which lacks the pictures of validation, refuses none of them."""
    folder, out = tmp_path / "images", tmp_path / "out"
    three = names(folder, 3)
    os.truncate(folder / "1.png", 90)
    resume_state(out, {}, [(ImageStore(folder), three)])
    save_state(out, 3, {"w": 1}, {})
    assert note_broken(out, [str(folder / "1.png")])
    (folder / "1.png").unlink()
    noise(16, 16, 1).save(folder / "1.jpg")
    assert resume_state(out, {}, [(ImageStore(folder), three), (ImageStore(folder), three[:1])])[0] == 3
    (folder / "2.png").write_bytes(b"x")
    with pytest.raises(UserError, match="1 changed, first '2.png'"):
        resume_state(out, {}, [(ImageStore(folder), three)])


@pytest.fixture
def tuned(zoo, tmp_path) -> dict[str, dict]:
    """Flags of stages 1, 2 and 5 on a few pictures; the LLaMA is a copy that a test may change."""
    chat(tmp_path, 4)
    shutil.copytree(zoo / "llama", tmp_path / "llama")
    pictures = writer.draw(tmp_path / "images", 6, seed=1)
    lines = [{"id": i, "reference": pictures[i], "target": pictures[i + 1], "delta": "make it red"} for i in range(5)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    how = {"images": tmp_path / "images", "device": "cpu", "workers": 0, "batch": 4}
    own = how | {"dataset": "jsonl", "root": tmp_path / "own.jsonl"}
    align = how | {"chat": tmp_path / "chat.json", "vision": zoo / "instructblip", "llm": tmp_path / "llama"}
    tune = own | {"aligned": tmp_path / "align", "epochs": 1, "held_out": 0, "lora_rank": 2}
    train = own | {"model": "sum", "backbone": zoo / "clip", "steps": 1, "out": tmp_path / "cir"}
    return {"align": align | {"out": tmp_path / "align"}, "tune": tune | {"out": tmp_path / "vdg"}, "train": train}


def test_training_names_the_picture_that_changed(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(train_cir, "stop_requested", lambda: False)
    stages = {"align": (vdg_align, "0-001.png"), "tune": (vdg_tune, "1-003.png"), "train": (train_cir, "1-003.png")}
    for name, (stage, picture) in stages.items():
        run_stage(stage, **tuned[name])
        before = (tmp_path / "images" / picture).read_bytes()
        noise(50, 50).save(tmp_path / "images" / picture)
        with pytest.raises(UserError, match=f"1 changed, first '{picture}'"):
            run_stage(stage, **tuned[name])
        (tmp_path / "images" / picture).write_bytes(before)
        run_stage(stage, **tuned[name])  # it is finished


def test_a_tokenizer_swapped_between_two_runs_is_refused(tuned, tmp_path):
    """Of align, which has no checkpoint yet that knows it; of tune, whose aligned checkpoint may be an older one."""
    run_stage(vdg_align, **tuned["align"])
    config = json.loads((tmp_path / "align/config.json").read_text())
    del config["tokenizer_sha256"]
    (tmp_path / "align/config.json").write_text(json.dumps(config))
    (tmp_path / "align/manifest.json").unlink()  # it vouches for the file that was
    run_stage(vdg_tune, **tuned["tune"])
    text = (tmp_path / "llama/tokenizer.json").read_text()
    swapped = json.loads(text)
    vocab = swapped["model"]["vocab"]
    one, two = [word for word in vocab if len(word) == 1][:2]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (tmp_path / "llama/tokenizer.json").write_text(json.dumps(swapped))
    for stage, name in ((vdg_align, "align"), (vdg_tune, "tune")):
        with pytest.raises(UserError, match="other constants .tokenizer: "):
            run_stage(stage, **tuned[name])
    (tmp_path / "llama/tokenizer.json").write_text(text)
    for stage, name in ((vdg_align, "align"), (vdg_tune, "tune")):
        run_stage(stage, **tuned[name])


def other_model(source: Path, folder: Path) -> Path:
    """A copy with noise on every weight."""
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        noisy = {name: tensor + 0.01 * torch.randn(tensor.shape) for name, tensor in load_file(file).items()}
        save_file(noisy, file, {"format": "pt"})
    return folder


def test_another_llm_or_vision_side_is_refused_wherever_it_is_loaded(zoo, tuned, tmp_path):
    """A moved one is the same: stages 1 and 2 go on and generation takes it; a VDG of before knows no hash."""
    vision, folder = zoo / "instructblip", tmp_path / "vdg"
    others = {"llm": other_model(zoo / "llama", tmp_path / "b"), "vision": other_model(vision, tmp_path / "c")}
    moved = {"llm": shutil.copytree(zoo / "llama", tmp_path / "d"), "vision": shutil.copytree(vision, tmp_path / "e")}
    deltas = {"vdg": folder, "pairs": tmp_path / "own.jsonl", "images": tmp_path / "images", "max_pairs": 2}
    deltas |= {"max_new": 2, "device": "cpu", "workers": 0, "out": tmp_path / "pseudo"}
    stages = {"align": vdg_align, "tune": vdg_tune, "deltas": gen_deltas}
    hows = {"align": tuned["align"], "tune": tuned["tune"], "deltas": deltas}
    for name, stage in stages.items():
        run_stage(stage, **hows[name])
        run_stage(stage, **hows[name] | moved)

    hows["deltas"] = deltas | {"max_pairs": 4}
    hows["merge"], stages["merge"] = {"out": folder, "merge": tmp_path / "merged", "device": "cpu"}, vdg_tune
    for role, other in others.items():
        for name, where in (("tune", tmp_path / "align"), ("deltas", folder), ("merge", folder)):
            with pytest.raises(UserError, match=f"^--{role} {other} is not the model that {where} was trained on: "):
                run_stage(stages[name], **hows[name] | {role: other})
        with pytest.raises(UserError, match=f"other constants .model of --{role}: "):
            run_stage(vdg_align, **hows["align"] | {role: other})
    said = len((tmp_path / "pseudo/pseudo.jsonl").read_text().splitlines())
    run_stage(gen_deltas, **hows["deltas"] | moved)
    run_stage(vdg_tune, **hows["merge"] | moved)
    (moved["llm"] / "model.safetensors").unlink()
    run_stage(gen_deltas, **hows["deltas"] | moved)  # all is described: nobody reads the weights
    assert said == 2 and len((tmp_path / "pseudo/pseudo.jsonl").read_text().splitlines()) == 4

    config = json.loads((folder / "config.json").read_text())
    assert set(config.pop("models_sha256")) == {"llm", "vision"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "manifest.json").unlink()  # it vouches for the file that was
    before = hows["deltas"] | {"out": tmp_path / "again", "max_pairs": 2}
    run_stage(gen_deltas, **before)
    with pytest.raises(UserError, match="written with other settings .llm: "):
        run_stage(gen_deltas, **before | {"llm": others["llm"], "max_pairs": 4})


def cirr(root: Path, images: Path) -> dict:
    """Flags of eight triplets in CIRR's layout, no two of one picture."""
    pictures = sorted(writer.draw(images, 16, seed=2))
    table = {name[:-4]: f"./{name}" for name in pictures}
    records = []
    for i, (reference, target) in enumerate(zip(pictures[::2], pictures[1::2], strict=True)):
        one = {"pairid": i, "reference": reference[:-4], "target_hard": target[:-4], "target_soft": {}}
        members = {"id": i, "members": [reference[:-4], target[:-4]], "reference_rank": 0, "target_rank": 1}
        records.append(one | {"caption": "make it red", "img_set": members})
    for part, file, value in (("captions", "cap", records), ("image_splits", "split", table)):
        (root / part).mkdir(parents=True)
        (root / part / f"{file}.rc2.train.json").write_text(json.dumps(value))
    return {"dataset": "cirr", "root": root, "images": images}


@pytest.mark.parametrize("name", ["align", "tune", "train"])
def test_a_run_that_met_a_picture_cut_short_goes_on_once_it_is_replaced(tuned, name, tmp_path, monkeypatch, capsys):
    """It ends with the weights of a run that had the whole picture; --check_decode finds it before."""
    monkeypatch.setattr(train_cir, "stop_requested", lambda: False)
    stage = {"align": vdg_align, "tune": vdg_tune, "train": train_cir}[name]
    batch = 1 if name == "align" else 2
    how = tuned[name] | {"batch": batch, "save_every": 1, "workers": 1}
    item = epoch_order(4 * batch, 0, 0)[-1]  # of the last of four steps
    last = f"0-{item:03}.png"
    if name != "align":
        run_stage(vdg_align, **tuned["align"])
        how |= cirr(tmp_path / "cirr", tmp_path / "images")
        last = f"2-{2 * item:03}.png"
    how |= {"steps": 4} if name == "train" else {}
    picture, file = tmp_path / "images" / last, "model.safetensors" if name == "train" else "projection.safetensors"
    noise(60, 60, 3).save(picture, "JPEG", quality=95)
    whole = picture.read_bytes()
    run_stage(stage, **how | {"out": tmp_path / "whole"})
    picture.write_bytes(whole[: len(whole) // 2])

    capsys.readouterr()
    run_stage(stage, **how, check=True)
    assert "0 unreadable" in capsys.readouterr().out
    with pytest.raises(UserError, match="missing"):
        run_stage(stage, **how, check=True, check_decode=True)
    assert f"{last}: cannot be decoded" in (how["out"] / "missing.txt").read_text()
    with pytest.raises(UserError, match=f"{last}: cannot be decoded .*once it is replaced, the same command goes on"):
        run_stage(stage, **how)
    assert sorted(path.name for path in (how["out"] / "last").glob("step-*")) == ["step-2", "step-3"]
    picture.write_bytes(whole)
    run_stage(stage, **how)
    one, two = (load_file(out / file) for out in (tmp_path / "whole", how["out"]))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("change", [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 0.004}])
def test_pictures_prepared_otherwise_are_refused(zoo, tuned, tmp_path, change, capsys):
    """None of these shows in a model's weights or in repr(): each stage that stands on the model stops, what is kept
    of its features is made anew."""
    for name in ("instructblip", "clip"):
        shutil.copytree(zoo / name, tmp_path / name)
    tuned["align"]["vision"], tuned["train"]["backbone"] = tmp_path / "instructblip", tmp_path / "clip"
    tuned["search"] = {"gallery": tmp_path / "images", "backbone": tmp_path / "clip", "queries": tmp_path / "own.jsonl"}
    tuned["search"] |= {"device": "cpu", "index": tmp_path / "index", "out": tmp_path / "results.jsonl"}
    deltas = {"vdg": tmp_path / "vdg", "pairs": tmp_path / "own.jsonl", "images": tmp_path / "images"}
    tuned["deltas"] = deltas | {"max_new": 2, "device": "cpu", "workers": 0, "out": tmp_path / "pseudo"}
    stages = {"align": vdg_align, "tune": vdg_tune, "deltas": gen_deltas, "train": train_cir, "search": search}
    for name, stage in stages.items():
        run_stage(stage, **tuned[name])

    for name in ("instructblip", "clip"):
        path = tmp_path / name / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    otherwise = "was trained on pictures prepared otherwise than preprocessor_config.json of --vision says now"
    faults = {"align": "other constants .pixels: ", "tune": otherwise, "deltas": otherwise, "train": "FROZEN_SHA256"}
    tuned["tune"]["out"] = tmp_path / "another vdg"
    shutil.rmtree(tmp_path / "pseudo/parts")
    for name, words in faults.items():
        with pytest.raises(UserError, match=words):
            run_stage(stages[name], **tuned[name])
    run_stage(search, **tuned["search"])
    assert len(list((tmp_path / "index").glob("index-*"))) == 2

    # a VDG from before this was kept goes on, and takes no query that was made of other pixels
    config = json.loads((tmp_path / "vdg/config.json").read_text())
    assert config.pop("pixels")
    (tmp_path / "vdg/config.json").write_text(json.dumps(config))
    (tmp_path / "vdg/manifest.json").unlink()
    run_stage(gen_deltas, **tuned["deltas"])
    assert (
        len(list((tmp_path / "pseudo/queries").glob("*.npy"))) == 1 and "encoded again" not in capsys.readouterr().err
    )
