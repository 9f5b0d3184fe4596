"""Searches a folder of one's own pictures: by a picture, by words, by both; judges what is found, and learns from it.

    python search.py --gallery my_pictures --checkpoint out/cir         # indexes, then serves http://127.0.0.1:8000
    python search.py --gallery my_pictures --checkpoint out/cir --queries queries.jsonl --out results.jsonl

Reads a folder of pictures and a checkpoint of train_cir.py (or plain CLIP or BLIP). The page needs starlette and
uvicorn (requirements-search.txt), queries from a file do not. docs/search.md tells what the page and its JSON can do.

Writes OUT/index-KEY/ (features of the pictures, by content), OUT/unreadable.txt, OUT/thumbs, OUT/uploads, and what a
person says on the page: marks.jsonl, wrong.jsonl, labels.jsonl, accepted.jsonl and teach-N/, a checkpoint each.
"""

from common.flags import early_help

early_help(__name__, __file__)  # answers --help before torch is imported

import asyncio
import contextlib
import functools
import hashlib
import ipaddress
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from common.annotations import read_triplets
from common.asked import answer, read_asked
from common.cir_model import inner, one_vector, read_settings
from common.console import UserError, run, say
from common.encoding import Compute
from common.files import (
    keep_apart,
    lock_folder,
    read_json,
    save_folder,
    sync,
    write_json,
    write_jsonl,
)
from common.flags import at_least, override
from common.gallery import (
    Engine,
    Query,
    find,
    index_folder,
    keep_to_folder,
    recall_of,
    rendition,
    stamp_of,
    summary,
    vision_digest,
    vision_weights,
)
from common.hub import located
from common.images import ImageStore, shown
from common.memory import advise
from common.notes import Notes, is_held_out, key_of, note, read_notes, teaching_data, verdicts
from common.pixels import open_image
from common.ranks import init_world
from common.server import body_of, guarded, is_address, json_of, listen, number_of, only, serve
from common.trained_on import trained_pairs
from eval_cir import load_baseline
from train_cir import load_cir

# ---- what is searched ----
GALLERY = ""  # folder of the pictures, searched recursively
CHECKPOINT = ""  # folder written by train_cir.py; empty: plain BACKBONE, the sum of picture and text feature
BACKBONE = ""  # without CHECKPOINT: CLIP or BLIP, empty: the embedded CLIP, which knows product photographs only
# With CHECKPOINT: where its CLIP or BLIP lies now, if it is no longer where it was.
QUERIES = ""  # triplets or {"reference", "delta"}, either may be missing, .jsonl or .csv: answered without a page
TOP = 48  # pictures found for a query

# ---- page ----
HOST = "127.0.0.1"  # another address opens the page to the network; its address then holds a secret
PORT = 8000  # 0 = any free one
LABEL = ""  # pseudo.jsonl of gen_deltas.py over the same folder: its deltas are judged on the page's second view

# ---- teaching: train_cir.py on the marks and labels, from the present checkpoint ----
TEACH_STEPS = 100  # optimiser steps [ours]
TEACH_BATCH = 32  # triplets a step; fewer where there are fewer [ours]
TEACH_LR = 1e-4  # learning rate [S6.1]
TEACH_TAU = 0.05  # temperature of Eq. 2 where the present model has none (plain BACKBONE) [ours]
HELD_OUT = 5  # the marks of every so-manieth reference are kept apart, to measure what teaching did; 0 = none [ours]

# ---- run ----
OUT = ""  # folder written; empty: out/search/NAME of the gallery; with QUERIES the file of answers
INDEX = ""  # with QUERIES the folder that holds the features; empty: out/search/NAME of the gallery
BATCH = 64  # pictures, and queries, per forward pass
WORKERS = 4  # threads that decode pictures
DEVICE = "auto"  # "auto", "cpu" or "cuda"; features are searched on the CPU
DTYPE = "auto"  # of the model: "auto" is bf16 on cuda and fp32 on CPU; features and scores are always fp32
SEED = 0  # of teaching
CHECK = False  # only try the flags, the folder that is written and the port, then stop

