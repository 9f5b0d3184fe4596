"""Tokenizers of model folders: whole, of the model that they lie beside, and giving back what they read."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import zoo as writer

import train_cir
import vdg_tune
from common import tokenizer as module
from common.console import UserError
from common.files import read_json
from common.llama import load_tokenizer, tokenize
from common.pretrained import read_config
from common.tokenizer import read_tokenizer, tokenizer_sha256

KINDS = ("llama", "clip", "blip")
ALL = pytest.mark.parametrize("kind", KINDS)
TEXTS = ("make it red", "Provide a brief description of the given image.", "<s> ünïcode </s> [SEP] 12")


def read(folder: Path):
    config = read_config(str(folder), KINDS)
    return read_tokenizer(str(folder), config, getattr(config, "text_config", config).vocab_size, "--flag")


def refuse(folder: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        read(folder)
    text = str(error.value)
    assert text.startswith("--flag") and str(folder) in text and "\n" not in text and len(text) < 500, text


def copy(zoo: Path, kind: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo / kind, tmp_path / kind))


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | entries).items() if v is not ...}))


@ALL
def test_equals_what_transformers_reads(zoo, kind):
    ours, theirs = read(zoo / kind), transformers.AutoTokenizer.from_pretrained(zoo / kind)
    assert type(ours) is type(theirs) and ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map and ours.name_or_path == str(zoo / kind)
    assert [ours(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]


@ALL
def test_a_folder_with_only_tokenizer_json_is_read_alike(zoo, tmp_path, kind):
    """What save_pretrained of today writes: no vocab.txt, no merges.txt."""
    folder = copy(zoo, kind, tmp_path)
    before = read(folder)
    before.save_pretrained(tmp_path / "saved")
    for file in ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink(missing_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "saved" / file, folder)
    assert [read(folder)(text).input_ids for text in TEXTS] == [before(text).input_ids for text in TEXTS]


def test_missing_files(zoo, tmp_path):
    blip, clip, llama = (copy(zoo, kind, tmp_path) for kind in ("blip", "clip", "llama"))
    (blip / "vocab.txt").unlink()
    refuse(blip, "no tokenizer.json or vocab.txt")
    for file in ("merges.txt", "vocab.json"):
        data = (clip / file).read_bytes()
        (clip / file).unlink()
        refuse(clip, "no tokenizer.json or vocab.json with merges.txt")
        (clip / file).write_bytes(data)
    (llama / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer.json .tokenizer.model alone"):
        load_tokenizer(str(llama))


def halve(path: Path) -> None:
    lines = path.read_text().split("\n")
    path.write_text("\n".join(lines[: len(lines) // 2]))


def test_halved_files(zoo, tmp_path):
    blip, clip, llama = (copy(zoo, kind, tmp_path) for kind in ("blip", "clip", "llama"))
    halve(blip / "vocab.txt")
    refuse(blip, "its tokenizer knows 41 words, its model 85|makes")
    lines = (zoo / "blip" / "vocab.txt").read_text().split("\n")
    (blip / "vocab.txt").write_text("\n".join(lines[:70]))  # the letters are there: the probe comes back
    refuse(blip, "its tokenizer knows 70 words, its model 85")

    words = [f"w{chr(97 + i)}" for i in range(20)]  # ten of CLIP's 68 words, all but the first two, lose their merges
    merges = [f"w {word[1:]}" for word in words]
    vocab = json.loads((clip / "vocab.json").read_text())
    for word in words:
        vocab[word] = len(vocab)
    (clip / "vocab.json").write_text(json.dumps(vocab))
    edit(clip / "config.json", text_config=read_json(clip / "config.json")["text_config"] | {"vocab_size": len(vocab)})
    (clip / "merges.txt").write_text("\n".join(["#version: 0.2", "r e", "re d</w>", *merges]))
    read(clip)
    (clip / "merges.txt").write_text("\n".join(["#version: 0.2", "r e", "re d</w>", *merges[:4]]))
    refuse(clip, "no merge leads to 16 of its tokenizer's 96 words")
    (clip / "vocab.json").write_text(json.dumps(dict(list(vocab.items())[:40])))
    refuse(clip, "cannot be read|knows")

    record = json.loads((llama / "tokenizer.json").read_text())
    whole = json.dumps(record)
    record["model"]["merges"] = record["model"]["merges"][: len(record["model"]["merges"]) // 4]
    (llama / "tokenizer.json").write_text(json.dumps(record))
    refuse(llama, "no merge leads to")
    record = json.loads(whole)
    record["model"]["vocab"] = dict(list(record["model"]["vocab"].items())[:300])
    record["model"]["merges"] = []
    (llama / "tokenizer.json").write_text(json.dumps(record))
    refuse(llama, "its tokenizer knows 300 words, its model 400|makes")


@ALL
def test_ids_beyond_the_embeddings(zoo, tmp_path, kind):
    folder = copy(zoo, kind, tmp_path)
    size = len(read(folder)) - 1
    cut = {"vocab_size": size}
    if kind != "llama":
        cut = {"text_config": read_json(folder / "config.json")["text_config"] | cut}
    edit(folder / "config.json", **cut)
    refuse(folder, f"its tokenizer has the id {size}, its model embeds {size} words")


def test_a_special_token_that_no_text_gives_may_lie_beyond(zoo, tmp_path):
    """LLaMA copies with a pad token of id 32,000 beside 32,000 embeddings: it is never fed."""
    folder = copy(zoo, "llama", tmp_path)
    record = json.loads((folder / "tokenizer.json").read_text())
    extra = record["added_tokens"][0] | {"id": 400, "content": "<pad>"}
    (folder / "tokenizer.json").write_text(json.dumps(record | {"added_tokens": [*record["added_tokens"], extra]}))
    edit(folder / "tokenizer_config.json", pad_token="<pad>")
    assert read(folder).pad_token_id == 400
    edit(folder / "tokenizer_config.json", eos_token="<pad>")
    refuse(folder, "has the id 400")


@ALL
def test_damaged_files(zoo, tmp_path, kind):
    folder = copy(zoo, kind, tmp_path)
    for file in sorted({"tokenizer.json", "vocab.json", "tokenizer_config.json"} & set(os.listdir(folder))):
        data = (folder / file).read_bytes()
        nested = b"[" * 100_000, b'{"model": ' * 500 + b"1" + b"}" * 500
        for wrong in (b"", b"\x80\x02\xff\xfe", b"{", b"[]", b"3", data[:-40], *nested):
            (folder / file).write_bytes(wrong)
            with pytest.raises(UserError) as error:
                read(folder)
            assert str(folder) in str(error.value) and "\n" not in str(error.value)
        (folder / file).write_bytes(data)
    for file in sorted({"vocab.txt", "merges.txt"} & set(os.listdir(folder))):
        data = (folder / file).read_bytes()
        for wrong in (b"", b"\x80\x02\xff\xfe", b"a\n" * 3):
            (folder / file).write_bytes(wrong)
            if file == "merges.txt" and wrong == b"":  # no merges: two words of 76 have none
                continue
            refuse(folder, "")
        (folder / file).write_bytes(data)


def test_transformers_sees_the_tokenizers_files_and_nothing_else(zoo, tmp_path, monkeypatch):
    """Neither the folder, which may hold code, nor a hub id, for which it would ask the hub a dozen things."""
    folder, seen = copy(zoo, "clip", tmp_path), []
    (folder / "evil.py").write_text("")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})

    class Recorder:
        @staticmethod
        def from_pretrained(given, **how):
            seen.append((sorted(os.listdir(given)), read_json(Path(given, "tokenizer_config.json")), how))
            return transformers.AutoTokenizer.from_pretrained(given, **how)

    monkeypatch.setattr(module, "AutoTokenizer", Recorder)
    read(folder)
    ((files, record, how),) = seen
    assert files == ["merges.txt", "tokenizer_config.json", "vocab.json"] and "auto_map" not in record
    assert how["trust_remote_code"] is False and how["local_files_only"] is True


def test_entries_that_name_files_elsewhere_are_not_followed(zoo, tmp_path):
    """tokenizer_config.json of another's folder: its paths are of no one else's machine, or aim at one."""
    folder, other = copy(zoo, "blip", tmp_path), tmp_path / "outside.txt"
    words = (folder / "vocab.txt").read_text().split("\n")
    other.write_text("\n".join([*words[:5], *reversed(words[5:])]))
    wanted = read(zoo / "blip")("make it red").input_ids
    places = {"vocab_file": str(other), "tokenizer_file": str(other), "special_tokens_map_file": "/etc/passwd"}
    edit(folder / "tokenizer_config.json", **places, fast_tokenizer_files=["tokenizer.5.json"], name_or_path="x/y")
    assert read(folder)("make it red").input_ids == wanted
    (folder / "vocab.txt").unlink()
    refuse(folder, "no tokenizer.json or vocab.txt")


# ---- what is read comes back ----
@pytest.mark.parametrize("declared", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", ...])
def test_a_byte_level_llama_keeps_its_spaces(zoo, tmp_path, declared):
    folder = copy(zoo, "llama", tmp_path)
    writer.byte_level(folder)
    edit(folder / "tokenizer_config.json", tokenizer_class=declared)
    found = load_tokenizer(str(folder))
    assert found.decode(tokenize(found, "make it red, ünïcode!")) == "make it red, ünïcode!"
    assert (found.bos_token_id, found.eos_token_id) == (1, 2)


def test_where_transformers_loses_the_spaces_tokenizer_json_itself_is_read(zoo, tmp_path, monkeypatch):
    folder = copy(zoo, "llama", tmp_path)
    writer.byte_level(folder)
    wanted = load_tokenizer(str(folder))

    class OfOlderVersions:
        """AutoTokenizer of transformers 5.17: a llama model's tokenizer is a LlamaTokenizer, whatever its file says."""

        @staticmethod
        def from_pretrained(folder, config, **how):
            return transformers.LlamaTokenizer.from_pretrained(folder, **how)

    lost = transformers.LlamaTokenizer.from_pretrained(folder)
    assert lost.decode(tokenize(lost, "make it red")) == "makeitred"  # else this test shows nothing
    monkeypatch.setattr(module, "AutoTokenizer", OfOlderVersions)
    found = load_tokenizer(str(folder))
    assert found.decode(tokenize(found, "make it red")) == "make it red"
    assert tokenizer_sha256(found) == tokenizer_sha256(wanted)


