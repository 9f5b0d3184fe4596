"""gen_deltas.py on a tiny random VDG: tokens against Hugging Face's generate, one text whatever happens to a run."""

import errno
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
import zoo as writer
from transformers import AutoModelForCausalLM

import gen_deltas  # sets MKL's summation order: pytest imports all tests before one computes
import vdg_align
import vdg_tune
from common import decode
from common.annotations import FASHIONIQ_CATEGORIES, read_fashioniq, training_triplets
from common.console import UserError, run
from common.decode import (
    FEWEST,
    Sampling,
    choose,
    mix,
    prompt_parts,
    prompt_pieces,
    row_key,
    signed,
    start_engine,
    text_of,
)
from common.files import load_tensors, read_json, read_jsonl, save_folder
from common.flags import constants_of, override
from common.images import ImageStore, load_pixels
from common.llama import load_tokenizer, tokenize
from common.pairs import described, with_deltas

DEFAULTS = constants_of(vars(gen_deltas))
PROMPT = "Request: Analyze.\nReference: <reference>\nTarget: <target>\nResponse:"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """main() reads constants of its module: put them back after each test, and leave the signals of pytest alone."""
    monkeypatch.setattr(gen_deltas, "stop_requested", lambda: False)
    yield
    vars(gen_deltas).update(DEFAULTS)


@pytest.fixture(scope="module")
def vdg(zoo, tmp_path_factory):
    return tiny_vdg(zoo, tmp_path_factory.mktemp("vdg"))


def tiny_vdg(zoo: Path, root: Path) -> Path:
    """A checkpoint as vdg_tune.py writes it: random LoRA, random projection, an LLM that ends now and then."""
    shutil.copytree(zoo / "llama", root / "llama")
    llm = AutoModelForCausalLM.from_pretrained(root / "llama", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    llm.lm_head.weight.data[2] *= 4  # the end token: likely after some words, impossible after others
    llm.save_pretrained(root / "llama")
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.05, "targets": ["q_proj", "v_proj"]}
    vdg_tune.add_lora(llm, *lora.values())
    for module in vdg_tune.lora_modules(llm).values():
        module.lora_B.data.normal_(std=0.3, generator=generator)
        module.lora_A.data.normal_(std=0.3, generator=generator)
    vision = vdg_align.VisionProjector(str(zoo / "instructblip"), llm.config.hidden_size)
    vision.projection.weight.data.normal_(std=0.4, generator=generator)
    vision.projection.bias.data.zero_()  # drawn from the global generator, whose state depends on other tests
    config = {"stage": "tune", "vision": str(zoo / "instructblip"), "llm": str(root / "llama"), "quantize": ""}
    config |= {"dim": llm.config.hidden_size, "lora": lora, "prompt": PROMPT}
    tensors = {"adapter_model.safetensors": vdg_tune.adapter_tensors(llm)}
    tensors["projection.safetensors"] = vision.projection.state_dict()
    texts = {"adapter_config.json": vdg_tune.adapter_config(lora, config["llm"]), "config.json": config}
    save_folder(root / "vdg", tensors, texts)
    return root / "vdg"


@pytest.fixture(scope="module")
def mined(tmp_path_factory):
    """Four subgroups of six out of 13 pictures, two of them the same file; nine pairs each, as mine_pairs.py does."""
    root = tmp_path_factory.mktemp("mined")
    names = writer.draw(root / "images", 12, 5)
    shutil.copy(root / "images" / names[3], root / "images" / "again.png")
    names.append("again.png")
    template = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (0, 2), (0, 3), (0, 4)]
    order, groups, pairs = np.random.default_rng(0).permutation(13), [], []
    for number in range(4):
        members = [names[order[(6 * number + i) % 13]] for i in range(6)]
        groups.append({"id": number, "members": members, "scores": [0.9] * 5})
        for a, b in template:
            pair = {"id": len(pairs), "subgroup": number, "reference": members[a], "target": members[b], "score": 0.5}
            pairs.append(pair)
    write_jsonl(root / "subgroups.jsonl", groups)
    write_jsonl(root / "pairs.jsonl", pairs)
    return root


def write_jsonl(path, records):
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))


def arguments(vdg, mined, out, **more) -> list[str]:
    base = {"vdg": vdg, "pairs": mined / "pairs.jsonl", "images": mined / "images", "out": out, "device": "cpu"}
    base |= {"workers": 0, "temperature": 1.0, "max_new": 10, "batch": 8, "encode_batch": 4, "show": 2} | more
    return [word for name, value in base.items() for word in (f"--{name}", str(value))]


def generate(*given, **more) -> bytes:
    """A run in this process -> the bytes of pseudo.jsonl."""
    vars(gen_deltas).update(DEFAULTS)
    override(vars(gen_deltas), arguments(*given, **more))
    gen_deltas.main()
    return (Path(given[2]) / "pseudo.jsonl").read_bytes()


@pytest.fixture(scope="module")
def truth(vdg, mined, tmp_path_factory):
    """One undisturbed run -> (its folder, the bytes of pseudo.jsonl)."""
    out = tmp_path_factory.mktemp("truth") / "out"
    return out, generate(vdg, mined, out)


def records_of(text: bytes) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# ---- the sampler ----
@pytest.mark.parametrize("top_k", [4, 0])
def test_choose_draws_from_the_softmax_of_the_top_k(top_k):
    logits = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.9, -3.0, 1.9])
    scaled = (logits.double() / 0.7).masked_fill(logits < (logits.topk(4).values[-1] if top_k else -9), -torch.inf)
    wanted = scaled.softmax(0)
    n = 40_000
    over_keys = torch.tensor([row_key(0, i, "forward") for i in range(n)])
    drawn = choose(logits.expand(n, -1), over_keys, 3, 0.7, top_k)
    other = choose(logits.expand(n, -1), over_keys, 4, 0.7, top_k)
    along = torch.cat([choose(logits[None], over_keys[:1], p, 0.7, top_k) for p in range(2000)])
    for tokens, most in ((drawn, 0.01), (other, 0.01), (along, 0.04)):
        seen = torch.bincount(tokens, minlength=7).double() / len(tokens)
        assert (seen - wanted).abs().sum() / 2 < most
    joint = torch.bincount(drawn * 7 + other, minlength=49).double() / n  # two positions of a row are independent
    assert (joint - torch.outer(wanted, wanted).flatten()).abs().sum() / 2 < 0.03