_EMBEDDED = str(Path(__file__).resolve().parent / "demo/models_photos/clip")
_WEB = ("style.css", "app.js", "judge.js", "icon.svg")  # what is served of web/ beside index.html
_UPLOAD = 20 << 20  # bytes of a picture that is uploaded
_TEXT, _TEXTS, _MOST = 500, 8, 500  # characters of a change, changes of a query, pictures of an answer
_SIDES = {"thumb": 320, "image": 1600}  # pixels of a picture's longer side, by address
_FEWEST = 4  # triplets that are worth a training
_STAND_IN = ". The embedded model knows photographs of single products; of other pictures it sees little"
_KS = (1, 5, 10)  # recall of held-out marks
# constants of the present checkpoint that a teaching keeps
_KEPT = "MODEL TEXT_LENGTH FIRST_TOKEN TRAIN_TEXT TRAIN_TDM_HEAD COMBINER_P COMBINER_H COMBINER_DROPOUT"
_KEPT += " PAD TEXT_PROJ_LR ALPHA BETA TDM BIDIRECTIONAL REVERSED_TEXT REVERSED_NEGATIVES"


def load_model(checkpoint: str, backbone: str, device) -> tuple[torch.nn.Module, dict]:
    """The CIR model and its config.json; without a checkpoint the sum of the backbone's features."""
    if checkpoint:
        model = load_cir(checkpoint, device, backbone)
        one_vector(model, "search.py")
        return model, read_settings(checkpoint)
    baseline = load_baseline(backbone, "sum", device)
    return baseline, {"constants": {"MODEL": "blip_tdm" if hasattr(baseline.model, "match") else "sum"}}


def model_name(base: tuple[str, str], number: int) -> str:
    plain = "/".join(base[1].split("/")[-3:])  # of a folder the end, of a hub id all
    return (base[0] or f"plain {plain}") + f", taught ({number})" * bool(number)


# ---- teaching ----
@dataclass
class Site:
    """All that the server's handlers share."""

    out: Path
    engine: Engine
    notes: Notes
    base: tuple[str, str]  # checkpoint and backbone of the command line
    flags: dict  # TOP, and the constants of teaching
    worker: ThreadPoolExecutor  # of one thread: it alone uses the model
    decoders: ThreadPoolExecutor
    contents: list[str]  # sha256 by id
    using: int = 0  # teach-N whose model answers; 0: the one of the command line
    teaching: dict = field(default_factory=lambda: {"state": "idle"})
    process: subprocess.Popen | None = None


def use(site: Site, number: int) -> None:
    """Switches to the model of teach-N, or back to the first (0); in the worker, which alone uses the model."""
    checkpoint, backbone = site.base
    folder = str(site.out / f"teach-{number}") if number else checkpoint
    model, settings = load_model(folder, backbone, site.engine.compute.device)
    if vision_digest(model) != vision_digest(site.engine.model):
        raise UserError(f"{folder} sees pictures with other weights than the index was made with")
    site.engine.model, site.engine.settings, site.using = model, settings, number
    site.engine.name = model_name(site.base, number)
    write_json(site.out / "using.json", {"base": [os.path.abspath(p) if p else "" for p in site.base], "teach": number})


