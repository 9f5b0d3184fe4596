"""train_cir.py on tiny random models: its mathematics against formulas written out here, its promises by running it."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
import transformers
import zoo as writer
from safetensors.torch import load_file, save_file

import eval_cir
import train_cir
from common import streams, validation
from common.annotations import Triplet, read_cirr, read_triplets
from common.batches import drop_missing
from common.console import UserError
from common.files import read_json, write_json
from common.flags import constants_of, override
from common.images import ImageStore, open_image
from common.streams import Item, draw, human_items, human_source, pseudo_source
from kernels import negatives

WORDS = ["make it red", "has two dogs", "remove the hat and add a ball", "is blue", "more of them", "a cat instead"]
DEFAULTS, EVALUATED = constants_of(vars(train_cir)), constants_of(vars(eval_cir))


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """main() reads constants of its module: put them back after each test, and leave the signals of pytest alone."""
    monkeypatch.setattr(train_cir, "stop_requested", lambda: False)
    yield
    vars(train_cir).update(DEFAULTS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """CIRR's layout with 24 training triplets and 6 validation queries; 20 pseudo triplets; generated deltas."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for part in ("captions", "image_splits"):
        (root / "cirr" / part).mkdir(parents=True)
    for split, n, seed in (("train", 24, 1), ("val", 6, 2)):
        files = writer.draw(root / "img_raw" / split, 12, seed)
        names = [f"{split}-{i}" for i in range(12)]
        table = {name: f"./{split}/{file}" for name, file in zip(names, files, strict=True)}
        records = []
        for i in range(n):
            members = [names[j] for j in rng.permutation(12)[:6]]
            image_set = {"id": i, "members": members, "reference_rank": 0, "target_rank": 1}
            record = {"pairid": i, "reference": members[0], "target_hard": members[1], "target_soft": {}}
            records.append(record | {"caption": f"{WORDS[i % 6]} {i}", "img_set": image_set})
        writer.write(root / "cirr" / "image_splits" / f"split.rc2.{split}.json", table)
        writer.write(root / "cirr" / "captions" / f"cap.rc2.{split}.json", records)
        if split == "train":
            lines = [{"reference": r["reference"], "target": r["target_hard"], "delta": "generated"} for r in records]
            for i, line in enumerate(lines[5:]):  # five pairs have no text that leads back
                line["reverse_delta"] = f"undo {WORDS[i % 6]}"
            (root / "same.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = writer.draw(root / "aux", 10, 3)
    pairs = [(names[i % 10], names[(i + 1 + i // 10) % 10], f"{WORDS[i % 6]} aux") for i in range(20)]
    lines = [json.dumps(dict(zip(("reference", "target", "delta"), pair, strict=True))) + "\n" for pair in pairs]
    (root / "pseudo.jsonl").write_text("".join(lines))
    return root


def arguments(world, zoo, out, model="blip_tdm", **more) -> list[str]:
    """The flags of a short run with B and B' = 6."""
    backbone = zoo / ("blip" if model == "blip_tdm" else "clip")
    base = {"model": model, "backbone": backbone, "root": world / "cirr", "out": out, "batch": 6, "steps": 6}
    base |= {"lr": 1e-3, "tau": 0.1, "device": "cpu", "workers": 0, "log_every": 1}
    base |= {"pseudo": world / "pseudo.jsonl", "pseudo_images": world / "aux"} | more
    return [word for name, value in base.items() for word in (f"--{name}", str(value))]


def train(argv: list[str]) -> None:
    vars(train_cir).update(DEFAULTS)
    override(vars(train_cir), argv)
    train_cir.main()


def log_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def pixels_of(model, n, seed=0):
    return torch.randn(n, 3, model.preprocess.size, model.preprocess.size, generator=torch.manual_seed(seed))


# ---- models ----


def test_combiner_is_the_formula():
    torch.manual_seed(0)
    ours = train_cir.Combiner(d=5, p=7, h=11, dropout=0.5).double().eval()
    text, image = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    w = {name: p.detach().numpy() for name, p in ours.named_parameters()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    t, v = (np.maximum(linear(n, x.numpy()), 0) for n, x in (("text", text), ("image", image)))
    r = np.concatenate([t, v], axis=1)
    lam = 1 / (1 + np.exp(-linear("gate", np.maximum(linear("gate_hidden", r), 0))))
    c = linear("out", np.maximum(linear("hidden", r), 0)) + lam * text.numpy() + (1 - lam) * image.numpy()
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    np.testing.assert_allclose(ours(image, text).detach().numpy(), c, atol=1e-6)  # it normalises in fp32


def test_clip_features_equal_transformers(zoo):
    model = train_cir.build_cir("combiner", str(zoo / "clip"), p=6, h=9).eval()
    assert model.combiner.text.out_features == 6 and model.combiner.hidden.out_features == 9
    pixels = pixels_of(model, 3)
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(zoo / "clip").eval()
    text = transformers.CLIPTextModelWithProjection.from_pretrained(zoo / "clip").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo / "clip")
    with torch.no_grad():
        image = vision(pixel_values=pixels).image_embeds
        tokens, target = model.image(pixels)
        assert torch.equal(tokens, image)
        torch.testing.assert_close(target, image / image.norm(dim=1, keepdim=True))
        texts = [text(**tokenizer(words, return_tensors="pt")).text_embeds[0] for words in WORDS[:3]]  # no padding
        wanted = model.combiner(image, torch.stack(texts))
        torch.testing.assert_close(model.compose(tokens, WORDS[:3]), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("first_token", ["enc", "cls"])
def test_blip_equals_its_parts_called_by_hand(zoo, first_token):
    model = train_cir.build_cir("blip_tdm", str(zoo / "blip"), first_token=first_token).eval()
    hf = transformers.BlipForImageTextRetrieval.from_pretrained(zoo / "blip").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo / "blip")
    wanted_id = hf.config.text_config.vocab_size - 1 if first_token == "enc" else tokenizer.cls_token_id
    pixels = pixels_of(model, 3)
    with torch.no_grad():
        patches = hf.vision_model(pixel_values=pixels).last_hidden_state
        tokens, target = model.image(pixels)
        torch.testing.assert_close(tokens, patches, atol=5e-6, rtol=0)  # fused attention rounds otherwise
        with torch.autocast("cpu", torch.bfloat16):
            assert model.image(pixels)[0].dtype == torch.bfloat16  # once, not in each key and value
        feature = hf.vision_proj(patches[:, 0])
        torch.testing.assert_close(target, feature / feature.norm(dim=1, keepdim=True))
        composed, matched = model.compose(tokens, WORDS[:3]), model.match(tokens, WORDS[:3])
        for i, words in enumerate(WORDS[:3]):  # one by one: no padding
            ids = tokenizer(words, return_tensors="pt").input_ids
            ids[0, 0] = wanted_id
            states = hf.text_encoder(input_ids=ids, encoder_hidden_states=patches[i : i + 1]).last_hidden_state
            c = hf.text_proj(states[0, 0])
            torch.testing.assert_close(composed[i], c / c.norm(), atol=1e-6, rtol=0)
            torch.testing.assert_close(matched[i], hf.itm_head(states[0]).mean(0), atol=1e-6, rtol=0)


def test_no_text_waits_for_the_device(zoo):
    """On the meta device nothing can be read back: what would wait for a GPU raises."""
    model = train_cir.build_cir("blip_tdm", str(zoo / "blip")).to("meta")
    texts = [" ".join(["a"] * (1 + 7 * i % 23)) for i in range(130)]
    tokens = torch.empty(130, 5, model.backbone.config.vision_config.hidden_size, device="meta")
    assert model.target(tokens).shape == model.compose(tokens, texts).shape
    states, mask = model.ground(tokens, texts)
    assert states.shape[:2] == mask.shape and model.match(tokens, texts).shape == (130, 2)


def test_texts_of_like_length_go_together_and_come_back_in_order(zoo, monkeypatch):
    """States and gradients are those of all texts padded to the longest."""
    model = train_cir.build_cir("blip_tdm", str(zoo / "blip")).eval().double()
    texts = [" ".join(["a"] * (1 + 7 * i % 23)) for i in range(260)]
    tokens = torch.randn(260, 5, model.backbone.config.vision_config.hidden_size, generator=torch.manual_seed(0))
    tokens, lengths, encoder = tokens.double(), [], model.backbone.text_encoder.forward

    def noted(ids, *given, **named):
        lengths.append(ids.shape[1])
        return encoder(ids, *given, **named)

    monkeypatch.setattr(model.backbone.text_encoder, "forward", noted)
    states, mask = model.ground(tokens, texts)
    assert len(lengths) == 4 and sorted(set(lengths)) == lengths and lengths[3] == mask.shape[1]
    ids, same = model.tokenize(texts, "cpu")
    ids[:, 0] = model.first_token
    wanted = encoder(ids, same, encoder_hidden_states=tokens).last_hidden_state
    assert torch.equal(mask, same)
    weights, gradients = [p for p in model.parameters() if p.requires_grad], []
    coming = torch.randn(wanted.shape, generator=torch.manual_seed(1)).double() * mask[..., None]
    for found in (states, wanted):
        torch.testing.assert_close(found * mask[..., None], wanted * mask[..., None], atol=1e-12, rtol=1e-9)
        gradients.append(torch.autograd.grad((found * coming).sum(), weights, allow_unused=True))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)


def test_a_wrong_backbone_or_one_without_its_weights_is_refused(zoo, tmp_path):
    with pytest.raises(UserError, match="is a clip model, wanted blip"):
        train_cir.build_cir("blip_tdm", str(zoo / "clip"))
    shutil.copytree(zoo / "blip", tmp_path / "blip")
    weights = load_file(tmp_path / "blip" / "model.safetensors")
    weights.pop("itm_head.weight")
    save_file(weights, tmp_path / "blip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="first itm_head.weight"):
        train_cir.build_cir("blip_tdm", str(tmp_path / "blip"))


def test_text_is_never_cut_silently_nor_ended_by_a_caption(zoo):
    for kind, folder, mark in (("combiner", "clip", "<|endoftext|>"), ("blip_tdm", "blip", "[SEP]")):
        model = train_cir.build_cir(kind, str(zoo / folder), text_length=12)
        ids, mask = model.tokenize(["a", "b " * 30, "c"], "cpu")
        assert ids.shape == (3, 12) and mask.sum(1).tolist()[1] == 12
        assert model.too_long(["a", "b " * 30, "c"]) == ["b " * 30]
        assert model.unknown(["a", "a \U0001f534", "\u6362"]) == (
            ["a \U0001f534", "\u6362"] if folder == "blip" else []
        )
        model.length = 60
        plain, spelled = (model.tokenize([text], "cpu")[0] for text in ("a b", f"a {mark} b"))
        assert spelled.shape[1] > plain.shape[1] + 1  # letters, not one special token
        with pytest.raises(UserError, match="positions"):
            train_cir.build_cir(kind, str(zoo / folder), text_length=10_000)


# ---- target-delta matching ----


def test_tdm_loss_is_equation_3(zoo):
    model = train_cir.build_cir("blip_tdm", str(zoo / "blip")).eval()
    with torch.no_grad():
        tokens = model.tokens(pixels_of(model, 4))
        rows, hard_target, hard_delta = torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1]), torch.tensor([3, 2, 0])
        ours = train_cir.tdm_loss(model, tokens, WORDS[:4], [0, 1, 2, 3], (rows, hard_target, hard_delta))
        pairs = [(i, i, 1) for i in range(4)] + [(2, 0, 0), (0, 1, 0), (1, 3, 0)] + [(0, 3, 0), (1, 2, 0), (3, 0, 0)]
        wanted = []
        for image, delta, label in pairs:  # (target image, delta, matched)
            states, _ = model.ground(tokens[image : image + 1], [WORDS[delta]])
            logits = (states[0].double() @ model.backbone.itm_head.weight.double().T).mean(0)
            logits = logits + model.backbone.itm_head.bias.double()
            wanted.append(math.log(sum(math.exp(float(z)) for z in logits)) - float(logits[label]))
    torch.testing.assert_close(ours.double(), torch.tensor(wanted).double(), atol=1e-5, rtol=0)


def test_negatives_are_hard_and_never_the_same_image():
    torch.manual_seed(0)
    images = [(0, "a"), (0, "b"), (0, "a"), (0, "c"), (1, "a"), (0, "b")]
    target, c = (torch.nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    same = torch.tensor([[p == q for q in images] for p in images])
    z = target @ c.T
    counts = torch.zeros(2, 6, 6)
    draws = torch.Generator().manual_seed(0)
    for _ in range(400):
        rows, hard_target, hard_delta = negatives.draw_negatives(target, c, images, 0.2, draws)
        assert rows.tolist() == list(range(6))
        assert not same[rows, hard_target].any() and not same[rows, hard_delta].any()
        counts[0, rows, hard_target] += 1
        counts[1, rows, hard_delta] += 1
    for count, logits in zip(counts, (z.T, z), strict=True):  # row i of z.T: which target is near delta i
        wanted = (logits / 0.2).masked_fill(same, -torch.inf).softmax(1)
        assert (count / 400 - wanted).abs().max() < 0.1  # 4 standard deviations; without the temperature 0.3 off
    none = negatives.draw_negatives(target[:2], c[:2], [(0, "a"), (0, "a")], 0.01, draws)
    assert [len(part) for part in none] == [0, 0, 0]


# ---- the reversed loss ----


def reversed_by_hand(model, reference, texts, target, candidates, tau):
    """Which target, changed by text i, gives reference i? One composition at a time; the first candidate is right."""
    total = 0.0
    for i, columns in enumerate(candidates):
        pairs = (model.compose(target[j : j + 1], [texts[i]], backward=True)[0] for j in columns)
        logits = torch.stack([c.double() @ model.target(reference[i : i + 1])[0].double() / tau for c in pairs])
        total = total - logits.log_softmax(0)[0]
    return total


@pytest.mark.parametrize("model", ["sum", "combiner", "blip_tdm"])
def test_reversed_loss_equals_composing_every_pair(zoo, model):
    torch.manual_seed(0)
    backbone = str(zoo / ("blip" if model == "blip_tdm" else "clip"))
    ours = train_cir.build_cir(model, backbone, p=6, h=9, directions=True, tau=0.1).eval()
    with torch.no_grad():
        target, reference = (ours.tokens(pixels_of(ours, 5, seed)) for seed in (1, 2))
    own = torch.tensor([2, 0, 4])
    candidates = [[j, *(k for k in range(5) if k != j)] for j in own.tolist()]
    given = torch.tensor(candidates) if model == "blip_tdm" else own
    loss = ours.reversed_loss(reference[:3], WORDS[:3], target, given)
    wanted = reversed_by_hand(ours, reference[:3], WORDS[:3], target, candidates, 0.1)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    parameters = [p for p in ours.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    exact = torch.autograd.grad(wanted, parameters, allow_unused=True)
    for a, b in zip(found, exact, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6


def test_combiner_drops_whole_units_in_the_reversed_loss():
    """Dropout of 0.5 halves what is on: the mean over many draws is near the loss without it, and draws differ."""
    torch.manual_seed(0)
    combiner = train_cir.Combiner(d=8, p=16, h=64, dropout=0.2)
    reference, text, target = (torch.nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in range(3))
    losses = [combiner.reversed_loss(reference, text, target, torch.arange(6), 0.5).item() for _ in range(200)]
    combiner.eval()
    still = [combiner.reversed_loss(reference, text, target, torch.arange(6), 0.5).item() for _ in range(2)]
    assert still[0] == still[1] and len(set(losses)) > 190
    assert np.mean(losses) == pytest.approx(still[0], rel=0.05)


@pytest.mark.parametrize("kind, folder, name", [("sum", "clip", "token_embedding"), ("blip_tdm", "blip", "word_embed")])
def test_a_direction_leads_every_text(zoo, kind, folder, name):
    torch.manual_seed(0)
    model = train_cir.build_cir(kind, str(zoo / folder), directions=True).eval()
    plain = train_cir.build_cir(kind, str(zoo / folder)).eval()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == {n for n in trained if "directions" not in n}
    assert sum("directions" in n and name in n for n in trained) == 1
    ids, mask = model.tokenize(["a b", "c"], "cpu", backward=True)
    before, _ = plain.tokenize(["a b", "c"], "cpu")
    assert ids[:, 1].tolist() == [-2, -2] and torch.equal(ids[:, [0, *range(2, ids.shape[1])]], before)
    assert mask.sum(1).tolist() == [m + 1 for m in plain.tokenize(["a b", "c"], "cpu")[1].sum(1).tolist()]
    assert model.tokenize(["b " * 200], "cpu")[0].shape[1] == plain.length
    directions = next(p for n, p in model.named_parameters() if "directions" in n)
    with torch.no_grad():
        tokens = model.tokens(pixels_of(model, 2))
        one, two = (model.compose(tokens, WORDS[:2], backward=way) for way in (False, True))
        assert (one - two).abs().max() > 1e-3
        directions[1] = directions[0]
        assert torch.equal(model.compose(tokens, WORDS[:2], backward=True), one)
        # the row of a word in place of [FORWARD]: as if the text began with that word
        word = plain.tokenizer("a", add_special_tokens=False).input_ids[0]
        directions[0] = dict(model.named_modules())[next(n for n in trained if "directions" in n)[:-11]].weight[word]
        wanted = plain.compose(tokens, ["a b"] * 2)
        torch.testing.assert_close(model.compose(tokens, ["b"] * 2), wanted, atol=1e-6, rtol=0)


def test_candidates_are_the_own_target_then_hard_ones():
    torch.manual_seed(0)
    images = [(0, "a"), (0, "b"), (0, "a"), (0, "c"), (1, "a"), (0, "b")]
    target, c = (torch.nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    draws, counts = torch.Generator().manual_seed(0), torch.zeros(6, 6)
    for _ in range(300):
        found = negatives.draw_candidates(target, c, images, 0.2, 2, draws)
        assert found.shape == (6, 3) and found[:, 0].tolist() == list(range(6))
        for i, row in enumerate(found.tolist()):
            assert len(set(row)) == 3 and all(images[j] != images[i] for j in row[1:])
            counts[i, row[1]] += 1
    same = torch.tensor([[p == q for q in images] for p in images])
    wanted = (target @ c.T / 0.2).T.masked_fill(same, -torch.inf).softmax(1)
    assert (counts / 300 - wanted).abs().max() < 0.12  # the first of them is a draw from the softmax
    assert negatives.draw_candidates(target, c, images, 0.2, 99, draws).shape == (6, 1 + 4)  # "a" has four others
    every = negatives.draw_candidates(target, c, images, 0.2, 0, draws)
    assert every[:, 0].tolist() == list(range(6)) and (every.sort(1).values == torch.arange(6)).all()


# ---- what is drawn ----


def test_each_step_draws_its_share_of_a_shuffled_epoch():
    items = [Item((0, f"r{i}"), (0, f"t{i}"), ((f"d{i}",),)) for i in range(23)]
    drawn = [d.key[2] for step in range(6) for d in draw(items, 0, step, 6, 0)]
    assert len(set(drawn[:18])) == len(set(drawn[18:])) == 18 and drawn[:18] != drawn[18:]
    assert draw(items, 0, 0, 6, 1) != draw(items, 0, 0, 6, 0)


def test_dagger_draws_both_deltas_and_fashioniq_all_four(tmp_path):
    human = [Triplet(f"r{i}", f"t{i}", "human") for i in range(10)]
    generated = [Triplet(f"r{i}", f"t{i}", "generated") for i in range(9)]
    items = human_items(human, "cirr", generated)
    drawn = [d for step in range(60) for d in draw(items, 0, step, 10, 0)]
    share = np.mean([d.delta == "generated" for d in drawn if d.key[2] != 9])
    assert 0.4 < share < 0.6
    assert {d.delta for d in drawn if d.key[2] == 9} == {"human"}  # nothing was generated for it
    with pytest.raises(UserError, match="none of its"):
        human_items(human, "cirr", [Triplet("x", "y", "generated")])
    fashion = Triplet("r", "t", "Is red. and has dots", alternatives=("is red.", "has dots"))
    (item,) = human_items([fashion], "fashioniq", [])
    assert item.deltas == (("Is red and has dots", "Has dots and is red", "Is red", "Has dots"),)
    (tmp_path / "release.json").write_text('[{"reference": "r", "target": "t", "caption": ["human", "one", "two"]}]')
    release = read_triplets(str(tmp_path / "release.json"))  # the VDG release's list
    assert human_items(release, "jsonl", [])[0].deltas == (("human",), ("one", "two"))
    both = Triplet("r1", "t1", "generated", extra={"reverse_delta": "back"})
    (item,) = human_items(human[1:2], "cirr", [both], deltas=False)  # what leads back, and nothing else
    assert item.deltas == (("human",),) and item.back == ("back",)


# ---- runs ----


@pytest.mark.parametrize("model", ["combiner", "blip_tdm"])
def test_a_run_saves_trained_weights_only_and_reloads(world, zoo, tmp_path, model):
    train(arguments(world, zoo, tmp_path, model, same_pairs=world / "same.jsonl", steps=2))
    saved = load_file(tmp_path / "model.safetensors")
    prefixes = ("backbone.text_", "combiner.", "backbone.itm_head.")
    assert saved and all(name.startswith(prefixes) for name in saved)
    before = train_cir.build_cir(model, str(zoo / ("clip" if model == "combiner" else "blip"))).eval()
    after = train_cir.load_cir(str(tmp_path))
    assert not after.training
    old, new = before.state_dict(), after.state_dict()
    assert {name for name in new if not torch.equal(new[name], old[name])} <= saved.keys()  # vision is as it was
    moved = [name for name in saved if name in old and not torch.equal(saved[name], old[name])]
    assert any("text_" in name for name in moved)
    assert model == "combiner" or "backbone.itm_head.weight" in moved
    assert all(torch.equal(new[name], saved[name]) for name in saved)
    pixels = pixels_of(after, 2)
    with torch.no_grad():
        assert torch.equal(before.image(pixels)[1], after.image(pixels)[1])
        c = after.compose(after.tokens(pixels), WORDS[:2])
        assert not torch.allclose(before.compose(before.tokens(pixels), WORDS[:2]), c, atol=1e-4)
        train_cir.put_trained(before, saved, "here")
        assert torch.equal(before.compose(before.tokens(pixels), WORDS[:2]), c)
    saved.pop(next(iter(saved)))
    with pytest.raises(UserError, match="do not fit"):
        train_cir.put_trained(before, saved, "here")


@pytest.mark.parametrize("model", ["combiner", "blip_tdm"])
def test_six_steps_equal_three_and_resume_and_three(world, zoo, tmp_path, monkeypatch, model):
    loss = {"combiner_dropout": 0.5, "learn_tau": True, "bidirectional": 0.5, "bank": True}
    more = loss if model == "combiner" else {"val_split": "val", "val_every": 2}
    train(arguments(world, zoo, tmp_path / "whole", model, **more))
    asked = []
    monkeypatch.setattr(train_cir, "stop_requested", lambda: asked.append(1) or len(asked) == 3)
    with pytest.raises(SystemExit) as stop:
        train(arguments(world, zoo, tmp_path / "halves", model, **more))
    assert stop.value.code == 143 and [r["step"] for r in log_of(tmp_path / "halves") if "lr" in r] == [1, 2, 3]
    train(arguments(world, zoo, tmp_path / "halves", model, **more))
    whole, halves = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert whole.keys() == halves.keys() and all(torch.equal(whole[name], halves[name]) for name in whole)
    logs = [log_of(tmp_path / name) for name in ("whole", "halves")]
    for record in logs[0] + logs[1]:
        record.pop("items_per_s", None), record.pop("seconds_left", None)
    assert logs[0] == logs[1] and len([r for r in logs[0] if "lr" in r]) == 6
    with pytest.raises(UserError, match="LR"):
        train(arguments(world, zoo, tmp_path / "halves", model, **more | {"lr": 2e-3}))


@pytest.mark.parametrize(
    "model, more",
    [
        ("combiner", {}),
        ("combiner", {"pseudo": ""}),
        ("combiner", {"concat": False, "bank": True}),
        ("combiner", {"bidirectional": 0.5}),
        ("sum", {"bidirectional": 0.5, "train_text": False}),  # the directions alone learn
        ("sum", {"bidirectional": 0.4, "reversed_text": "delta"}),
        ("blip_tdm", {}),
        ("blip_tdm", {"bidirectional": 0.1, "reversed_negatives": 3}),
        ("blip_tdm", {"bidirectional": 0.1, "reversed_negatives": 0, "tdm": False, "bank": True}),
    ],
)
def test_two_ranks_equal_one(world, zoo, tmp_path, monkeypatch, model, more):
    """Plain gradient descent: after two steps the weights agree only if every loss and its gradients do."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, **_: torch.optim.SGD(groups, lr=lr))
    more = {"steps": 2, "beta": 0.5, "learn_tau": True, "lr": 0.1, "same_pairs": world / "same.jsonl"} | more
    train(arguments(world, zoo, tmp_path / "one", model, **more))
    ranks.run_ranks(2, train, arguments(world, zoo, tmp_path / "two", model, batch=3, **more))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    start = train_cir.build_cir(model, str(zoo / ("blip" if model == "blip_tdm" else "clip"))).state_dict()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=5e-6, rtol=1e-4)
    if more.get("train_text", True):
        assert max((one[n] - start[n]).abs().max() for n in one if n in start and n.startswith("backbone.")) > 1e-3
    else:
        assert list(one) == ["backbone.text_model.embeddings.token_embedding.directions"]
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert a["images"] == b["images"] == 12 * (2 if more.get("pseudo", True) else 1)
        for key in {"tcc", "tdm", "rev", "loss", "tau"} & (a.keys() | b.keys()):
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
    assert (a["rev"] > 0, a["tdm"] > 0) == ("bidirectional" in more, model == "blip_tdm" and more.get("tdm", True))


def test_the_bank_is_every_other_image(world, zoo, tmp_path, monkeypatch):
    """What L_tcc gets: the plain embeddings of all training images but the targets of this batch."""
    given, real = [], train_cir.l_tcc_ranks
    monkeypatch.setattr(train_cir, "l_tcc_ranks", lambda *a, **k: given.append((a, k["bank"])) or real(*a, **k))
    drawn, draw = [], streams.draw
    monkeypatch.setattr(streams, "draw", lambda *a: drawn.append((a[2], draw(*a))) or draw(*a))
    train(arguments(world, zoo, tmp_path, "combiner", bank=True, steps=2))
    model = train_cir.build_cir("combiner", str(zoo / "clip")).eval()
    stores = [ImageStore(str(world / "img_raw" / "train")), ImageStore(str(world / "aux"))]
    for step in (0, 1):
        targets = {d.target for at, draws in drawn if at == step for d in draws}
        human = human_source("cirr", str(world / "cirr"), "train", "")
        auxiliary = pseudo_source(str(world / "pseudo.jsonl"), str(world / "aux"))
        items = [*human.items, *auxiliary.items]
        images = {image for item in items for image in (item.reference, item.target)} - targets
        files = [
            stores[s].path(name.removeprefix("train-") if s else f"1-{int(name[6:]):03d}.png") for s, name in images
        ]
        pixels = torch.stack([model.preprocess(open_image(file)) for file in files])
        wanted = model.image(pixels)[1]
        bank = given[step][1]
        assert len(bank) == len(images) > 3
        assert (wanted @ bank.T > 1 - 1e-5).any(1).all()


def test_hard_negatives_of_a_file_are_in_the_bank_alone(world, zoo, tmp_path, monkeypatch):
    """MegaPairs' hns: further negatives with --bank; without it nobody asks for their pictures."""
    names = sorted(path.name for path in (world / "aux").iterdir())
    lines = [
        {"q_img": a, "t_img": b, "q_text": "is red", "hns": [names[-1]]}
        for a, b in zip(names[:4], names[1:5], strict=True)
    ]
    (tmp_path / "mega.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = "reference=q_img,target=t_img,delta=q_text,negatives=hns"
    source = streams.human_source("jsonl", str(tmp_path / "mega.jsonl"), "train", str(world / "aux"), keys=keys)
    assert {item.negatives for item in source.items} == {((0, names[-1]),)}
    assert (0, names[-1]) not in streams.images_of([source])
    assert (0, names[-1]) in streams.images_of([source], negatives=True)
    lost = [line | {"hns": ["gone.png"]} for line in lines]
    (tmp_path / "lost.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lost))
    source = streams.human_source("jsonl", str(tmp_path / "lost.jsonl"), "train", str(world / "aux"), keys=keys)
    assert len(streams.complete_sources([source, streams.Source()], 2, 1, str(tmp_path), 0)[0].items) == 4
    with pytest.raises(UserError):
        streams.complete_sources([source, streams.Source()], 2, 1, str(tmp_path), 0, bank=True)


def test_ablations_and_frozen_text(world, zoo, tmp_path, monkeypatch):
    """no concat: L(B) + L(B') of the same batch; a frozen text encoder keeps its weights."""
    for name, more in (("with", {}), ("without", {"concat": False}), ("human", {"pseudo": ""})):
        train(arguments(world, zoo, tmp_path / name, "combiner", steps=1, seed=0, **more))
    both, apart, human = (log_of(tmp_path / name)[0]["tcc"] for name in ("with", "without", "human"))
    assert both > apart > human  # more negatives cost more; B' adds its own term
    train(arguments(world, zoo, tmp_path / "frozen", "combiner", steps=1, train_text=False))
    assert all(name.startswith("combiner.") for name in load_file(tmp_path / "frozen" / "model.safetensors"))
    train(arguments(world, zoo, tmp_path / "blip", steps=1, train_text=False, tdm=False))
    saved = load_file(tmp_path / "blip" / "model.safetensors")
    assert saved and not any(name.startswith("backbone.text_encoder") for name in saved)
    for name, value in {"CHECKPOINT": str(tmp_path / "blip"), "RERANK": 5}.items():
        monkeypatch.setattr(eval_cir, name, value)
    with pytest.raises(UserError, match="--rerank wants a trained tdm head: .* --tdm false"):
        eval_cir.load_system(torch.device("cpu"))
    with pytest.raises(UserError, match="trains nothing"):
        train(arguments(world, zoo, tmp_path / "x", "sum", train_text=False))
    with pytest.raises(UserError, match="no triplet has a reverse_delta"):
        train(arguments(world, zoo, tmp_path / "x", "sum", bidirectional=0.5, reversed_text="delta"))


def test_stage_two_starts_from_stage_one(world, zoo, tmp_path):
    """The Combiner behind stage I's text encoder, frozen; the checkpoint finds it again."""
    how = {"steps": 2, "bidirectional": 0.5, "pseudo": ""}
    train(arguments(world, zoo, tmp_path / "one", "sum", **how))
    train(arguments(world, zoo, tmp_path / "two", "combiner", start_from=tmp_path / "one", train_text=False, **how))
    saved, first = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert all(name.startswith("combiner.") or "directions" in name for name in saved)
    model = train_cir.load_cir(str(tmp_path / "two"))
    state = model.state_dict()
    assert all(torch.equal(state[name], first[name]) for name in first if "directions" not in name)
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    with pytest.raises(UserError, match="was trained with --bidirectional: take both with it"):
        train(arguments(world, zoo, tmp_path / "x", "combiner", start_from=tmp_path / "one", pseudo="", steps=1))
    train(arguments(world, zoo, tmp_path / "plain", "sum", **how | {"bidirectional": 0}))
    with pytest.raises(UserError, match="was trained without --bidirectional: take both with it, or both without"):
        train(arguments(world, zoo, tmp_path / "x", "combiner", start_from=tmp_path / "plain", **how))


def test_a_picture_is_one_whatever_leads_to_it(world, tmp_path):
    """Human and pseudo triplets of one folder, and a link: no picture is a negative of itself."""
    folder = tmp_path / "pictures"
    shutil.copytree(world / "aux", folder)
    names = sorted(path.name for path in folder.iterdir())
    (folder / "link.png").symlink_to(names[0])
    lines = [[(names[0], names[1]), (names[2], names[3])], [(names[3], "link.png"), (names[4], names[0])]]
    files = []
    for i, pairs in enumerate(lines):
        files.append(tmp_path / f"{i}.jsonl")
        text = (json.dumps({"reference": a, "target": b, "delta": "is red"}) + "\n" for a, b in pairs)
        files[-1].write_text("".join(text))
    human = streams.human_source("jsonl", str(files[0]), "train", str(folder))
    sources = streams.complete_sources(
        [human, streams.pseudo_source(str(files[1]), str(folder))], 2, 1, str(tmp_path), 0
    )
    one = (0, names[0])
    assert [item[:2] for item in sources[1].items] == [((0, names[3]), one), ((1, names[4]), one)]
    assert streams.images_of(sources) == [*((0, name) for name in names[:4]), (1, names[4])]
    assert [len(set(found)) for _, found in streams.pictures_of(sources)] == [4, 1]


def test_a_run_goes_on_where_its_data_lie_now(world, zoo, tmp_path):
    """Hashes of the triplets and the list of pictures say that they are the same; another file is refused."""
    moved = tmp_path / "moved"
    shutil.copytree(world, moved)
    train(arguments(world, zoo, tmp_path / "run", "combiner", steps=2))
    first = arguments(moved, zoo, tmp_path / "run", "combiner", steps=2)
    train(first)
    lines = (moved / "pseudo.jsonl").read_text().splitlines(keepends=True)
    (moved / "pseudo.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="TRIPLETS_SHA256: the data changed since"):
        train(first)


def test_a_damaged_start_stops_before_the_training(world, zoo, tmp_path):
    """trained_on.safetensors of --start_from is read at the end's need; a fault of it must show at the beginning."""
    train(arguments(world, zoo, tmp_path / "one", "sum", steps=1))
    seen = load_file(tmp_path / "one/trained_on.safetensors")["pairs"]
    more = arguments(world, zoo, tmp_path / "two", "sum", steps=1, start_from=tmp_path / "one")
    file = tmp_path / "one/trained_on.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] + b"abc")
    with pytest.raises(UserError, match="trained_on.safetensors"):
        train(more)
    assert not (tmp_path / "two/log.jsonl").exists()
    file.write_bytes(whole)
    train(more)
    assert torch.equal(load_file(tmp_path / "two/trained_on.safetensors")["pairs"], seen) and len(seen) > 24


def test_a_resume_measures_by_the_queries_that_it_began_with(world, zoo, tmp_path):
    """Else the best step would be the best of two measurements."""
    moved = tmp_path / "moved"
    shutil.copytree(world, moved)
    asked = arguments(moved, zoo, tmp_path / "run", "combiner", steps=2, val_split="val")
    train(asked)
    benchmark = read_cirr(str(moved / "cirr"), "val", str(moved / "img_raw"))
    name = benchmark.gallery[3]
    picture = Path(benchmark.images.path(name))
    size = picture.stat().st_size
    picture.write_bytes(picture.read_bytes() + b" ")
    with pytest.raises(UserError, match=rf"of its pictures 1 changed, first '{name}' \({size} bytes then"):
        train(asked)
    picture.write_bytes(picture.read_bytes()[:-1])
    train(asked)
    captions = moved / "cirr/captions/cap.rc2.val.json"
    records = read_json(captions)
    records[0]["caption"] = "is another text"
    write_json(captions, records)
    with pytest.raises(UserError, match="VALIDATION_SHA256"):
        train(asked)


def test_a_start_brings_its_own_backbone_and_all_before_it(world, zoo, tmp_path, monkeypatch):
    """Without --backbone the one that the checkpoint stands on; another one stops; a start of a start counts too."""
    shutil.copytree(zoo / "clip", tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    weights["visual_projection.weight"][0, 0] += 1e-3
    save_file(weights, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    how = {"steps": 2, "pseudo": ""}
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    train(arguments(world, zoo, one, "sum", backbone=tmp_path / "clip", **how))
    with pytest.raises(
        UserError, match="--start_from .*one stands on other frozen weights than .*clip holds: leave --back"
    ):
        train(arguments(world, zoo, tmp_path / "x", "combiner", start_from=one, **how))
    monkeypatch.setitem(train_cir._USUAL, "combiner", (str(zoo / "clip"), 10, 0.0))  # what it took instead
    train(arguments(world, zoo, two, "combiner", backbone="", start_from=one, train_text=False, **how))
    assert json.loads((two / "config.json").read_text())["build"]["backbone"] == str(tmp_path / "clip")
    train(arguments(world, zoo, three, "combiner", backbone="", start_from=two, train_text=False, **how))
    state, text = train_cir.load_cir(str(three)).state_dict(), load_file(one / "model.safetensors")
    assert all(torch.equal(state[name], text[name]) for name in text)  # stage I's, though stage II holds none of it
    with pytest.raises(UserError, match="nowhere/config.json not found; wanted a finished checkpoint"):
        train([*arguments(world, zoo, tmp_path / "x", "combiner", start_from=tmp_path / "nowhere"), "--check"])


def test_reversed_training_teaches_reversed_queries(world, zoo, tmp_path):
    """On a handful of triplets L_rev falls, and the checkpoint keeps its directions."""
    how = {"steps": 40, "views": 1, "augment": False, "pseudo": "", "lr": 3e-3, "batch": 12, "bidirectional": 1.0}
    train(arguments(world, zoo, tmp_path, "combiner", **how))
    losses = [r["rev"] for r in log_of(tmp_path)]
    assert np.mean(losses[-4:]) < 0.8 * losses[0]
    model = train_cir.load_cir(str(tmp_path))
    assert model.directed
    tokens = model.tokens(pixels_of(model, 1))
    assert (model.compose(tokens, ["a"]) - model.compose(tokens, ["a"], backward=True)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "more, steps",
    [
        ({"epochs": 2, "pseudo": ""}, 2 * (24 // 6)),
        ({"epochs": 1}, 24 // 6),  # an epoch is one of the human triplets
        ({"epochs": 1, "triplets": False}, 20 // 6),  # without them, of the auxiliary ones
        ({"epochs": 3, "steps": 2}, 2),
    ],
)
def test_epochs_and_steps(world, zoo, tmp_path, more, steps):
    train(arguments(world, zoo, tmp_path, "combiner", **{"steps": 0} | more))
    assert [r["step"] for r in log_of(tmp_path)] == list(range(1, steps + 1))


def test_the_learning_rate_is_a_cosine(world, zoo, tmp_path):
    train(arguments(world, zoo, tmp_path, "combiner", steps=8, pseudo=""))
    rates = [r["lr"] for r in log_of(tmp_path)]
    assert rates == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * s / 8)) for s in range(8)])


def test_too_few_triplets_are_refused(world, zoo, tmp_path):
    with pytest.raises(UserError, match="nothing to train on"):
        train(arguments(world, zoo, tmp_path / "c", "combiner", triplets=False, pseudo=""))
    with pytest.raises(UserError, match="fewer than 32"):
        train(arguments(world, zoo, tmp_path / "c", "combiner", batch=32))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no triplet"):
        train(arguments(world, zoo, tmp_path / "c", "combiner", pseudo=tmp_path / "empty.jsonl"))


def test_texts_that_are_cut_are_counted(world, zoo, tmp_path, capsys, monkeypatch):
    """In training, in its validation, and where the checkpoint is asked."""
    train(arguments(world, zoo, tmp_path, "combiner", steps=1, text_length=8, val_split="val"))
    said = capsys.readouterr().out
    assert said.count("lose what exceeds 8 tokens") == 2
    flags = [
        "--checkpoint",
        tmp_path,
        "--root",
        world / "cirr",
        "--split",
        "val",
        "--official",
        "false",
        "--workers",
        "0",
    ]
    for name, value in EVALUATED.items():
        monkeypatch.setattr(eval_cir, name, value)  # afterwards they are what they were
    override(vars(eval_cir), [*map(str, flags), "--device", "cpu", "--out", str(tmp_path / "eval")])
    eval_cir.main()
    assert "lose what exceeds 8 tokens" in capsys.readouterr().out


def test_a_learned_temperature_goes_where_its_gradient_says_and_stays_in_its_bounds(world, zoo, tmp_path):
    """Adam's first step is -lr times the sign of the gradient, which two runs that learn nothing tell."""
    slope = []
    for i, tau in enumerate((0.099, 0.101)):
        train(arguments(world, zoo, tmp_path / f"{i}", "combiner", steps=1, lr=0.0, tau=tau))
        slope.append(log_of(tmp_path / f"{i}")[0]["tcc"])
    down = slope[1] > slope[0]
    for lr, wanted in ((0.01, 0.09 if down else 0.11), (1.0, 0.001 if down else 0.5)):
        out = tmp_path / f"lr-{lr}"
        train(arguments(world, zoo, out, "combiner", steps=1, learn_tau=True, lr=lr))
        assert log_of(out)[0]["tau"] == pytest.approx(wanted, rel=1e-4)
        assert read_json(out / "config.json")["tau"] == log_of(out)[0]["tau"]
        assert train_cir.load_cir(str(out)).tau.item() == log_of(out)[0]["tau"]
        assert "tau" not in load_file(out / "model.safetensors")


def test_only_a_learned_temperature_is_clamped_and_it_does_not_decay(zoo, monkeypatch):
    learned = train_cir.build_cir("sum", str(zoo / "clip"), learn_tau=True)
    for value, wanted in ((-3.0, 0.001), (0.2, 0.2), (9.0, 0.5)):
        learned.tau.data.fill_(value)
        learned.clamp_tau()
        assert learned.tau.item() == pytest.approx(wanted)
    given = train_cir.build_cir("sum", str(zoo / "clip"), tau=1e-4)
    given.clamp_tau()
    assert given.tau.item() == pytest.approx(1e-4) and "tau" not in train_cir.get_trained(given)
    monkeypatch.setattr(train_cir, "LEARN_TAU", True)
    weights, tau = train_cir.make_optimizer(learned).param_groups
    assert weights["weight_decay"] == 0.05 and not any(p is learned.tau for p in weights["params"])
    assert tau["weight_decay"] == 0 and tau["params"] == [learned.tau]


def test_wrong_flags_are_one_line(world, zoo, tmp_path):
    for flags, words in (
        ({"model": "blip"}, "--model blip: wanted combiner, sum, blip_tdm or qformer; meant blip_tdm"),
        ({"beta": "hard"}, "--beta hard"),
        ({"reversed_text": "words"}, "--reversed_text words"),
        ({"steps": -5}, "--steps -5: wanted 0 or more"),
        ({"tau": -0.01}, "--tau -0.01: wanted 0.0001 or more"),
        ({"log_every": 0}, "--log_every 0: wanted 1 or more"),
        ({"combiner_dropout": 1.0}, "--combiner_dropout 1.0: wanted less than 1"),
        ({"flip": 1.5}, "--flip 1.5: wanted 0 to 1"),
        ({"crop_scale": "0.5,1.2"}, "--crop_scale 0.5,1.2: wanted 0 to 1 each"),
        ({"betas": "0.9,1.0"}, "--betas 0.9,1.0: wanted less than 1 each"),
        ({"dtype": "fp16"}, "--dtype fp16: nothing here scales the loss"),
    ):
        with pytest.raises(UserError, match=words):
            train(arguments(world, zoo, tmp_path, **{"model": "combiner"} | flags))
    with pytest.raises(UserError, match="--first_token"):
        train(arguments(world, zoo, tmp_path, first_token="dec"))
    root = shutil.copytree(world / "cirr", tmp_path / "cirr")
    records = read_json(root / "captions" / "cap.rc2.val.json")
    hidden = [{key: r[key] for key in r if not key.startswith("target")} for r in records]
    write_json(root / "captions" / "cap.rc2.test1.json", hidden)
    shutil.copy(root / "image_splits" / "split.rc2.val.json", root / "image_splits" / "split.rc2.test1.json")
    with pytest.raises(UserError, match="--val_split test1: its targets are hidden"):
        train(arguments(world, zoo, tmp_path, "combiner", root=root, images=world / "img_raw", val_split="test1"))
    pairs = world / "pseudo.jsonl"
    with pytest.raises(UserError, match="of --dataset jsonl a file, or held, with --hold_out N"):
        train(arguments(world, zoo, tmp_path, dataset="jsonl", root=pairs, images=world / "aux", val_split="val"))


def test_a_checkpoint_knows_what_it_stands_on(world, zoo, tmp_path, capsys):
    """Its file holds trained weights alone: other frozen ones behind the same name would be another model."""
    shutil.copytree(zoo / "clip", tmp_path / "clip")
    same = arguments(world, zoo, tmp_path / "run", "combiner", backbone=tmp_path / "clip", steps=1)
    train(same)
    train_cir.load_cir(str(tmp_path / "run"))
    capsys.readouterr()
    train(same)
    assert "is finished (1 steps)" in capsys.readouterr().out and len(log_of(tmp_path / "run")) == 1
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    weights["visual_projection.weight"][0, 0] += 1e-3
    save_file(weights, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="other frozen weights than .*clip holds now"):
        train_cir.load_cir(str(tmp_path / "run"))
    with pytest.raises(UserError, match="FROZEN_SHA256"):
        train(same)


def test_views_are_the_same_images_encoded_once(world, zoo, tmp_path, monkeypatch):
    same = {"augment": False, "steps": 2}
    train(arguments(world, zoo, tmp_path / "fresh", **same))
    train(arguments(world, zoo, tmp_path / "cached", **same, views=1))
    for a, b in zip(log_of(tmp_path / "fresh"), log_of(tmp_path / "cached"), strict=True):
        assert a["tcc"] == pytest.approx(b["tcc"], rel=1e-4) and a["tdm"] == pytest.approx(b["tdm"], rel=1e-4)
    opened = []
    there = ImageStore.open
    monkeypatch.setattr(ImageStore, "open", lambda self, name, *then: opened.append(name) or there(self, name, *then))
    train(arguments(world, zoo, tmp_path / "views", views=3))
    assert len(opened) == 3 * len(set(opened)) and len(set(opened)) <= 22


def test_views_are_dealt_over_the_ranks(world, zoo, tmp_path, monkeypatch):
    """Each rank encodes its share of the views and has them all: no more pictures are opened, the weights are equal."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, **_: torch.optim.SGD(groups, lr=lr))
    flags = {"views": 3, "steps": 2, "lr": 0.1}
    train(arguments(world, zoo, tmp_path / "one", "combiner", **flags))

    def two() -> list[str]:
        opened, there = [], ImageStore.open
        ImageStore.open = lambda self, name, *more: opened.append(name) or there(self, name, *more)
        train(arguments(world, zoo, tmp_path / "two", "combiner", batch=3, **flags))
        return opened

    first, second = ranks.run_ranks(2, two)
    images = set(first + second)
    assert sorted(first + second) == sorted([*images] * 3) and abs(len(first) - len(second)) <= 3
    one, both = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], both[name], atol=5e-6, rtol=1e-4)


def test_a_picture_that_one_rank_cannot_read_stops_all(world, zoo, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    for path in sorted(path for path in (tmp_path / "world" / "img_raw").rglob("*") if path.is_file()):
        path.write_bytes(path.read_bytes()[:100])  # of a benchmark: one's own would be left out at the start
    flags = arguments(tmp_path / "world", zoo, tmp_path / "out", "combiner", batch=3, pseudo="")
    with pytest.raises(RuntimeError) as fault:
        ranks.run_ranks(2, train, flags)
    said = [line for line in str(fault.value).splitlines() if "UserError: " in line]
    assert len(said) == 2 and said[0] == said[1] and "img_raw" in said[0]


def test_the_best_measured_step_is_saved(world, zoo, tmp_path, monkeypatch):
    scores, seen = iter([3.0, 9.0, 5.0]), []

    def evaluate(model, *_, **__):
        seen.append(train_cir.get_trained(model))
        return {"R@1": next(scores), "R@5": 1.0, "R@10": 2.0}

    monkeypatch.setattr(validation, "evaluate", evaluate)
    more = {"learn_tau": True, "log_every": 1}
    train(arguments(world, zoo, tmp_path, "combiner", steps=5, val_split="val", val_every=2, **more))
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], seen[1][name]) for name in saved)
    config, taus = read_json(tmp_path / "config.json"), [r["tau"] for r in log_of(tmp_path) if "tau" in r]
    assert config["step"] == 4 and config["tau"] == taus[3] != taus[4]
    assert [(r["step"], r["score"]) for r in log_of(tmp_path) if "val" in r] == [(2, 2.0), (4, 4.0), (5, 8 / 3)]


def test_a_loss_that_is_not_finite_stops_before_the_step(world, zoo, tmp_path, monkeypatch):
    real, factors = train_cir.l_tcc_ranks, iter([1.0, 1.0, math.nan])
    monkeypatch.setattr(train_cir, "l_tcc_ranks", lambda *given, **more: real(*given, **more) * next(factors))
    with pytest.raises(UserError, match="not finite at step 3"):
        train(arguments(world, zoo, tmp_path, save_every=1))
    assert sorted(p.name for p in (tmp_path / "last").glob("step-*")) == ["step-1", "step-2"]
    assert not (tmp_path / "model.safetensors").exists()
    bad = log_of(tmp_path)[-1]
    assert bad["step"] == 3 and len(bad["items"]) == 12


def test_missing_images_stop_and_check_reports(world, zoo, tmp_path, capsys):
    pairs = [{"reference": "3-000.png", "target": "gone.png", "delta": "x"}] * 6
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    with pytest.raises(UserError, match="gone.png"):
        train(arguments(world, zoo, tmp_path / "out", pseudo=tmp_path / "bad.jsonl"))
    with pytest.raises(UserError, match="images missing"):
        train([*arguments(world, zoo, tmp_path / "out", pseudo=tmp_path / "bad.jsonl"), "--check"])
    assert "auxiliary: 6 triplets; images: 2 expected, 1 present" in capsys.readouterr().out
    (lost,) = (tmp_path / "out/missing.txt").read_text().splitlines()
    assert "'gone.png' not found" in lost
    train([*arguments(world, zoo, tmp_path / "out", val_split="val"), "--check"])
    assert "cirr val: 6 queries; images: " in capsys.readouterr().out and not (tmp_path / "out/missing.txt").exists()
    train([*arguments(world, zoo, tmp_path / "none"), "--check"])
    assert "human: 24 triplets" in capsys.readouterr().out and not (tmp_path / "none").exists()
    items = [Item((1, "3-000.png"), (1, "3-001.png"), (("x",),))] * 1999
    items += [Item((1, "3-000.png"), (1, "gone.png"), (("x",),))]
    store = ImageStore(str(world / "aux"))
    assert len(drop_missing(items, lambda item: (item.reference[1], item.target[1]), store, "auxiliary")) == 1999
    assert "left out" in capsys.readouterr().out


def test_check_names_a_wrong_model(world, zoo, tmp_path):
    for more, words in (
        ({"model": "Combiner"}, "--model Combiner: wanted .*; meant combiner"),
        ({"backbone": tmp_path}, "--backbone .*: no config.json"),
    ):
        with pytest.raises(UserError, match=words):
            train([*arguments(world, zoo, tmp_path / "out", **more), "--check"])


def test_nothing_to_learn_stops_and_blank_texts_are_left_out(world, zoo, tmp_path, capsys):
    """One triplet a step, or one target for all, has no negative: a loss of zero is no training."""
    with pytest.raises(UserError, match="no negative .* raise --batch"):
        train(arguments(world, zoo, tmp_path / "out", "sum", batch=1, pseudo=""))
    train(arguments(world, zoo, tmp_path / "bank", "sum", batch=1, pseudo="", steps=1, bank=True))
    assert log_of(tmp_path / "bank")[0]["loss"] > 0
    names = [f"3-00{i}.png" for i in range(6)]
    records = [{"reference": name, "target": "3-009.png", "delta": "make it red"} for name in names]
    own = {"dataset": "jsonl", "root": tmp_path / "own.jsonl", "images": world / "aux", "pseudo": "", "batch": 2}

    def run() -> None:
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        train(arguments(world, zoo, tmp_path / "own", "sum", **own, steps=1))

    with pytest.raises(UserError, match="every step has one target"):
        run()
    records[0]["target"], records[1]["delta"] = "3-008.png", " "
    run()
    assert "own.jsonl: 1 of 6 triplets have no text and are left out" in capsys.readouterr().out
    items = human_source("jsonl", str(tmp_path / "own.jsonl"), "", str(world / "aux")).items
    assert [item.reference[1] for item in items] == [names[0], *names[2:]]
    for record in records:
        record["delta"] = ""
    with pytest.raises(UserError, match="holds no triplet to train on"):
        run()


@pytest.mark.parametrize("model", ["combiner", "blip_tdm"])
def test_it_learns_a_handful_of_triplets(world, zoo, tmp_path, model):
    train(arguments(world, zoo, tmp_path, model, steps=40, views=1, augment=False, pseudo="", lr=3e-3, batch=12))
    losses = [r["tcc"] for r in log_of(tmp_path)]
    assert np.mean(losses[-4:]) < 0.6 * losses[0]