def test_a_tokenizer_that_loses_words_is_refused(zoo, tmp_path):
    folder = copy(zoo, "blip", tmp_path)
    words = (folder / "vocab.txt").read_text().split("\n")
    words[words.index("##d")] = "##q2"
    (folder / "vocab.txt").write_text("\n".join(words))
    refuse(folder, r'its tokenizer makes "make it \[unk\]" of "make it red"')


def test_an_end_token_unlike_the_config_is_said(zoo, tmp_path, capsys):
    folder = copy(zoo, "llama", tmp_path)
    load_tokenizer(str(folder))
    assert capsys.readouterr().err == ""
    for ids in ([5, 2], 2):
        edit(folder / "config.json", eos_token_id=ids)
        load_tokenizer(str(folder))
        assert capsys.readouterr().err == ""
    edit(folder / "config.json", eos_token_id=7)
    load_tokenizer(str(folder))
    said = capsys.readouterr().err
    assert said == f"WARNING: --llm {folder}: texts end with the tokenizer's </s> (2), config.json says 7\n"


# ---- the hash ----
@ALL
def test_the_hash_is_of_words_merges_normaliser_and_special_ids(zoo, tmp_path, kind):
    folder = copy(zoo, kind, tmp_path)
    found = read(folder)
    before = tokenizer_sha256(found)
    if found.pad_token is not None:
        found(["a", "make it red"], padding=True, truncation=True, max_length=5)  # leaves its settings in the backend
    assert tokenizer_sha256(found) == before == tokenizer_sha256(read(zoo / kind))
    for file, old, new in {
        "llama": (("tokenizer.json", '"<0x00>"', '"<0xZZ>"'), ("tokenizer_config.json", ': "</s>"', ': "<s>"')),
        "clip": (("merges.txt", "r e\nre d</w>", "re d</w>\nr e"), ("vocab.json", '"w":', '"@":')),
        "blip": (("vocab.txt", "!", "@"), ("tokenizer_config.json", "true", "false")),
    }[kind]:
        text = (folder / file).read_text()
        assert old in text, (file, old)
        (folder / file).write_text(text.replace(old, new))
        assert tokenizer_sha256(read(folder)) != before, (file, old)
        (folder / file).write_text(text)