def teaching_command(site: Site, folder: Path, train: list[dict], pseudo: list[dict]) -> list[str]:
    """Writes what train_cir.py reads and returns its command line."""
    write_jsonl(folder / "train.jsonl", train)
    model = site.engine.model
    frozen = vision_weights(model).keys()
    start = {name: p for name, p in inner(model).named_parameters() if name not in frozen and name != "tau"}
    backbone, tau = located(inner(model).source), inner(model).tau.item()
    config = {"stage": "cir", "build": {"backbone": backbone}, "tau": tau}
    known = str(site.out / f"teach-{site.using}") if site.using else site.base[0]  # of a plain backbone none
    save_folder(folder / "start", trained_pairs([], known) | {"model.safetensors": start}, {"config.json": config})
    constants, flags = site.engine.settings["constants"], site.flags
    given = {name: constants[name] for name in _KEPT.split() if name in constants}
    given |= {"BACKBONE": backbone, "START_FROM": folder / "start", "OUT": folder}
    given |= {"DATASET": "jsonl", "ROOT": folder / "train.jsonl"}
    images = site.engine.gallery.folder
    uploads = {path.name for path in (site.out / "uploads").glob("*")}
    if any(line["reference"] in uploads for line in train):
        images += os.pathsep + str(site.out / "uploads")
    batch = min(flags["TEACH_BATCH"], len(train), len(pseudo) or len(train))
    given |= {"IMAGES": images, "STEPS": flags["TEACH_STEPS"], "LR": flags["TEACH_LR"], "BATCH": batch}
    given |= {"TAU": site.engine.settings.get("tau", flags["TEACH_TAU"]), "VIEWS": 2, "SEED": flags["SEED"]}
    given |= {"LOG_EVERY": 1, "SAVE_EVERY": flags["TEACH_STEPS"], "DEVICE": str(site.engine.compute.device)}
    if pseudo:
        write_jsonl(folder / "pseudo.jsonl", pseudo)
        given |= {"PSEUDO": folder / "pseudo.jsonl", "PSEUDO_IMAGES": site.engine.gallery.folder}
    words = [f"--{name.lower()}={value}" for name, value in given.items()]
    return [sys.executable, str(Path(__file__).with_name("train_cir.py")), *words]


def teach(site: Site, number: int) -> None:
    """Trains teach-N from the present model, measures both on the held-out marks, and switches if it got better."""
    folder, started = site.out / f"teach-{number}", time.monotonic()
    status, before = site.teaching, site.using
    try:
        store, of_name = images_of(site), site.engine.gallery.of_name
        train, held, pseudo, gone = teaching_data(site.notes, store)
        held = [line for line in held if line["target"] in of_name]
        queries = [Query(store.path(n := line["reference"]), line["texts"], of_name.get(n, -1)) for line in held]
        targets = [of_name[line["target"]] for line in held]

        def measured() -> dict | None:
            return recall_of(site.engine, queries, targets, _KS) if held else None

        status |= {"gone": gone, "before": site.worker.submit(measured).result()}
        command = teaching_command(site, folder, train, pseudo)
        with open(folder / "output.txt", "wb") as output:
            site.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            code = site.process.wait()
        if code:
            last = (folder / "output.txt").read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError("stopped" if status.get("stop") else " ".join(last) or f"train_cir.py ended with {code}")
        before = site.using
        site.worker.submit(use, site, number).result()
        status["after"] = site.worker.submit(measured).result()
        record = {key: status[key] for key in ("before", "after")} | {"from": before, "train": len(train)}
        record |= {"pseudo": len(pseudo), "held_out": len(held), "gone": gone}
        record["seconds"] = round(time.monotonic() - started)
        write_json(folder / "teach.json", record)
        better = bool(held) and sum(status["after"].values()) > sum(status["before"].values())
        if not better:
            site.worker.submit(use, site, before).result()
        status |= {"state": "done", "better": better}
    except Exception as error:  # of any kind, a GPU out of memory too: else it would be "training" for ever
        if not isinstance(error, (UserError, OSError)):
            traceback.print_exc()
        if site.using == number:  # not measured
            site.worker.submit(use, site, before)
        status |= {"state": "failed", "error": str(error).strip().partition("\n")[0] or type(error).__name__}
    finally:
        site.process = None


def teachings(out: Path) -> list[int]:
    """The numbers N of teach-N, in order; a copy that somebody keeps as teach-1-good is none."""
    return sorted(int(path.name[6:]) for path in out.glob("teach-*") if path.name[6:].isdecimal())


def images_of(site: Site) -> ImageStore:
    """The pictures that a mark may name."""
    return ImageStore([site.engine.gallery.folder, str(site.out / "uploads")], own=True)


