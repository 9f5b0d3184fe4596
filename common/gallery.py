"""The features of a folder of pictures, kept by content and searched: what search.py serves.

A model here is one of train_cir.py's, or a plain backbone around one (`.model`): image, target, text, compose."""

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common.batches import ahead, chunks
from common.cir_model import inner
from common.console import UserError, printable, progress, reason_of, warn
from common.encoding import Compute
from common.files import (
    SMALL_JSON,
    JsonlAppender,
    file_sha256,
    read_json,
    real_path,
    sync,
    tensors_sha256,
    write_json,
    write_jsonl,
    write_text,
)
from common.images import ImageStore, list_images, safe_name
from common.pixels import open_image
from common.retrieval import best, rank, recall, score_blocks

_HEADER = 128  # bytes of a .npy header of a matrix: numpy leaves room in it for the rows to come


# ---- model ----
def vision_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a gallery feature depends on: training leaves it as it is, so an index outlives every teaching."""
    named = sorted(inner(model).named_parameters())
    return {name: p for name, p in named if re.search(r"\b(vision_model|visual_projection|vision_proj)\b", name)}


def vision_digest(model: torch.nn.Module) -> str:
    return tensors_sha256(vision_weights(model).items(), inner(model).preprocess.described())


def pixels_of(model: torch.nn.Module, path: str) -> torch.Tensor:
    """A file -> (3, S, S); a JPEG that is too large is read small, as one's own pictures are in every stage."""
    return open_image(path, "reduce", inner(model).preprocess)


@torch.no_grad()
def encode_pixels(model: torch.nn.Module, pixels: torch.Tensor, compute: Compute) -> tuple[torch.Tensor, torch.Tensor]:
    """pixels (B, 3, S, S) -> tokens (B, ...) on the device, features (B, d) fp32, normalised, on the CPU."""
    with compute.autocast():
        tokens, features = inner(model).image(pixels.to(compute.device))
    return tokens, F.normalize(features.float(), dim=1).cpu()


# ---- index: features of a folder, by content ----
@dataclass
class Gallery:
    """A picture's id is its row of features: it stays while the folder changes. Equal files are one picture."""

    folder: str
    key: str  # which picture has which id, as a hash: part of addresses that a browser keeps
    names: dict[int, str]  # id -> name, in the order of names; of equal files the first; pictures that are gone: none
    of_name: dict[str, int]  # every readable name -> id
    stamps: dict[int, tuple]  # id -> size and time of change of that file
    ids: dict[str, int]  # sha256 -> id, of every picture ever indexed
    features: torch.Tensor  # (ids, d) fp32, normalised, memory-mapped
    live: torch.Tensor  # (M,) ids in the order of names: the gallery that is ranked
    unreadable: int


def whole_chunks(log: JsonlAppender, file: Path) -> list[dict]:
    """The records of index.jsonl whose features are there, bit for bit; what follows the first bad one is dropped."""
    kept, offset = [], _HEADER
    with open(file, "rb") if file.exists() else open(os.devnull, "rb") as features:
        features.seek(offset)
        for record in log.done:
            size = 4 * len(record["pictures"]) * record["width"]
            if hashlib.sha256(features.read(size)).hexdigest() != record["sha256"]:
                break
            kept.append(record)
            offset += size
    if len(kept) < len(log.done):
        warn(f"{file} is damaged from byte {offset:,} on: the pictures from there on are encoded again")
        write_jsonl(log.path, kept)
    if file.exists():
        os.truncate(file, max(offset, _HEADER))  # features of a chunk that a kill left without its record
    return kept


def append_features(file: Path, rows: np.ndarray, before: int) -> None:
    """Writes (n, d) features behind the `before` rows that file has, and a header that tells of all."""
    with open(file, "r+b" if file.exists() else "w+b") as features:
        shape = (before + len(rows), rows.shape[1])
        np.lib.format.write_array_header_1_0(features, {"descr": "<f4", "fortran_order": False, "shape": shape})
        assert features.tell() == _HEADER
        features.seek(_HEADER + before * rows.shape[1] * 4)
        features.write(np.ascontiguousarray(rows, "<f4").tobytes())
    sync(file)