def test_a_checkpoint_holds_to_the_tokenizer_that_it_was_trained_with(zoo, tmp_path):
    """A tokenizer that changed under a checkpoint stops it; checkpoints from before the hash held it still load."""
    folder = copy(zoo, "blip", tmp_path)
    build = {"model": "blip_tdm", "backbone": str(folder)}
    model = train_cir.build_cir(**build)
    checkpoint = tmp_path / "cir"

    def save(digest: str) -> None:
        shutil.rmtree(checkpoint, ignore_errors=True)
        config = {"build": dict(build), "tau": 0.01, "constants": {"FROZEN_SHA256": digest}}
        train_cir.save_folder(checkpoint, {"model.safetensors": train_cir.get_trained(model)}, {"config.json": config})

    older = {"words": False, "shaping": False}, {"shaping": False}
    digests = train_cir.frozen_sha256(model), *(train_cir.frozen_sha256(model, **how) for how in older)
    assert len(set(digests)) == 3
    for digest in digests:
        save(digest)
        train_cir.load_cir(str(checkpoint))
    words = (folder / "vocab.txt").read_text().split("\n")
    words[5], words[6] = words[6], words[5]  # a and b change places: every text has other ids, and comes back
    (folder / "vocab.txt").write_text("\n".join(words))
    save(digests[0])
    with pytest.raises(UserError, match="was trained on other frozen weights"):
        train_cir.load_cir(str(checkpoint))