def teaching_status(site: Site) -> dict:
    """What is going on, what there is to learn from, and the models taught so far."""
    marks = site.notes.marks.values()
    answer = {key: value for key, value in site.teaching.items() if key != "stop"}
    if answer["state"] == "training":
        log = site.out / f"teach-{answer['number']}" / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        if lines and lines[-1].startswith("{") and lines[-1].endswith("}"):
            shown_keys = ("step", "loss", "seconds_left")
            answer |= {key: value for key, value in json.loads(lines[-1]).items() if key in shown_keys}
        answer["steps"] = site.flags["TEACH_STEPS"]
    right = sum(mark["right"] for mark in marks)
    answer |= {"using": site.using, "right": right, "wrong": len(marks) - right}
    answer |= {"held_out": sum(m["right"] and m["held_out"] for m in marks), "fewest": _FEWEST}
    answer["labels"] = verdicts(site.notes)
    done = [number for number in teachings(site.out) if (site.out / f"teach-{number}/teach.json").exists()]
    answer["taught"] = [{"number": n, **read_json(site.out / f"teach-{n}/teach.json")} for n in done]
    answer["base"], answer["model"] = model_name(site.base, 0), site.engine.name
    return answer


# ---- server: what it answers (docs/search.md) ----
def picture(site: Site, value) -> tuple[str, str, int]:
    """An id, or the token of an upload -> path, name, id (-1: an upload that is not in the gallery)."""
    gallery = site.engine.gallery
    if type(value) is int:
        if value not in gallery.names:
            raise UserError(f"there is no picture {value}")
        path = os.path.join(gallery.folder, gallery.names[value])
        if stamp_of(path) != gallery.stamps[value]:
            raise UserError(f"{gallery.names[value]} has changed or gone; start search.py again to index it")
        return path, gallery.names[value], value
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        if path := ImageStore(str(site.out / "uploads")).find(value):
            return path, os.path.basename(path), gallery.ids.get(value, -1)
    raise UserError(f"reference is {shown(value)}, wanted an id or the token of an upload")


def asked(site: Site, data: dict) -> tuple[Query, str, str]:
    """The query of a request, the name of its reference ("" for none), and its texts in one, as marks keep them."""
    texts = data.get("texts", [])
    if not isinstance(texts, list) or len(texts) > _TEXTS or not all(isinstance(t, str) for t in texts):
        raise UserError(f"texts: wanted a list of at most {_TEXTS} texts")
    texts = [text.strip() for text in texts if text.strip()]
    if any(len(text) > _TEXT for text in texts):
        raise UserError(f"a text has more than {_TEXT} characters")
    path, name, own = picture(site, data["reference"]) if data.get("reference") is not None else ("", "", -1)
    if not path and not texts:
        raise UserError("wanted a reference, a text, or both")
    return Query(path, tuple(texts), own), name, " and ".join(texts)


def in_worker(site: Site, function, *given):
    return asyncio.get_running_loop().run_in_executor(site.worker, function, *given)


async def api_gallery(request) -> dict:
    site = request.app.state.site
    gallery, live = site.engine.gallery, site.engine.gallery.live
    start = number_of(request.query_params, "start", 0, 0, 10**9)
    count = number_of(request.query_params, "count", 200, 0, _MOST)
    items = [{"id": id, "name": gallery.names[id]} for id in live[start : start + count].tolist()]
    answer = {"total": len(live), "start": start, "items": items, "key": gallery.key, "model": site.engine.name}
    answer |= {"folder": os.path.basename(os.path.abspath(gallery.folder)), "unreadable": gallery.unreadable}
    return answer | {"label": bool(site.notes.pairs), "most_upload": _UPLOAD}


async def api_search(request) -> dict:
    site, data = request.app.state.site, await json_of(request)
    only(data, "reference", "texts", "top")
    query, name, text = asked(site, data)
    top = number_of(data, "top", site.flags["TOP"], 1, _MOST)
    started = time.perf_counter()
    (found,) = await in_worker(site, find, site.engine, [query], top)
    took = round(1000 * (time.perf_counter() - started))
    results = []
    for id, score in found:
        named = site.engine.gallery.names[id]
        mark = site.notes.marks.get((name, named, text)) if name else None
        results.append({"id": id, "name": named, "score": round(score, 4), "right": mark and mark["right"]})
    model, texts = inner(site.engine.model), list(query.texts)
    cut, unknown = (bool(texts and lost(texts)) for lost in (model.too_long, model.unknown))
    reference = {"name": name, "id": query.exclude} if name else None
    return {"results": results, "text": text, "reference": reference, "cut": cut, "unknown": unknown, "ms": took}