def index_folder(model: torch.nn.Module, folder: str, out: Path, compute: Compute) -> Gallery:
    """Encodes what is new or changed in the folder, a batch at a time, and maps the features of all.

    Each batch is a run of rows in features.npy, then a line of index.jsonl with their sha256: a kill loses a batch at
    most. A file of known size and time of change is not read again; one that could not be read is tried again."""
    names, store, digest = list_images(folder), ImageStore(folder, own=True), vision_digest(model)
    kind = str(compute.dtype).removeprefix("torch.")
    place = out / f"index-{digest[:16]}-{kind}"
    log, file = JsonlAppender(place / "index.jsonl", {"vision": digest, "dtype": kind}), place / "features.npy"
    ids, seen, width = {}, {}, 0  # sha256 -> row; name -> (size, time, sha256 or "", reason)

    def take(record: dict) -> None:
        for content in record["pictures"]:
            ids[content] = len(ids)
        seen.update((name, tuple(rest)) for name, *rest in record["files"])

    for record in whole_chunks(log, file):
        take(record)
        width = record["width"] or width  # 0: nothing of it could be read
    stamps = {name: stamp_of(os.path.join(folder, name)) for name in names}
    failed = {name for name in names if name in seen and not seen[name][2]}  # a disk or a permission may be back
    for name in names:
        try:
            safe_name(name)
        except UserError as error:  # a name that index.jsonl could not hold
            seen[name] = (*stamps[name], "", reason_of(error))
    todo = [name for name in names if name in failed or seen.get(name, ())[:2] != stamps[name]]

    def look(part: list[str]) -> list[tuple]:
        """(sha256, pixels or None if the content is known, reason why it cannot be read) of each."""

        def one(name: str) -> tuple:
            try:
                path = store.path(name)
                pixels = pixels_of(model, path) if name in failed else None  # fails at the header, before it is hashed
                if (content := file_sha256(path)) in ids:
                    return content, None, ""
                return content, pixels_of(model, path) if pixels is None else pixels, ""
            except (UserError, OSError) as error:
                return "", None, reason_of(error).removeprefix(f"{os.path.join(folder, name)}: ")

        return list(pool.map(one, part))

    with ThreadPoolExecutor(max(1, compute.workers)) as pool:
        parts = chunks(progress(todo, f"indexing {folder}"), compute.batch) if todo else ()
        for part, looked in ahead(look, parts):
            fresh = {content: pixels for content, pixels, _ in looked if pixels is not None and content not in ids}
            rows = np.zeros((0, width), np.float32)
            if fresh:
                rows = encode_pixels(model, torch.stack(list(fresh.values())), compute)[1].numpy()
                width = rows.shape[1]
                append_features(file, rows, len(ids))
            files = [[name, *stamps[name], found[0], found[2]] for name, found in zip(part, looked, strict=True)]
            files = [file for file in files if seen.get(file[0]) != tuple(file[1:])]
            if not files:
                continue
            record = {"sha256": hashlib.sha256(rows.tobytes()).hexdigest(), "width": width}
            record |= {"pictures": list(fresh), "files": files}
            log.append(record)
            take(record)
    return gallery_of(folder, out, file, names, seen, ids, width)


def keep_to_folder(out: Path, folder: str, flag: str) -> None:
    """OUT is of one folder of pictures, whose path it remembers in OUT/gallery.json; UserError for another one.

    Marks and the index name files of it, and another folder of the same name may have files of the same names."""
    here, file = real_path(folder), out / "gallery.json"
    there = read_json(file, SMALL_JSON) if file.exists() else None
    if there is None and os.path.isdir(folder):
        write_json(file, here)
    elif there not in (None, here):
        moved = f"where that folder was moved to {here}, delete {file} and go on"
        raise UserError(f"{flag} {out} belongs to --gallery {there}; name another {flag}, or, {moved}")


def summary(gallery: Gallery, folder: str, out: Path) -> str:
    """How many pictures of the folder are searched, how many are copies, how many could not be read."""
    copies = len(gallery.of_name) - len(gallery.names)
    says = f"{folder}: {len(gallery.names):,} pictures" + f", {copies:,} copies of others" * bool(copies)
    if gallery.unreadable:
        says += f", {gallery.unreadable:,} that cannot be read (listed in {out / 'unreadable.txt'})"
    return says


def stamp_of(path: str) -> tuple[int, int]:
    """Size and time of change of a file; (-1, -1) for one that cannot be reached."""
    try:
        info = os.stat(path)
    except OSError:
        return -1, -1
    return info.st_size, info.st_mtime_ns


def gallery_of(folder: str, out: Path, file: Path, names: list[str], seen: dict, ids: dict, width: int) -> Gallery:
    """The pictures of the folder as it is now; writes OUT/unreadable.txt."""
    unreadable = [f"{name}: {seen[name][3]}\n" for name in names if not seen[name][2]]
    write_text(out / "unreadable.txt", printable("".join(unreadable)))
    firsts, of_name, stamps = {}, {}, {}
    for name in names:
        size, time, content, _ = seen[name]
        if content:
            of_name[name] = id = ids[content]
            if id not in firsts:
                firsts[id], stamps[id] = name, (size, time)
    if not firsts:
        raise UserError(f"{folder}: none of its {len(names):,} pictures can be read, see {out / 'unreadable.txt'}")
    features = torch.from_numpy(np.memmap(file, "<f4", "c", _HEADER, (len(ids), width)))
    key = hashlib.sha256("".join(ids).encode()).hexdigest()[:12]
    return Gallery(folder, key, firsts, of_name, stamps, ids, features, torch.tensor(list(firsts)), len(unreadable))