def test_choose_depends_on_the_row_alone_and_zero_is_greedy():
    logits = torch.randn(64, 50, generator=torch.manual_seed(0))
    keys = torch.tensor([row_key(7, f"pair {i}", "forward") for i in range(64)])
    together = choose(logits, keys, 5, 1.0, 20)
    alone = torch.cat([choose(logits[i : i + 1], keys[i : i + 1], 5, 1.0, 20) for i in range(64)])
    assert torch.equal(together, alone)
    assert len(set(together.tolist())) > 10
    assert torch.equal(choose(logits, keys, 5, 0.0, 20), logits.argmax(1))
    assert row_key(0, 1, "forward") != row_key(0, "1", "forward")
    assert row_key(0, 1, "forward") != row_key(0, 1, "reverse")


def test_mix_is_splitmix64():
    def truth(x: int) -> int:  # Steele, Lea, Flood 2014, in unbounded integers
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) % 2**64
        return x ^ x >> 31

    numbers = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15, 123456789]
    mixed = mix(torch.tensor([signed(x) for x in numbers]))
    assert [x % 2**64 for x in mixed.tolist()] == [truth(x) for x in numbers]


# ---- decoding ----
@pytest.mark.parametrize("fixed", [False, True])
def test_greedy_tokens_equal_those_of_generate(vdg, mined, monkeypatch, fixed):
    """The cache in three levels against Hugging Face's loop over the whole prompt, LoRA merged against LoRA apart.

    fixed: the step that a GPU replays as a graph, its shapes independent of the position, here run kernel by kernel."""
    vision, llm, tokenizer, config = vdg_tune.load_vdg(str(vdg), "cpu", torch.float32)
    pieces = prompt_pieces(tokenizer, config["prompt"])
    pairs = read_jsonl(mined / "pairs.jsonl")
    images = ImageStore(mined / "images")
    names = sorted({pair["reference"] for pair in pairs} | {pair["target"] for pair in pairs})
    with torch.no_grad():
        tokens = vision(vision.queries(load_pixels(images, names, vision.preprocess)))  # (N, Q, D)
        at = [(names.index(pair["reference"]), names.index(pair["target"])) for pair in pairs]
        rows = [vdg_tune.delta_row(pieces, tokens[r], tokens[t]) for r, t in at]
        embed = llm.get_input_embeddings()
        spliced = [torch.cat([p if torch.is_tensor(p) else embed(torch.tensor(p)) for p in row]) for row in rows]
        wanted = llm.generate(
            inputs_embeds=torch.stack(spliced), attention_mask=torch.ones(len(rows), len(spliced[0])),
            max_new_tokens=16, do_sample=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    eos = tokenizer.eos_token_id
    new = max(line.index(eos) if eos in line else 16 for line in wanted.tolist())  # the longest delta is cut short
    wanted = wanted[:, :new]
    vdg_tune.merge_lora(llm)
    prompt, order = prompt_parts(pieces)
    assert order == ["reference", "target"]
    references = sorted({r for r, _ in at})
    row = [references.index(r) for r, _ in at]
    second = tokens[[t for _, t in at]]
    keys, drawn, real = torch.zeros(len(at)).long(), [], choose
    record = lambda x, keys, *more: drawn.append((int(more[0]), len(x))) or real(x, keys, *more)  # noqa: E731
    monkeypatch.setattr(decode, "choose", record)
    monkeypatch.setattr(decode, "capture", lambda step, engine: SimpleNamespace(replay=step))
    greedy = Sampling(tokenizer.eos_token_id, new, 0.0, 0)
    engine = start_engine(llm, prompt, 32, len(at), greedy, fixed)
    for live in (36, 30):  # the second batch finds what the first left in the buffers
        drawn.clear()
        found = decode.generate(engine, tokens[references], second, row, keys, live)
        assert torch.equal(found[:live], wanted[:live])
    assert [position for position, _ in drawn] == list(range(new))  # each step has noise of its own
    assert {36, 18} <= {size for _, size in drawn} <= {36, 18, 9}  # rows that ended leave the batch
    assert len({tuple(line) for line in wanted.tolist()}) > 10  # the prompts tell them apart
    ends = [tokenizer.eos_token_id in line for line in wanted.tolist()]
    assert any(ends) and not all(ends)


def test_products_do_not_depend_on_the_number_of_rows():
    """To the last bit: what makes a delta independent of the batch, and of the threads, which torchrun sets to one."""
    if not torch.backends.mkl.is_available():
        pytest.skip("needs MKL")
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    for width, out in ((64, 96), (320, 320), (1382, 512)):
        x, w = torch.randn(300, width, generator=generator), torch.randn(out, width, generator=generator)
        whole = x @ w.T
        for rows in (FEWEST, 9, 16, 27, 64, 100):
            for count in (1, 2):
                torch.set_num_threads(count)
                part = x[:rows] @ w.T
                torch.set_num_threads(threads)
                assert torch.equal(part, whole[:rows]), (width, rows, count)


def test_flags(vdg):
    tokenizer = load_tokenizer(str(vdg.parent / "llama"))
    eos, ids = [tokenizer.eos_token_id], lambda text: tokenize(tokenizer, text)
    assert text_of(ids("shows: two cats") + eos + ids("more"), tokenizer) == ("shows: two cats", [])
    assert text_of(eos, tokenizer) == ("", ["empty"])
    assert text_of(ids(" \n ") + eos, tokenizer) == ("", ["empty"])
    assert text_of(ids("is red"), tokenizer) == ("is red", ["runaway"])
    assert text_of(ids("is red and red") + eos, tokenizer) == ("is red and red", [])
    again = "a red hat to a red hat to a red hat to the dog"
    assert text_of(ids(again) + eos, tokenizer) == (again, ["repeated"])
    odd = tokenizer.convert_tokens_to_ids(["<0x1B>", "<0x0A>", "<0x07>"])
    assert text_of(ids("is") + odd + ids("red") + eos, tokenizer)[0].split() == ["is", "red"]


# ---- whole runs ----
def test_files(truth, mined):
    out, text = truth
    pairs, records = read_jsonl(mined / "pairs.jsonl"), records_of(text)
    assert [{k: v for k, v in r.items() if k not in ("delta", "flags")} for r in records] == pairs
    assert len({r["delta"] for r in records}) > 25
    report = read_json(out / "report.json")
    assert report["pairs"] == 36 and report["images"] == len({n for p in pairs for n in (p["reference"], p["target"])})
    for flag in ("empty", "runaway", "repeated"):
        assert report[flag] == sum(flag in r.get("flags", ()) for r in records)
    assert 0 < report["runaway"] < 36
    groups = read_jsonl(mined / "subgroups.jsonl")
    cirr = read_json(out / "cirr" / "captions" / "cap.rc2.train.json")
    assert [c["caption"] for c in cirr] == [r["delta"] for r in records]
    assert [c["img_set"]["members"] for c in cirr] == [groups[p["subgroup"]]["members"] for p in pairs]
    assert [(c["img_set"]["reference_rank"], c["img_set"]["target_rank"]) for c in cirr[:3]] == [(0, 1), (1, 2), (2, 3)]
    page = (out / "deltas.html").read_text()
    assert page.count("<img") == 4 and "<script" not in page


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batch_size_and_order_change_no_byte(vdg, mined, truth, tmp_path, batch):
    pairs = read_jsonl(mined / "pairs.jsonl")
    order = np.random.default_rng(batch).permutation(len(pairs))
    write_jsonl(tmp_path / "pairs.jsonl", [pairs[i] for i in order])
    shuffled = generate(vdg, mined, tmp_path / "out", pairs=tmp_path / "pairs.jsonl", batch=batch, encode_batch=batch)
    assert sorted(shuffled.splitlines()) == sorted(truth[1].splitlines())
    assert [r["id"] for r in records_of(shuffled)] == order.tolist()


def test_two_ranks_write_the_same(vdg, mined, truth, tmp_path):
    def work():
        generate(vdg, mined, tmp_path / "out")

    ranks.run_ranks(2, work)
    assert (tmp_path / "out" / "pseudo.jsonl").read_bytes() == truth[1]
    parts = sorted((tmp_path / "out" / "parts").glob("*.jsonl"))
    assert [p.name for p in parts] == ["part-0-of-2.jsonl", "part-1-of-2.jsonl"]
    assert [len(read_jsonl(p)) for p in parts] == [18, 18]
    for name in ("cirr/captions/cap.rc2.train.json", "report.json", "deltas.html"):
        assert (tmp_path / "out" / name).read_bytes() == (truth[0] / name).read_bytes()


def test_killed_and_resumed_on_other_ranks(vdg, mined, truth, tmp_path):
    """SIGKILL in the middle, a torn last line, then two ranks with another batch size: every pair once, same text."""
    out = tmp_path / "out"
    part = out / "parts" / "part-0-of-1.jsonl"

    def work():
        torch.set_num_threads(1)  # OpenMP's thread pool does not survive a fork
        generate(vdg, mined, out, batch=1)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    deadline = time.time() + 100
    while not (part.exists() and part.read_bytes().count(b"\n") >= 5) and time.time() < deadline:
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    process.join()
    whole = part.read_bytes()
    kept = whole.count(b"\n")
    assert 5 <= kept < 36 and not (out / "pseudo.jsonl").exists()
    part.write_bytes(whole + b'{"id": 3, "delta": "ma')

    ranks.run_ranks(2, lambda: generate(vdg, mined, out, batch=5) and None)
    assert (out / "pseudo.jsonl").read_bytes() == truth[1]
    written = [r["id"] for p in (out / "parts").glob("*.jsonl") for r in read_jsonl(p)]
    assert sorted(written) == list(range(36)) and len(read_jsonl(part)) == kept


def test_other_settings_do_not_mix(vdg, mined, truth, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(truth[0], out)
    vars(gen_deltas).update(DEFAULTS)
    override(vars(gen_deltas), arguments(vdg, mined, out, temperature=0.5))
    with pytest.raises(SystemExit) as stop:
        run(gen_deltas.main)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and "temperature: 1.0 there, 0.5 now" in error
    other = tmp_path / "vdg"
    shutil.copytree(vdg, other)
    tensors = load_tensors(other, "adapter_model.safetensors")
    changed = {name: t * 2 for name, t in tensors.items()}
    texts = {n: read_json(other / n) for n in ("adapter_config.json", "config.json")}
    kept = load_tensors(other, "projection.safetensors")
    save_folder(other, {"adapter_model.safetensors": changed, "projection.safetensors": kept}, texts)
    with pytest.raises(UserError, match="vdg"):
        generate(other, mined, out)
    assert (out / "pseudo.jsonl").read_bytes() == truth[1]


def test_only_new_pairs_are_generated(vdg, mined, truth, tmp_path, monkeypatch):
    """First 20 pairs, then all 36, then 30 of them; a known id with other images is another pair."""
    seen, real = [], row_key
    monkeypatch.setattr(gen_deltas, "row_key", lambda seed, i, way: seen.append(i) or real(seed, i, way))
    pairs, out = read_jsonl(mined / "pairs.jsonl"), tmp_path / "out"
    for some in (pairs[:20], pairs, pairs[6:]):
        seen.clear()
        write_jsonl(tmp_path / "pairs.jsonl", some)
        text = generate(vdg, mined, out, pairs=tmp_path / "pairs.jsonl")
        assert text.splitlines() == [line for line, p in zip(truth[1].splitlines(), pairs, strict=True) if p in some]
        assert sorted(set(seen)) == {20: list(range(20)), 36: list(range(20, 36)), 30: []}[len(some)]
    changed = [pairs[0] | {"target": pairs[4]["target"]}, *pairs[1:]]
    seen.clear()
    write_jsonl(tmp_path / "pairs.jsonl", changed)
    text = generate(vdg, mined, out, pairs=tmp_path / "pairs.jsonl")
    assert set(seen) == {0} and text.splitlines()[1:] == truth[1].splitlines()[1:]
    assert records_of(text)[0]["target"] == pairs[4]["target"]


@pytest.mark.parametrize("chosen", [{}, {"subgroups": 2}, {"max_pairs": 20}])
def test_a_new_picture_has_only_its_own_pairs_described(vdg, mined, truth, tmp_path, monkeypatch, chosen):
    """Its subgroup is the first, so that every id and the draw of subgroups change; each old text stays where it was.
    Where as many as may be chosen are described already, nothing is."""
    root, out = tmp_path / "mined", tmp_path / "out"
    shutil.copytree(mined / "images", root / "images")
    names, old = sorted(path.name for path in (root / "images").iterdir()), read_jsonl(mined / "pairs.jsonl")
    text_of_pair = {(r["reference"], r["target"], r["subgroup"]): r["delta"] for r in records_of(truth[1])}
    writer.draw(tmp_path / "other", 1, 77)
    shutil.copy(next((tmp_path / "other").iterdir()), root / "images" / "0.png")
    first = [{"subgroup": 0, "reference": "0.png", "target": name} for name in names[:9]]
    moved = [pair | {"subgroup": pair["subgroup"] + 1} for pair in old]
    pairs = [pair | {"id": i} for i, pair in enumerate([*first, *moved])]

    before = records_of(generate(vdg, mined, out, **chosen))
    write_jsonl(root / "pairs.jsonl", pairs)
    seen, real = [], row_key
    monkeypatch.setattr(gen_deltas, "row_key", lambda seed, i, way: seen.append(i) or real(seed, i, way))
    for _ in range(2):  # the second run finds all described
        after = records_of(generate(vdg, root, out, **chosen))
        assert sorted(set(seen)) == ([] if chosen else list(range(9)))
        assert len(after) == len(before) + len(set(seen))
        for record in after:
            assert {k: v for k, v in record.items() if k not in ("delta", "flags")} in pairs  # ids of today
            there = record["reference"], record["target"], record["subgroup"] - 1
            assert record["subgroup"] == 0 or record["delta"] == text_of_pair[there]


def test_pairs_that_stand_there_twice_keep_a_text_each():
    """Whatever was described when the run was killed, and in whatever order the parts are read."""
    ends = ["ab", "ab", "cd", "ab", "ef"]
    pairs = [{"id": i, "reference": a, "target": b} for i, (a, b) in enumerate(ends)]
    lines = [pair | {"delta": f"text {pair['id']}"} for pair in pairs]
    for some in itertools.chain.from_iterable(itertools.combinations(lines, n) for n in range(6)):
        found = described(pairs, some[::-1])
        assert found == {line["id"]: line for line in some}  # the same command: each its own

    shifted = [pair | {"id": pair["id"] + 2} for pair in pairs]
    shifted = [{"id": 0, "reference": "x", "target": "y"}, {"id": 1, "reference": "a", "target": "b"}, *shifted]
    for order in itertools.permutations(lines):
        found = described(shifted, order)
        texts = {i: line["delta"] for i, line in found.items()}
        # 1 and 3 have lines of their own images under their own id; what is left goes in the order of ids
        assert texts == {1: "text 1", 2: "text 0", 3: "text 3", 4: "text 2", 6: "text 4"}
    shifted[2] |= {"delta": "of another", "judged": "edit"}  # --pairs may be what --labels wrote
    assert with_deltas(shifted[2:3], found)[0] == {"id": 2, "reference": "a", "target": "b", "delta": "text 0"}

    # 0 and 5 are new: described one after the other, they take no text from the others
    for new in ([], [0], [0, 5], [5]):
        more = [*lines, *(pair | {"delta": "new"} for pair in shifted if pair["id"] in new)]
        found = {i: line["delta"] for i, line in described(shifted, more).items()}
        assert found == texts | dict.fromkeys(new, "new")


def test_what_is_described_is_chosen_first_and_a_kill_changes_no_choice():
    pairs = [{"id": i, "subgroup": i // 3} for i in range(60)] + [{"id": f"alone {i}"} for i in range(9)]
    rng = np.random.default_rng(0)
    for count, most, seed in itertools.product((0, 5), (0, 17), range(3)):
        whole = gen_deltas.choose_subgroups(pairs, count, most, seed)
        for _ in range(10):
            done = {pair["id"] for pair in whole if rng.random() < 0.7}
            assert gen_deltas.choose_subgroups(pairs, count, most, seed, done) == whole
    few = [pair for pair in pairs if pair.get("subgroup") in (3, 11)]
    for seed in range(5):
        for done in (few, few[:4]):
            found = gen_deltas.choose_subgroups(pairs, 4, 0, seed, {pair["id"] for pair in done})
            assert all(pair in found for pair in few) and len({p.get("subgroup", p["id"]) for p in found}) == 4
            drawn = gen_deltas.choose_subgroups(pairs, 4, 0, seed)
            assert sum(pair in drawn for pair in found) >= len(found) - len(few) - 6  # the others are those of the draw
        assert gen_deltas.choose_subgroups(pairs, 1, 0, seed, {pair["id"] for pair in few[:4]}) == few[:3]


def test_each_image_is_encoded_once(vdg, mined, truth, tmp_path, monkeypatch):
    opened, encoded = [], []
    real_open, real_queries = ImageStore.open, vdg_align.VisionProjector.queries
    monkeypatch.setattr(ImageStore, "open", lambda self, name, *to: opened.append(name) or real_open(self, name, *to))
    counted = lambda self, pixels: encoded.append(len(pixels)) or real_queries(self, pixels)  # noqa: E731
    monkeypatch.setattr(vdg_align.VisionProjector, "queries", counted)
    pairs, out = read_jsonl(mined / "pairs.jsonl"), tmp_path / "out"
    write_jsonl(tmp_path / "pairs.jsonl", pairs[:9])
    generate(vdg, mined, out, pairs=tmp_path / "pairs.jsonl")
    first = {n for p in pairs[:9] for n in (p["reference"], p["target"])}
    assert sorted(opened) == sorted(first) and encoded == [4, 4]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    assert generate(vdg, mined, out, pairs=tmp_path / "pairs.jsonl") == truth[1]
    files = {n: (mined / "images" / n).read_bytes() for p in pairs for n in (p["reference"], p["target"])}
    assert len(opened) == len(set(opened)) == len(set(files.values())) < len(files)  # two names, one content: once
    assert len(list((out / "queries").glob("*.npy"))) == 1


def test_a_changed_picture_is_encoded_again(vdg, mined, truth, tmp_path):
    """The store is keyed by content: new pairs of a picture that was exchanged do not get the old one's tokens."""
    pairs = read_jsonl(mined / "pairs.jsonl")
    root = tmp_path / "mined"
    shutil.copytree(mined, root)
    write_jsonl(root / "pairs.jsonl", pairs[:1])
    generate(vdg, root, tmp_path / "out")
    name = pairs[1]["reference"]
    writer.draw(tmp_path / "other", 1, 77)
    shutil.copy(next((tmp_path / "other").iterdir()), root / "images" / name)
    write_jsonl(root / "pairs.jsonl", pairs[:2])
    resumed = generate(vdg, root, tmp_path / "out").splitlines()
    assert resumed[1] == generate(vdg, root, tmp_path / "fresh").splitlines()[1] != truth[1].splitlines()[1]


def test_queries_whose_bits_flipped_are_encoded_again(vdg, mined, truth, tmp_path, capsys):
    """At once in the file that is to be used, and in one whose rows would be taken over."""

    def damage(out):
        (path,) = (out / "queries").glob("*.npy")
        data = bytearray(path.read_bytes())
        for at in np.random.default_rng(0).integers(128, len(data), 400).tolist():
            data[at] ^= 64
        path.write_bytes(data)

    out = tmp_path / "same"
    shutil.copytree(truth[0], out)
    shutil.rmtree(out / "parts")
    damage(out)
    assert generate(vdg, mined, out) == truth[1]
    assert capsys.readouterr().err.count(".npy does not match") == 1

    pairs, out = read_jsonl(mined / "pairs.jsonl"), tmp_path / "more"
    write_jsonl(tmp_path / "pairs.jsonl", pairs[:9])
    generate(vdg, mined, out, pairs=tmp_path / "pairs.jsonl")
    damage(out)
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    assert generate(vdg, mined, out, pairs=tmp_path / "pairs.jsonl") == truth[1]
    assert capsys.readouterr().err.count(".npy does not match") == 1
    (header,) = (out / "queries").glob("*.json")
    written = header.read_text()
    for broken in ("{", "[]", '{"encoder": 1' + written[written.index(", ") :], written.replace("keys", "kexs")):
        header.write_text(broken)
        shutil.rmtree(out / "parts")
        assert generate(vdg, mined, out) == truth[1]
        assert ("are encoded again" in capsys.readouterr().err) == ("1" not in broken[:13])
    assert header.read_text() == written


def test_a_full_disk_is_one_line(vdg, mined, truth, tmp_path, monkeypatch):
    """Not SIGBUS at some row: the place of the whole file is taken before the first is written."""
    asked = []

    def full(handle, start, size):
        asked.append(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match="queries: No space left on device: .* images want .* GiB .* --out"):
            generate(vdg, mined, tmp_path / "out")
    assert not list((tmp_path / "out" / "queries").iterdir())
    assert generate(vdg, mined, tmp_path / "out") == truth[1]
    (path,) = (tmp_path / "out" / "queries").glob("*.npy")
    assert asked == [path.stat().st_size]


# ---- a model whose numbers are none ----
@pytest.mark.parametrize("place", ["projection", "lm_head", "one image"])
def test_nan_stops_the_run(vdg, mined, tmp_path, monkeypatch, place):
    real_load, real_queries = vdg_tune.load_vdg, vdg_align.VisionProjector.queries

    def load(*given):
        vision, llm, *rest = real_load(*given)
        if place == "projection":
            vision.projection.weight.data[0, 0] = torch.nan
        if place == "lm_head":
            llm.lm_head.weight.data[7, 0] = torch.inf
        return vision, llm, *rest

    def queries(self, pixels):
        out = real_queries(self, pixels)
        out[2, 5, 0] = torch.nan
        return out

    monkeypatch.setattr(vdg_tune, "load_vdg", load)
    if place == "one image":
        monkeypatch.setattr(vdg_align.VisionProjector, "queries", queries)
    match = (
        "png: its Q-Former outputs are NaN or infinite" if place == "one image" else "the LLM's logits for .* are NaN"
    )
    with pytest.raises(UserError, match=match):
        generate(vdg, mined, tmp_path / "out")
    assert not (tmp_path / "out" / "pseudo.jsonl").exists()
    assert not any(read_jsonl(part) for part in (tmp_path / "out" / "parts").glob("*.jsonl"))


def test_a_fault_of_one_rank_stops_all(vdg, mined, truth, tmp_path, monkeypatch):
    """What was said before it is kept."""
    real, calls = gen_deltas.describe, []

    def describe(*given):
        calls.append(given)
        if os.environ.get("RANK") == "1" and len(calls) == 2:
            raise UserError("no numbers")
        return real(*given)

    monkeypatch.setattr(gen_deltas, "describe", describe)

    def work():
        try:
            generate(vdg, mined, tmp_path / "out")
        except UserError as fault:
            return str(fault), len(calls)

    assert ranks.run_ranks(2, work) == [("no numbers", 2), ("no numbers", 2)]
    parts = list((tmp_path / "out" / "parts").glob("*.jsonl"))
    assert [len(read_jsonl(part)) for part in parts] == [8, 8]
    monkeypatch.setattr(gen_deltas, "describe", real)
    assert generate(vdg, mined, tmp_path / "out") == truth[1]


def test_a_signal_to_one_rank_stops_all(vdg, mined, truth, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        gen_deltas, "stop_requested", lambda: asked.append(0) or (os.environ.get("RANK") == "1" and len(asked) == 3)
    )

    def work():
        try:
            generate(vdg, mined, tmp_path / "out", batch=4)
        except SystemExit as stop:
            return stop.code

    assert ranks.run_ranks(2, work) == [143, 143]
    parts = list((tmp_path / "out" / "parts").glob("*.jsonl"))
    assert [len(read_jsonl(part)) for part in parts] == [8, 8] and not (tmp_path / "out" / "pseudo.jsonl").exists()
    assert generate(vdg, mined, tmp_path / "out") == truth[1]


def test_more_ranks_than_pairs(vdg, mined, truth, tmp_path):
    pairs = read_jsonl(mined / "pairs.jsonl")[:2]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    ranks.run_ranks(3, lambda: generate(vdg, mined, tmp_path / "out", pairs=tmp_path / "pairs.jsonl") and None)
    assert (tmp_path / "out" / "pseudo.jsonl").read_bytes().splitlines() == truth[1].splitlines()[:2]


def test_reverse(vdg, mined, truth, tmp_path):
    """Forward deltas stay what they are; the reverse one is what greedy decoding says of the swapped images."""
    both = records_of(generate(vdg, mined, tmp_path / "out", reverse=True))
    assert [r["delta"] for r in both] == [r["delta"] for r in records_of(truth[1])]
    swapped = []
    for pair in read_jsonl(mined / "pairs.jsonl"):
        swapped.append(pair | {"reference": pair["target"], "target": pair["reference"]})
    write_jsonl(tmp_path / "pairs.jsonl", swapped)
    greedy = records_of(generate(vdg, mined, tmp_path / "greedy", reverse=True, temperature=0.0))
    there = generate(vdg, mined, tmp_path / "there", pairs=tmp_path / "pairs.jsonl", temperature=0.0)
    assert [r["reverse_delta"] for r in greedy] == [r["delta"] for r in records_of(there)]
    assert [r["delta"] for r in greedy] != [r["reverse_delta"] for r in greedy]


def test_subgroups_are_chosen_whole_by_seed(mined):
    pairs = read_jsonl(mined / "pairs.jsonl")
    drawn = [gen_deltas.choose_subgroups(pairs, 2, 0, seed) for seed in range(8)]
    assert all(len(some) == 18 and some == [p for p in pairs if p in some] for some in drawn)
    assert len({tuple(sorted({p["subgroup"] for p in some})) for some in drawn}) > 1
    assert len(gen_deltas.choose_subgroups(pairs, 0, 30, 0)) == 27  # three whole subgroups
    assert gen_deltas.choose_subgroups(pairs, 0, 0, 0) == pairs == gen_deltas.choose_subgroups(pairs, 9, 99, 0)
    with pytest.raises(UserError, match="at least 9"):
        gen_deltas.choose_subgroups(pairs, 0, 5, 0)
    for most in (0, 2000):
        with pytest.raises(UserError, match="^no pairs: too few similar pictures$"):
            gen_deltas.choose_subgroups([], 0, most, 0)


def test_pairs_of_human_triplets(vdg, mined, tmp_path):
    """CIRR's layout in, and out again in a form that the CIRR reader takes."""
    groups = read_jsonl(mined / "subgroups.jsonl")
    names = sorted({name for group in groups for name in group["members"]})
    root = tmp_path / "cirr"
    table = {name.removesuffix(".png"): f"./{name}" for name in names}
    records = []
    for group in groups:
        members = [name.removesuffix(".png") for name in group["members"]]
        image_set = {"id": group["id"], "members": members, "reference_rank": 1, "target_rank": 4}
        record = {"pairid": 50 + group["id"], "reference": members[1], "target_hard": members[4], "target_soft": {}}
        records.append(record | {"caption": "human words", "img_set": image_set})
    for part, file, value in (("captions", "cap", records), ("image_splits", "split", table)):
        (root / part).mkdir(parents=True)
        writer.write(root / part / f"{file}.rc2.train.json", value)
    text = generate(vdg, mined, tmp_path / "out", triplets="cirr/train", root=root)
    said = records_of(text)
    wanted = [{"id": r["pairid"], "reference": r["reference"], "target": r["target_hard"]} for r in records]
    assert [{k: r[k] for k in ("id", "reference", "target")} for r in said] == wanted
    assert not any("human" in r["delta"] for r in said)
    triplets, images = training_triplets("cirr", tmp_path / "out" / "cirr", "train", images=mined / "images")
    assert not images.missing([t.target for t in triplets])
    assert [t.delta for t in triplets] == [r["delta"] for r in said]
    assert [list(t.members) for t in triplets] == [r["img_set"]["members"] for r in records]


def test_pairs_of_others_files(vdg, mined, truth, tmp_path):
    """The parts of a record under other names, as MegaPairs has them; targets as ids of a pool, as M-BEIR has them."""
    pairs, how = read_jsonl(mined / "pairs.jsonl")[:5], {"triplets": "jsonl", "root": tmp_path / "mega.jsonl"}
    pool = {name: f"9:{i}" for i, name in enumerate(sorted({pair["target"] for pair in pairs}))}
    write_jsonl(tmp_path / "pool.jsonl", [{"did": did, "img_path": name} for name, did in pool.items()])
    keys = "reference=q_img,target=t_img,delta=q_text"
    for more, target in (({}, lambda name: name), ({"pool": tmp_path / "pool.jsonl"}, lambda name: [pool[name]])):
        records = [{"q_img": p["reference"], "t_img": target(p["target"]), "q_text": ["human"]} for p in pairs]
        write_jsonl(tmp_path / "mega.jsonl", records)
        found = records_of(generate(vdg, mined, tmp_path / "out", **how, keys=keys, **more))
        wanted = [(r["id"], r["reference"], r["target"], r["delta"]) for r in records_of(truth[1])[:5]]
        assert [(r["id"], r["reference"], r["target"], r["delta"]) for r in found] == wanted
    with pytest.raises(UserError, match='has no "reference".*--keys says where'):
        generate(vdg, mined, tmp_path / "out", **how)


@pytest.mark.parametrize("name", ["fashioniq", "fashioniq/train", "fashioniq/train/dress"])
def test_triplets_name_a_dataset_split_and_category(name, tmp_path):
    for category in FASHIONIQ_CATEGORIES:
        for part, value in (
            ("captions/cap", [{"target": category, "candidate": "r", "captions": ["a", "b"]}]),
            ("image_splits/split", [category, "r"]),
        ):
            file = tmp_path / f"{part}.{category}.train.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(value))
    pairs, _, _ = gen_deltas.triplet_pairs(name, str(tmp_path), str(tmp_path))
    wanted = ["dress"] if name.endswith("dress") else sorted(FASHIONIQ_CATEGORIES)
    assert sorted(pair["target"] for pair in pairs) == wanted
    with pytest.raises(UserError, match="wanted dataset/split"):
        gen_deltas.triplet_pairs("a/b/c/d", str(tmp_path), "")


def test_fashioniq_pairs_come_out_as_fashioniq(vdg, mined, tmp_path):
    names = sorted(path.name for path in (mined / "images").iterdir() if path.suffix == ".png")
    root, bare = tmp_path / "fashioniq", [name.removesuffix(".png") for name in names]
    pairs = {c: [(bare[i], bare[i + 1]) for i in range(at, at + 2)] for at, c in enumerate(FASHIONIQ_CATEGORIES)}
    for category, some in pairs.items():
        captions = [{"target": t, "candidate": r, "captions": ["human a", "human b"]} for r, t in some]
        for part, file, value in (("captions", "cap", captions), ("image_splits", "split", bare)):
            (root / part).mkdir(parents=True, exist_ok=True)
            writer.write(root / part / f"{file}.{category}.val.json", value)
    said = records_of(generate(vdg, mined, tmp_path / "out", triplets="fashioniq/val", root=root))
    assert len(said) == 6 and not (tmp_path / "out" / "cirr").exists()
    for category, some in pairs.items():
        out = read_fashioniq(str(tmp_path / "out" / "fashioniq"), "val", category, str(mined / "images"))
        assert [(q.reference, q.target) for q in out.queries] == some
        wanted = [(r["delta"],) * 2 for r in said if r["category"] == category]
        assert [q.alternatives for q in out.queries] == wanted and not any("human" in d for d, _ in wanted)


def test_what_another_vdg_said_of_a_pair_does_not_stay(vdg, mined, truth, tmp_path):
    """pseudo.jsonl of another run as --pairs: new deltas, no old flags."""
    old = [record | {"delta": "old", "flags": ["old"], "reverse_delta": "old"} for record in records_of(truth[1])]
    write_jsonl(tmp_path / "pairs.jsonl", old)
    assert generate(vdg, mined, tmp_path / "out", pairs=tmp_path / "pairs.jsonl") == truth[1]


def test_what_a_person_judged_is_respected(vdg, mined, truth, tmp_path, capsys):
    """Accepted and edited texts are the person's, a rejected text goes; another text for that pair stays; skips do not
    count."""
    said = records_of(truth[1])
    ends = Counter((r["reference"], r["target"]) for r in said)
    one, two, three, four, five = [i for i, r in enumerate(said) if ends[r["reference"], r["target"]] == 1][:5]
    verdicts = {
        one: ("accept", said[one]["delta"]),
        two: ("edit", "is shorter"),
        three: ("reject", said[three]["delta"]),
    }
    verdicts |= {four: ("skip", said[four]["delta"]), five: ("reject", "of another VDG")}
    lines = []
    for i, (verdict, text) in verdicts.items():
        was = text if verdict != "edit" else said[i]["delta"]
        pair = {"reference": said[i]["reference"], "target": said[i]["target"]}
        lines.append(pair | {"verdict": verdict, "delta": text, "was": was, "id": said[i]["id"]})
    write_jsonl(tmp_path / "labels.jsonl", lines)
    found = records_of(generate(vdg, mined, tmp_path / "out", labels=tmp_path / "labels.jsonl"))
    wanted = [dict(record) for record in said]
    wanted[one]["judged"] = "accept"
    wanted[two] |= {"delta": "is shorter", "judged": "edit"}
    del wanted[three]
    assert found == wanted and "2 texts are a person's, 1 rejected" in capsys.readouterr().out
    write_jsonl(tmp_path / "labels.jsonl", [{"reference": "a"}])
    with pytest.raises(UserError, match="--labels .*wanted labels.jsonl"):
        generate(vdg, mined, tmp_path / "out", labels=tmp_path / "labels.jsonl")
    with pytest.raises(UserError, match="--labels nowhere: no such file"):
        generate(vdg, mined, tmp_path / "out", labels="nowhere")


def test_plan_needs_no_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    override(vars(gen_deltas), ["--plan", "--device", "cpu"])
    gen_deltas.main()
    said = capsys.readouterr().out
    assert "keys and values of 64 pairs" in said and "memory of 24 GiB: too small" in said
    assert not list(tmp_path.iterdir())


def test_mistakes_are_said_in_one_line(vdg, mined, tmp_path, capsys):
    pairs = read_jsonl(mined / "pairs.jsonl")
    path = tmp_path / "pairs.jsonl"

    def fails(match, records=pairs, **more):
        write_jsonl(path, records)
        with pytest.raises(UserError, match=match):
            generate(vdg, mined, tmp_path / "out", pairs=path, **more)

    fails("0 occurs twice", [pairs[0], pairs[0]])
    fails('record 2: no "target"', [pairs[0], {"id": 1, "reference": "a"}])
    fails(r"contains \"\.\.\"", [pairs[0] | {"target": "../x.png"}])
    fails("1 missing; first missing: .absent.png.*missing.txt", [pairs[0] | {"target": "absent.png"}], check=True)
    fails("subgroup a list of 1; wanted a number", [pairs[0] | {"subgroup": [1]}])
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1: wanted a JSON object"):
        generate(vdg, mined, tmp_path / "out", pairs=path)
    groups, beside = read_jsonl(mined / "subgroups.jsonl"), tmp_path / "subgroups.jsonl"
    for match, found in (
        (
            "its reference .* is no member of its subgroup",
            [groups[0] | {"members": groups[0]["members"][1:]}, *groups[1:]],
        ),
        ("subgroup 3, which is not in .*subgroups.jsonl", groups[:3]),
        ("record 5: id 0 occurs twice", [*groups, groups[0]]),
        ("record 1: id None", [{"members": groups[0]["members"]}]),
        ('record 1: "members" is None; wanted a list', [{"id": 0}]),
        ("record 1: found 7, wanted an image name", [{"id": 0, "members": [7]}]),
    ):
        write_jsonl(beside, found)
        fails(match)
        assert not (tmp_path / "out" / "parts").exists()  # before anything is loaded
    beside.write_text("3\n")
    fails("subgroups.jsonl line 1: wanted a JSON object")
    beside.unlink()
    fails("pairs: 1 of 1 items lack an image, first absent.png", [pairs[0] | {"target": "absent.png"}])
    write_jsonl(path, pairs)
    vars(gen_deltas).update(DEFAULTS)
    override(vars(gen_deltas), [*arguments(tmp_path / "no vdg", mined, tmp_path / "out", check=True)])
    with pytest.raises(UserError, match="no vdg/config.json not found; wanted a finished checkpoint of vdg_tune.py"):
        gen_deltas.main()  # the data, then what describes them
    assert "36 pairs; " in capsys.readouterr().out
    fails("no folder", images=tmp_path / "nowhere")
    fails("no folder.* of several, put links into it", images=f"{mined / 'images'}{os.pathsep}{tmp_path}")
    fails("temperature", temperature=-1.0)
    with pytest.raises(UserError, match="vdg_tune.py"):
        generate(tmp_path, mined, tmp_path / "out")
    assert not (tmp_path / "out" / "pseudo.jsonl").exists()


def test_broken_pictures_of_one_s_own_are_left_out(vdg, mined, truth, tmp_path, capsys):
    """One of two pairs, cut short, and one that is gone: other pairs have the texts that they would have had."""
    root, out, pairs = tmp_path / "mined", tmp_path / "out", read_jsonl(mined / "pairs.jsonl")
    shutil.copytree(mined, root)
    ends = Counter(name for pair in pairs for name in (pair["reference"], pair["target"]))
    name = min(ends, key=ends.get)
    whole, said = (root / "images" / name).read_bytes(), records_of(truth[1])
    assert ends[name] == 2
    for damage in ("cut", "gone"):
        (root / "images" / name).unlink() if damage == "gone" else (root / "images" / name).write_bytes(whole[:90])
        ranks.run_ranks(2, lambda: generate(vdg, root, out) and None)
        found = records_of((out / "pseudo.jsonl").read_bytes())
        assert found == [record for record in said if name not in (record["reference"], record["target"])]
        listed = (out / "unreadable.txt").read_text()
        assert listed.count("\n") == 1 and name in listed
        members = [c["img_set"]["members"] for c in read_json(out / "cirr/captions/cap.rc2.train.json")]
        groups = [[n for n in group["members"] if n != name] for group in read_jsonl(mined / "subgroups.jsonl")]
        assert members == [groups[record["subgroup"]] for record in found]  # eval_cir.py --filter would read it
    capsys.readouterr()
    generate(vdg, root, out)
    assert "pairs: 2 of 36 items lack an image" in capsys.readouterr().out

    (root / "images" / name).write_bytes(whole)
    assert generate(vdg, root, out) == truth[1] and not (out / "unreadable.txt").exists()
    (root / "images" / max(ends, key=ends.get)).write_bytes(whole[:90])
    with pytest.raises(UserError, match=r"pairs: \d of 36 items lack an image.* more than 10 %"):
        generate(vdg, root, out)
    assert (out / "pseudo.jsonl").read_bytes() == truth[1]


def test_a_missing_picture_of_a_benchmark_stops(vdg, mined, tmp_path):
    """One of a thousand, too: its texts stand beside those of people."""
    names = sorted(path.name for path in (mined / "images").iterdir())
    data = gen_deltas.Data([{"id": 0, "reference": names[0], "target": "gone.png"}], {}, ImageStore(mined / "images"))
    many = [{"id": i, "reference": names[0], "target": names[1]} for i in range(1, 5000)]
    with pytest.raises(UserError, match="1 of 3 images are not in .*gone.png"):
        gen_deltas.readable(data._replace(pairs=[*data.pairs, *many]))
    assert gen_deltas.readable(data._replace(pairs=many)).pairs == many


def test_what_the_last_step_needs_is_checked_before_the_first(vdg, mined, tmp_path, monkeypatch):
    """A misspelt --export, two stems that are alike (one of a member, one of a pair), a wrong --labels: no model is
    loaded."""
    monkeypatch.setattr(vdg_tune, "load_vdg", lambda *given: pytest.fail("a model is loaded"))
    with pytest.raises(UserError, match="--export 'stem': wanted some of cirr, stems, release"):
        generate(vdg, mined, tmp_path / "out", export="cirr,stem")
    write_jsonl(tmp_path / "labels.jsonl", [{"reference": "a"}])
    with pytest.raises(UserError, match="--labels .*wanted labels.jsonl"):
        generate(vdg, mined, tmp_path / "out", labels=tmp_path / "labels.jsonl")
    root, groups = tmp_path / "mined", read_jsonl(mined / "subgroups.jsonl")
    shutil.copytree(mined, root)
    one, other = groups[0]["members"][0], groups[0]["members"][4]
    twin = one.replace(".png", ".jpg")
    (root / "images" / other).rename(root / "images" / twin)
    for name in ("pairs", "subgroups"):
        text = (root / f"{name}.jsonl").read_text()
        (root / f"{name}.jsonl").write_text(text.replace(f'"{other}"', f'"{twin}"'))
    for pairs in (read_jsonl(root / "pairs.jsonl"), read_jsonl(root / "pairs.jsonl")[:1]):
        write_jsonl(root / "pairs.jsonl", pairs)
        for more in ({}, {"check": True}):
            with pytest.raises(UserError, match="--export stems: .* have the same stem"):
                generate(vdg, root, tmp_path / "out", export="cirr,stems", **more)


def test_help_comes_before_torch():
    root = Path(gen_deltas.__file__).parent
    started = time.time()
    run = subprocess.run([sys.executable, "gen_deltas.py", "--help"], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0 and "--temperature 0.2" in run.stdout and time.time() - started < 5
    assert os.environ["MKL_CBWR"]