async def api_upload(request) -> dict:
    """The body is the picture's bytes; kept if it decodes within the limits of every picture."""
    site, data = request.app.state.site, await body_of(request, _UPLOAD)
    token, folder = hashlib.sha256(data).hexdigest(), site.out / "uploads"

    def keep() -> str:
        folder.mkdir(exist_ok=True)
        aside = folder / f".{secrets.token_hex(8)}.tmp"
        try:
            aside.write_bytes(data)
            open_image(aside, "reduce")  # within the limits of every picture, and whole
            with Image.open(aside) as image:
                kind = image.format.lower().replace("mpo", "jpeg")  # a phone's JPEG of several pictures
            sync(aside)
            os.replace(aside, folder / f"{token}.{kind}")
        except UserError as error:
            raise UserError(str(error).replace(f"{aside}: ", "this file ").replace(str(aside), "it")) from None
        finally:
            aside.unlink(missing_ok=True)
        return token

    return {"token": await asyncio.get_running_loop().run_in_executor(site.decoders, keep)}


async def api_mark(request) -> dict:
    """Right true, false, or null, which takes the mark away."""
    site, data = request.app.state.site, await json_of(request)
    only(data, "reference", "texts", "target", "right")
    query, reference, text = asked(site, data)
    if not (reference and text):
        raise UserError("a mark wants a reference and a text: it becomes a triplet to learn from")
    _, target, _ = picture(site, number_of(data, "target", None, 0, 10**9))
    right = data.get("right")
    if not (right is None or isinstance(right, bool)):
        raise UserError(f"right is {shown(right)}, wanted true, false or null")
    mark = {"right": right, "held_out": is_held_out(site.notes, reference), "texts": query.texts}
    note(site.notes, "marks", (reference, target, text), None if right is None else mark)
    return {"right": right, "marks": len(site.notes.marks)}


async def api_undo(request) -> dict:
    """Takes back the last mark or the last label of this run, whichever "what" names."""
    site, what = request.app.state.site, (await json_of(request)).get("what")
    if what not in ("marks", "labels"):
        raise UserError("what: wanted marks or labels")
    for i in reversed(range(len(site.notes.history))):
        kind, key, before = site.notes.history[i]
        if kind != what:
            continue
        note(site.notes, kind, key, before, keep=False)
        del site.notes.history[i]
        if kind == "labels":
            return {"n": list(map(key_of, site.notes.pairs)).index(key)}
        reference, target, text = key
        target = site.engine.gallery.of_name.get(target)
        return {"reference": reference, "text": text, "target": target, "right": before and before["right"]}
    raise UserError("nothing to undo")


async def api_label(request) -> dict:
    """POST: a verdict on pair n. Both answer with a pair (GET: `at`, POST: the next without a verdict) and counts."""
    site = request.app.state.site
    notes, gallery = site.notes, site.engine.gallery
    if not notes.pairs:
        raise UserError("no pairs to judge: start search.py with --label pseudo.jsonl, written by gen_deltas.py")
    at = None
    if request.method == "POST":
        data = await json_of(request)
        n = number_of(data, "n", None, 0, len(notes.pairs) - 1)
        pair, verdict = notes.pairs[n], data.get("verdict")
        delta = data.get("delta", pair.delta)
        if verdict not in ("accept", "edit", "reject", "skip"):
            raise UserError("verdict: wanted accept, edit, reject or skip")
        if verdict == "edit" and not (isinstance(delta, str) and 0 < len(delta.strip()) <= _TEXT):
            raise UserError(f"delta: wanted a text of 1 to {_TEXT} characters")
        said = {"verdict": verdict, "delta": delta.strip() if verdict == "edit" else pair.delta, "id": pair.id}
        note(notes, "labels", key_of(pair), said)
    elif "at" in request.query_params:
        at = number_of(request.query_params, "at", None, 0, len(notes.pairs) - 1)
    if at is None:
        at = next((i for i, pair in enumerate(notes.pairs) if key_of(pair) not in notes.labels), None)
    answer = {"total": len(notes.pairs), "counts": verdicts(notes)}
    if at is None:
        return answer | {"pair": None}
    pair = notes.pairs[at]
    ends = {"reference": pair.reference, "target": pair.target}
    ends = {end: {"id": gallery.of_name[name], "name": name} for end, name in ends.items()}
    label = notes.labels.get(key_of(pair))
    label = label and {"verdict": label["verdict"], "delta": label["delta"]}
    return answer | {"pair": {"n": at, **ends, "delta": pair.delta, "label": label}}


