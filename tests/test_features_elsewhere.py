"""The lines of docs/search.md that read a gallery's features without this repository, as they stand there."""

import re

import pytest
import torch
import zoo as writer
from conftest import ROOT

import train_cir
from common.encoding import Compute
from common.gallery import Engine, Query, find, index_folder


@pytest.mark.parametrize("faiss", [False, True])
def test_numpy_and_faiss_find_what_search_finds(faiss, zoo, tmp_path):
    if faiss:
        pytest.importorskip("faiss")
    names = writer.draw(tmp_path / "pictures", 17, 3)
    model = train_cir.build_cir("sum", str(zoo / "clip")).eval()
    folder = str(tmp_path / "pictures")
    index_folder(model, folder, tmp_path / "out", Compute(4))
    more = writer.draw(tmp_path / "more", 5, 4)
    for name in more:  # a second run adds rows
        (tmp_path / "more" / name).rename(tmp_path / "pictures" / name)
    gallery = index_folder(model, folder, tmp_path / "out", Compute(4))

    (place,) = (tmp_path / "out").glob("index-*")
    (code,) = re.findall(r"```python\n(import json, numpy.*?)```", (ROOT / "docs/search.md").read_text(), re.DOTALL)
    if not faiss:
        code = code.replace(", faiss", "", 1)
        code = re.sub(r"index = faiss.*\n", "", code)
        code = re.sub(r"scores, found = .*without faiss: ", "found = ", code).replace('.npy", mmap_mode="r")', '.npy")')
    given = {"place": str(place)}
    exec(code, given)
    found = given["found"][0] if faiss else given["found"]
    of_row = {row: name for name, row in given["names"].items()}
    assert sorted(given["names"]) == sorted(names + more) and given["names"] == gallery.of_name

    # search.py's own ranking, asked by the vector of that picture
    engine = Engine(None, {}, "", gallery, Compute(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.gallery.vectors", lambda engine, queries: torch.tensor(given["rows"][:1]))
        ((*first,),) = find(engine, [Query("", ("text",), -1)], 10)
    assert [of_row[int(row)] for row in found] == [gallery.names[id] for id, _ in first]
