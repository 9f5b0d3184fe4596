"""Where the files of a model are found: folders, the hub and its cache, and a checkpoint's models that moved."""

import functools
import hashlib
import http.server
import json
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file

import train_cir
from common import hub
from common.console import UserError
from common.images import Preprocess
from common.pretrained import load_model, read_config
from mine_pairs import Encoder

COMMIT = "5f0c3d7a" * 5
NAME = "someone/tiny-clip"


class Answers(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs: what a repository holds, and its files. Remembers what it was asked."""

    folder: Path
    asked: list[str]
    gated = False

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.asked.append(self.path)
        files = sorted(os.listdir(self.folder))
        path, _, file = self.path.partition(f"/{NAME}/resolve/")
        if self.path == f"/api/models/{NAME}":
            record = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.give(200, json.dumps(record).encode(), body)
        name = file.split("/", 1)[-1]
        if not path and name in files and not self.gated:
            data = (self.folder / name).read_bytes()
            return self.give(200, data, body, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})
        code = "GatedRepo" if self.gated else "EntryNotFound" if file else "RepoNotFound"
        self.give(403 if self.gated else 404, b"", body, {"X-Error-Code": code, "X-Error-Message": f"{code} error"})

    def give(self, status: int, data: bytes, body: bool, more: dict | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT, **(more or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def online(zoo, tmp_path, monkeypatch):
    """A hub on this machine that holds the zoo's CLIP as a .bin alone, and an empty cache -> what it is asked."""
    folder = tmp_path / "repository"
    shutil.copytree(zoo / "clip", folder)
    torch.save({k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    handler = type("Handler", (Answers,), {"folder": folder, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_at(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path)
    yield handler
    server.shutdown()
    server.server_close()


def point_at(monkeypatch, endpoint: str, tmp_path: Path) -> None:
    """A process that is online, whose hub is at the endpoint, with its cache under tmp_path."""
    constants = huggingface_hub.constants
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()  # a session made offline refuses
    hub._ask_hub.cache_clear()


def load() -> transformers.CLIPModel:
    config = read_config(NAME, ("clip",), "--backbone")
    return load_model(transformers.CLIPModel, NAME, config, torch.float32, "--backbone")


def same(model, other) -> bool:
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_bin_of_the_hub_loads_online_and_then_offline(zoo, online, monkeypatch):
    """No conversion is asked for, nothing is asked twice, and the cache alone does for the next run."""
    wanted = transformers.CLIPModel.from_pretrained(zoo / "clip")
    model = train_cir.build_cir("sum", NAME)
    assert same(model.backbone, wanted)
    words = transformers.AutoTokenizer.from_pretrained(zoo / "clip")
    assert model.tokenizer("a red b").input_ids == words("a red b").input_ids
    assert [path for path in online.asked if "api/models" in path] == [f"/api/models/{NAME}"]
    assert not any(word in path for path in online.asked for word in ("discussions", "refs", "convert", "safetensors"))
    for again in (True, False):  # offline by the variable, and with a hub that is gone
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", again)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        hub._ask_hub.cache_clear()
        online.asked.clear()
        assert same(train_cir.build_cir("sum", NAME).backbone, wanted)
        assert same(Encoder(NAME, torch.device("cpu"), torch.float32).model.vision_model, wanted.vision_model)
        assert online.asked == []


def test_the_reader_of_pictures_asks_the_same_way(zoo, online):
    assert Preprocess.from_folder(NAME) == Preprocess.from_folder(zoo / "clip")
    assert [path for path in online.asked if "api/models" in path] == [f"/api/models/{NAME}"]


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no.such.host.invalid", "silent", "login page"])
def test_an_unreachable_hub_is_one_line_after_seconds(tmp_path, monkeypatch, endpoint):
    monkeypatch.setattr(hub, "_PATIENCE", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections
        if endpoint == "login page":
            threading.Thread(target=log_in, args=[server], daemon=True).start()
        if "://" not in endpoint:
            endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        point_at(monkeypatch, endpoint, tmp_path)
        began = time.monotonic()
        words = f"--backbone {NAME}: no such folder, not in the cache, and http.* cannot be reached"
        with pytest.raises(UserError, match=words) as error:
            load()
    assert time.monotonic() - began < 4 and "\n" not in str(error.value) and "name a folder" in str(error.value)


def log_in(server: socket.socket) -> None:
    """Answers one request as the network of an hotel does."""
    connection, _ = server.accept()
    connection.recv(9999)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>")
    connection.close()


def test_offline_without_a_cache(tmp_path, monkeypatch):
    point_at(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--backbone .*not in the cache, and HF_HUB_OFFLINE is set; name a folder"):
        load()


def test_the_hub_refuses(online):
    with pytest.raises(UserError, match="--x no/body: no such folder here and no such model on the hub"):
        hub.checkpoint_file("no/body", "config.json", "--x")
    online.gated = True
    with pytest.raises(UserError, match="terms to be accepted; .*hf auth login") as error:
        load()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["demo/modles/clip", "./clip", "../x/y", "/no/where", "clip", "", "a b/c", "~/clip"])
def test_a_mistyped_folder_is_said_to_be_one(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such folder, and no hub id") as error:
        load_config = read_config(source, ("clip",), "--backbone")
        assert not load_config
    assert f"--backbone {source}" in str(error.value) and "Repo id" not in str(error.value)


def test_a_file_is_no_folder(zoo):
    with pytest.raises(UserError, match="config.json is a file; the model's folder is wanted"):
        read_config(str(zoo / "clip" / "config.json"), ("clip",))


# ---- a checkpoint's models ----
def test_locate(tmp_path):
    model, checkpoint = tmp_path / "a" / "clip", tmp_path / "a" / "out" / "cir"
    model.mkdir(parents=True)
    checkpoint.mkdir(parents=True)
    saved, beside = hub.located(str(model)), hub.near(str(model), checkpoint)
    assert saved == str(model) and beside == "../../clip"
    find = functools.partial(hub.locate, saved, flag="--backbone", beside=beside)
    assert find(checkpoint) == str(model)
    moved = tmp_path / "b"
    os.rename(tmp_path / "a", moved)  # both together: another disk, another machine
    assert find(moved / "out" / "cir") == str(moved / "clip")
    os.rename(moved / "clip", moved / "other")
    with pytest.raises(UserError, match="stands on the model in .*a/clip, which is not there; .* by --backbone"):
        find(moved / "out" / "cir")
    with pytest.raises(UserError, match="by --llm"):
        hub.locate(saved, checkpoint, "--llm")  # an older checkpoint, that kept no path beside itself
    assert find(moved / "out" / "cir", override=str(moved / "other")) == str(moved / "other")
    assert hub.locate("owner/name", checkpoint, "--llm") == "owner/name" and hub.near("owner/name", checkpoint) == ""
    with pytest.raises(UserError, match="does not say which model"):
        hub.locate(3, checkpoint, "--llm")


def test_a_moved_backbone_is_named_again_and_must_be_the_same(zoo, tmp_path):
    shutil.copytree(zoo / "clip", tmp_path / "clip")
    build = {"model": "combiner", "backbone": str(tmp_path / "clip")}
    model = train_cir.build_cir(**build)
    config = {"build": build, "tau": 0.01, "constants": {"FROZEN_SHA256": train_cir.frozen_sha256(model)}}
    weights = {"model.safetensors": train_cir.get_trained(model)}
    train_cir.save_folder(tmp_path / "old", weights, {"config.json": config})
    config["near"] = {"backbone": hub.near(build["backbone"], tmp_path / "out" / "cir")}
    train_cir.save_folder(tmp_path / "out" / "cir", weights, {"config.json": config})

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("clip", "out", "old"):
        os.rename(tmp_path / name, elsewhere / name)
    found = train_cir.load_cir(str(elsewhere / "out" / "cir"))  # by the path beside the checkpoint
    assert same(found, model.eval())
    with pytest.raises(UserError, match="which is not there; name its new place by --backbone"):
        train_cir.load_cir(str(elsewhere / "old"))
    found = train_cir.load_cir(str(elsewhere / "old"), backbone=str(elsewhere / "clip"))
    assert same(found, model)
    other = transformers.CLIPModel.from_pretrained(elsewhere / "clip")
    other.vision_model.embeddings.class_embedding.data += 1
    other.save_pretrained(elsewhere / "clip")
    with pytest.raises(UserError, match="was trained on other frozen weights"):
        train_cir.load_cir(str(elsewhere / "old"), backbone=str(elsewhere / "clip"))


def test_a_card_names_no_folder(zoo):
    assert hub.card_name("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"
    assert hub.card_name(str(zoo / "llama")) == hub.card_name("/no/where") == ""