async def api_teach(request) -> dict:
    """GET: how it goes. POST: starts, or with {"stop": true} ends what goes on."""
    site = request.app.state.site
    if request.method == "POST":
        stop = (await json_of(request)).get("stop")
        going = site.teaching["state"] == "training"
        if stop and going and site.process:
            site.teaching["stop"] = True
            site.process.terminate()
        elif not stop:
            lessons = teaching_data(site.notes, images_of(site))
            if going:
                raise UserError("it is being taught already")
            if len(lessons.train) < _FEWEST:
                says = f"{len(lessons.train)} right marks and labels to learn from, {_FEWEST} or more are wanted"
                raise UserError(says + f"; {lessons.gone} name pictures that are gone" * bool(lessons.gone))
            site.teaching = {"state": "training", "number": max(teachings(site.out), default=0) + 1}
            threading.Thread(target=teach, args=(site, site.teaching["number"]), daemon=True).start()
    return teaching_status(site)


async def api_use(request) -> dict:
    site, data = request.app.state.site, await json_of(request)
    number = number_of(data, "teach", None, 0, 10**6)
    if number and not (site.out / f"teach-{number}" / "teach.json").exists():
        raise UserError(f"there is no finished teach-{number}")
    await in_worker(site, use, site, number)
    return teaching_status(site)


async def serve_picture(side: int, request):
    """thumb/ID, image/ID: a JPEG of a gallery picture, or of an upload by its token; upright, in every browser."""
    from starlette.responses import FileResponse

    site, value = request.app.state.site, request.path_params["id"]
    path, _, id = picture(site, int(value) if re.fullmatch("[0-9]{1,9}", value) else value)
    content = site.contents[id] if id >= 0 else value
    made = asyncio.get_running_loop().run_in_executor(site.decoders, rendition, path, site.out, content, side)
    kept = "private, max-age=31536000, immutable" if "v" in request.query_params else "no-cache"
    return FileResponse(await made, media_type="image/jpeg", headers={"Cache-Control": kept})


def build_app(site: Site):
    from starlette.applications import Starlette
    from starlette.responses import FileResponse, JSONResponse
    from starlette.routing import Route

    def as_json(handler):
        async def answered(request):
            return JSONResponse(await handler(request), headers={"Cache-Control": "no-store"})

        return answered

    def as_file(name):
        async def answered(request):
            return FileResponse(Path(__file__).with_name("web") / name, headers={"Cache-Control": "no-cache"})

        return answered

    async def refuse(request, error):
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return JSONResponse({"error": said}, 400, {"Cache-Control": "no-store"})

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        if site.process:
            site.process.terminate()
        site.worker.shutdown(wait=False, cancel_futures=True)
        site.decoders.shutdown(wait=False, cancel_futures=True)

    routes = [Route("/", as_file("index.html")), *(Route(f"/{name}", as_file(name)) for name in _WEB)]
    routes += [Route(f"/{name}/{{id}}", functools.partial(serve_picture, side)) for name, side in _SIDES.items()]
    gets = {"gallery": api_gallery, "label": api_label, "teach": api_teach}
    posts = {"search": api_search, "upload": api_upload, "mark": api_mark, "undo": api_undo}
    posts |= {"label": api_label, "teach": api_teach, "use": api_use}
    routes += [Route(f"/api/{name}", as_json(handler)) for name, handler in gets.items()]
    routes += [Route(f"/api/{name}", as_json(handler), methods=["POST"]) for name, handler in posts.items()]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={UserError: refuse, OSError: refuse})
    app.state.site = site
    return app