def rendition(path: str, out: Path, content: str, side: int) -> Path:
    """The picture, its longer side at most so many pixels; made once, by content."""
    file = out / f"thumbs/{side}/{content[:2]}/{content}.jpg"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        small = open_image(path, "reduce")
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        aside = file.with_name(f"{content}.{secrets.token_hex(4)}.tmp")
        small.save(aside, "JPEG", quality=90)
        sync(aside)
        os.replace(aside, file)
    return file


# ---- searching ----
class Query(NamedTuple):
    """What is looked for: at least one of a picture's path and a text."""

    path: str  # of the reference; "" for none
    texts: tuple[str, ...]  # what to change, or what to find where there is no reference
    exclude: int  # id of the reference in the gallery, which is not found again; -1 for none


@dataclass
class Engine:
    """A model over a gallery. Used by one thread at a time."""

    model: torch.nn.Module
    settings: dict  # of its config.json
    name: str  # what it is called on the page
    gallery: Gallery
    compute: Compute
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)  # path -> tokens of the last references


def tokens_of(engine: Engine, paths: list[str]) -> list[torch.Tensor]:
    """Tokens of reference pictures; the last 32 are kept, as a person asks several things of one picture."""
    known = {path: engine.tokens[path] for path in paths if path in engine.tokens}
    if fresh := [path for path in dict.fromkeys(paths) if path not in known]:
        pixels = torch.stack([pixels_of(engine.model, path) for path in fresh])
        tokens, _ = encode_pixels(engine.model, pixels, engine.compute)
        known |= zip(fresh, tokens, strict=True)
    engine.tokens = dict(list((engine.tokens | known).items())[-32:])
    return [known[path] for path in paths]


def texts_of(engine: Engine, query: Query) -> tuple[str, ...]:
    """Several changes of a picture: each is composed, and the mean of the compositions is searched. Where no model was
    trained to compose, or there is no picture, they are one text (docs/search.md has the measurement) [ours]."""
    apart = query.path and inner(engine.model) is engine.model
    return query.texts if apart and query.texts else (" and ".join(query.texts),)


@torch.no_grad()
def vectors(engine: Engine, queries: list[Query]) -> torch.Tensor:
    """-> (N, d) fp32 on the CPU, normalised: composed, or of the picture or the text alone."""
    total, model = [0.0] * len(queries), engine.model
    parts = [(i, query.path, text) for i, query in enumerate(queries) for text in texts_of(engine, query)]
    for with_path, with_text in ((True, True), (True, False), (False, True)):
        rows = [part for part in parts if (bool(part[1]), bool(part[2])) == (with_path, with_text)]
        if not rows:
            continue
        texts = [text for _, _, text in rows]
        with engine.compute.autocast():
            if with_path:
                tokens = torch.stack(tokens_of(engine, [path for _, path, _ in rows]))
                found = model.compose(tokens, texts) if with_text else inner(model).target(tokens)
            else:
                found = inner(model).text(texts, engine.compute.device)
        for (i, _, _), row in zip(rows, F.normalize(found.float(), dim=1).cpu(), strict=True):
            total[i] = total[i] + row
    return F.normalize(torch.stack(total), dim=1)


def ranked(engine: Engine, queries: list[Query]) -> Iterator[torch.Tensor]:
    """Cosines (M,) of each query with the gallery in the order of names; -inf for its own reference."""
    gallery = engine.gallery
    for rows, scores in score_blocks(vectors(engine, queries), gallery.features):
        for query, row in zip(queries[rows], scores, strict=True):
            if query.exclude >= 0:
                row[query.exclude] = -torch.inf
            yield row[gallery.live]


def find(engine: Engine, queries: list[Query], top: int) -> list[list[tuple[int, float]]]:
    """(id, cosine) of the `top` best pictures of each query, best first; equal scores in the order of names."""
    answers = []
    for scores in ranked(engine, queries):
        least = scores.topk(min(top, len(scores))).values[-1]
        columns = (scores >= least).nonzero()[:, 0]  # few to sort, all ties at the end among them
        columns = columns[best(scores[columns][None], top)[0]]
        found = zip(engine.gallery.live[columns].tolist(), scores[columns].tolist(), strict=True)
        answers.append([(id, score) for id, score in found if score > -torch.inf])
    return answers


def recall_of(engine: Engine, queries: list[Query], targets: list[int], ks: tuple[int, ...]) -> dict[str, float]:
    """Percent of the queries whose target (an id) is among the K first."""
    ranks = []
    for scores, target in zip(ranked(engine, queries), targets, strict=True):
        column = (engine.gallery.live == target).nonzero()[0]
        ranks.append(rank(scores[None], column))
    return {f"R@{k}": recall(torch.cat(ranks), k) for k in ks}