@pytest.mark.parametrize("kind, name, part", [("sum", "clip", "text_config"), ("blip_tdm", "blip", "vision_config")])
def test_a_checkpoint_holds_to_how_its_backbone_is_used(zoo, tmp_path, kind, name, part):
    """An activation, an end token or a number of heads that changed in config.json gives other features, no error."""
    folder = copy(zoo, name, tmp_path)
    model = train_cir.build_cir(kind, str(folder))
    config = {"build": {"model": kind, "backbone": str(folder)}, "tau": 0.01}
    config["constants"] = {"FROZEN_SHA256": train_cir.frozen_sha256(model)}
    weights = {"model.safetensors": train_cir.get_trained(model)}
    train_cir.save_folder(tmp_path / "cir", weights, {"config.json": config})
    train_cir.load_cir(str(tmp_path / "cir"))
    before = (folder / "config.json").read_text()
    of_part = read_json(folder / "config.json")[part]
    changes = [{"hidden_act": "relu"}, {"layer_norm_eps": 0.1}, {"num_attention_heads": 1}]
    for change in [*changes, {"eos_token_id": 3}] if name == "clip" else changes:
        edit(folder / "config.json", **{part: of_part | change})
        with pytest.raises(UserError, match="was trained on other frozen weights"):
            train_cir.load_cir(str(tmp_path / "cir"))
        (folder / "config.json").write_text(before)
    train_cir.load_cir(str(tmp_path / "cir"))


def test_a_vdg_holds_to_its_tokenizer_too(zoo, tmp_path):
    """It stops before anything else of the checkpoint is read; without a hash, an older one, it goes on to the LoRA."""
    config = {"stage": "tune", "llm": str(zoo / "llama"), "vision": str(zoo / "instructblip"), "quantize": ""}
    config |= {"lora": {"rank": 4, "alpha": 1.0, "dropout": 0.0, "targets": ["q_proj"]}}
    right = tokenizer_sha256(load_tokenizer(str(zoo / "llama")))
    trained = "was trained with another tokenizer than .*llama holds now"
    for digest, words in (("0" * 64, trained), (right, "adapter_config"), (None, "adapter_config")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"tokenizer_sha256": digest}))
        with pytest.raises((UserError, OSError), match=words):
            vdg_tune.load_vdg(str(tmp_path), "cpu", torch.float32)