def server_of(site: Site, listening: socket.socket, host: str):
    """-> uvicorn's server and its address. Beyond this machine's own addresses every path begins with a secret."""
    import uvicorn

    hosts, anywhere = {"127.0.0.1", "localhost", "::1", host.lower()}, host in ("0.0.0.0", "::")
    alone = host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)
    secret = "" if alone else secrets.token_urlsafe(16)
    if anywhere:
        hosts.add(host := socket.gethostname().lower())
    app = guarded(build_app(site), hosts, anywhere, secret)
    config = uvicorn.Config(app, http="h11", ws="none", log_level="warning", access_log=False, server_header=False)
    config.timeout_graceful_shutdown = 2  # seconds
    shown_host, port = f"[{host}]" if ":" in host else host, listening.getsockname()[1]
    return uvicorn.Server(config), f"http://{shown_host}:{port}/{secret + '/' if secret else ''}"


def first_model(out: Path, base: tuple[str, str], device) -> tuple[torch.nn.Module, dict, int]:
    """The model that answered when the server of the same command last ended: the given one, or one taught since."""
    said = read_json(out / "using.json") if (out / "using.json").exists() else {}
    number = said.get("teach", 0) if said.get("base") == [os.path.abspath(p) if p else "" for p in base] else 0
    if number:
        say(f"the model taught on the page answers: {out / f'teach-{number}'} (the page switches back)")
    return *load_model(str(out / f"teach-{number}") if number else base[0], base[1], device), number


def main() -> None:
    # ---- flags
    at_least(globals(), BATCH=1, WORKERS=1, TOP=1, PORT=0, HELD_OUT=0, TEACH_STEPS=1, TEACH_BATCH=1, TEACH_LR=0)
    world = init_world(DEVICE)
    compute = Compute.on(world.device, DTYPE, BATCH, WORKERS)
    if not GALLERY:
        raise UserError("--gallery is empty; name the folder of your pictures")
    if QUERIES and not OUT.endswith(".jsonl"):
        raise UserError(f"--out {OUT!r}: with --queries name the file of answers, such as --out results.jsonl")
    out = Path((INDEX if QUERIES else OUT) or f"out/search/{os.path.basename(os.path.abspath(GALLERY))}")
    pairs = read_triplets(LABEL) if LABEL else []
    queries = read_asked(QUERIES, GALLERY) if QUERIES else []  # first: a mistake shows before the folder is indexed
    flag = "--index" if QUERIES else "--out"
    keep_apart(out, GALLERY, f"{flag} --gallery")  # it holds thumbnails and uploads
    lock_folder(out, flag=flag)
    keep_to_folder(out, GALLERY, flag)
    listening = None if QUERIES else listen(HOST, PORT)  # first: a port in use shows before the folder is indexed
    if CHECK:
        if CHECKPOINT:
            read_settings(CHECKPOINT)  # UserError where there is none
        return say(f"would serve {GALLERY}, and write {out}")

    # ---- model and index
    base = (CHECKPOINT, BACKBONE if CHECKPOINT else BACKBONE or _EMBEDDED)
    model, settings, using = first_model(out, base, compute.device)
    if not CHECKPOINT:
        say(f"no --checkpoint: {model_name(base, 0)}, picture + text" + _STAND_IN * (not BACKBONE))
    gallery = index_folder(model, GALLERY, out, compute)
    say(summary(gallery, GALLERY, out))
    engine = Engine(model, settings, model_name(base, using), gallery, compute)
    if QUERIES:
        return answer(engine, queries, OUT, TOP)

    # ---- page
    notes = read_notes(out, HELD_OUT, pairs, gallery.of_name)
    flags = {"TOP": TOP, "TEACH_STEPS": TEACH_STEPS, "TEACH_BATCH": TEACH_BATCH, "TEACH_LR": TEACH_LR}
    flags |= {"TEACH_TAU": TEACH_TAU, "SEED": SEED}
    pools = ThreadPoolExecutor(1, "model"), ThreadPoolExecutor(WORKERS, "pictures")
    site = Site(out, engine, notes, base, flags, *pools, contents=list(gallery.ids), using=using)
    server, address = server_of(site, listening, HOST)
    say(f"{address}   (Ctrl-C ends it)")
    serve(server, listening)


if __name__ == "__main__":
    override(globals())
    run(advise(main, "a smaller --batch", planned=False))
