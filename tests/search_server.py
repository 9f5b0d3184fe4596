"""What the two tests of search.py share: an index of little pictures and its server, running in a thread."""

import contextlib
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import search
from common.annotations import read_triplets
from common.encoding import Compute
from common.gallery import Engine, Gallery, index_folder
from common.notes import read_notes

FLAGS = {"TOP": 48, "TEACH_STEPS": 3, "TEACH_BATCH": 4, "TEACH_LR": 1e-3, "TEACH_TAU": 0.05, "SEED": 0}


def index(model, folder: Path, out: Path, batch: int = 4) -> Gallery:
    out.mkdir(parents=True, exist_ok=True)
    return index_folder(model, str(folder), out, Compute(batch, workers=2))


def site_of(backbone: Path, folder: Path, out: Path, label: str = "", held_out: int = 2, checkpoint: str = ""):
    base = (checkpoint, "" if checkpoint else str(backbone))
    model, settings, using = search.first_model(out, base, "cpu")
    gallery = index(model, folder, out)
    engine = Engine(model, settings, search.model_name(base, using), gallery, Compute(64))
    notes = read_notes(out, held_out, read_triplets(label) if label else [], gallery.of_name)
    pools = ThreadPoolExecutor(1), ThreadPoolExecutor(2)
    return search.Site(out, engine, notes, base, dict(FLAGS), *pools, contents=list(gallery.ids), using=using)


@contextlib.contextmanager
def serving(site, host: str = "127.0.0.1") -> Iterator[SimpleNamespace]:
    """-> ask(path or whole address, body=None, **headers), address; the server ends with the block."""
    listening = search.listen(host, 0)
    server, address = search.server_of(site, listening, host)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    here = f"http://127.0.0.1:{listening.getsockname()[1]}/" + address.split("/", 3)[3]

    def ask(path: str, body=None, **headers) -> SimpleNamespace:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"} | headers
        request = urllib.request.Request(path if path.startswith("http:") else here + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, data, found = answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            status, data, found = error.code, error.read(), error.headers
        kind = found.get("Content-Type", "")
        return SimpleNamespace(
            status=status, body=data, headers=found, json=json.loads(data) if kind == "application/json" else None
        )

    try:
        yield SimpleNamespace(ask=ask, address=here)
    finally:
        server.should_exit = True
        thread.join(20)
