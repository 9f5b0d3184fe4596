"""BLIP-2's Q-Former as a retriever: forwards against Hugging Face's modules, the loss and the ranks by brute force."""

import copy
import json

import pytest
import torch
import transformers
from ranks import run_ranks
from test_field import run_flags, trained

import eval_cir
import search
import train_cir
from common import cir_model
from common.annotations import read_cirr
from common.console import UserError
from common.encoding import Compute
from common.files import read_json, read_jsonl
from common.pseudo import subgroup_ranks
from common.qformer import through_qformer
from kernels.contrastive import l_tcc
from kernels.max_similarity import l_tcc_max_ranks, max_scores

TEXTS = ["a red hat", "dog", "make it two dogs, not a hat"]


@pytest.fixture(scope="module")
def blip2(zoo, tmp_path_factory):
    """A tiny random BLIP-2 of image-text retrieval as an ordinary folder: 5 query tokens, 12-wide features."""
    folder = tmp_path_factory.mktemp("models") / "blip2"
    words = (zoo / "blip/vocab.txt").read_text()
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.1}
    vision = sizes | {"hidden_size": 32, "intermediate_size": 48, "image_size": 28, "patch_size": 14}
    text = sizes | {"hidden_size": 24, "intermediate_size": 40, "vocab_size": len(words.splitlines()) + 1}
    text |= {"max_position_embeddings": 40, "use_qformer_text_input": True}
    llm = {"model_type": "opt", "vocab_size": 9, "word_embed_proj_dim": 8, "hidden_size": 8, "ffn_dim": 8}
    llm |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    both = {
        "vision_config": vision,
        "qformer_config": text,
        "text_config": llm | {"vocab_size": 9, "word_embed_proj_dim": 8},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        config = transformers.Blip2Config(**both, num_query_tokens=5, image_text_hidden_size=12)
        model = transformers.Blip2ForImageTextRetrieval(config)
        model.query_tokens.data.normal_()
        for part in (model.qformer, model.embeddings, model.vision_projection, model.text_projection):
            for p in part.parameters():
                p.data.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text(words)
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        record = json.loads((zoo / "blip" / name).read_text())
        record |= {"size": {"height": 28, "width": 28}} if "size" in record else {}
        (folder / name).write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def theirs(blip2):
    return transformers.Blip2ForImageTextRetrieval.from_pretrained(blip2).eval()


def pixels_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.manual_seed(seed))


# ---- forwards ----
@torch.no_grad()
def test_gallery_features_are_hugging_faces(blip2, theirs):
    model, words = train_cir.build_cir("qformer", str(blip2)).eval(), transformers.BertTokenizer.from_pretrained(blip2)
    pixels = pixels_of(3)
    given = words(TEXTS, padding=True, return_tensors="pt")
    given = {"input_ids": given.input_ids, "attention_mask": given.attention_mask}
    hf = theirs(pixel_values=pixels, **given, use_image_text_matching_head=False)
    tokens, target = model.image(pixels)
    assert target.shape == (3, 5, 12) and model.vectors == 5
    torch.testing.assert_close(target, hf.image_embeds, atol=1e-5, rtol=0)
    scores = max_scores(target, hf.text_embeds)  # BLIP-2's own score of a text: the best of the query tokens
    torch.testing.assert_close(scores.T, hf.logits_per_image, atol=1e-5, rtol=0)
    assert (target.std(1) > 1e-3).any()  # the vectors of a picture differ


@torch.no_grad()
def test_queries_are_hugging_faces_modules_one_text_at_a_time(blip2, theirs):
    """SPRC's two passes: the first by Blip2QFormerModel itself, the second by it without its cross-attention."""
    model, words = train_cir.build_cir("qformer", str(blip2)).eval(), transformers.BertTokenizer.from_pretrained(blip2)
    alone = copy.deepcopy(theirs.qformer)
    for layer in alone.encoder.layer:
        layer.has_cross_attention = False
    pixels = pixels_of(3, 1)
    patches, wanted = theirs.vision_model(pixels).last_hidden_state, []
    seen = torch.ones(1, patches.shape[1], dtype=torch.long)
    for i, text in enumerate(TEXTS):
        embedded = theirs.embeddings(input_ids=words(text, return_tensors="pt").input_ids)
        both = torch.cat([theirs.query_tokens, embedded], dim=1)
        mask = torch.ones(both.shape[:2], dtype=torch.long)
        how = {"query_length": 5, "attention_mask": mask}
        image = {"encoder_hidden_states": patches[i : i + 1], "encoder_attention_mask": seen}
        first = theirs.qformer(query_embeds=both, **how, **image).last_hidden_state
        ours = through_qformer(model.backbone.qformer, both, 5, mask, patches[i : i + 1])
        torch.testing.assert_close(ours, first, atol=1e-5, rtol=0)
        again = alone(query_embeds=torch.cat([first[:, :5], embedded], dim=1), **how).last_hidden_state
        wanted.append(torch.nn.functional.normalize(theirs.text_projection(again[:, 5]), dim=1))
    found = model.compose(model.tokens(pixels), TEXTS)  # three texts at once, padded
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-5, rtol=0)
    swapped = model.compose(model.tokens(pixels.flip(0)), TEXTS)
    assert (swapped[0] - found[0]).abs().max() > 1e-3  # the reference is seen


# ---- the loss ----
def brute_loss(x, c, tau: float, human: int, beta: float) -> torch.Tensor:
    """Eq. 2 in float64, anchor by anchor; x (N, Q, D)."""
    s = torch.stack([torch.stack([(x[i] @ c[j]).max() for j in range(len(c))]) for i in range(len(x))]) / tau
    total = 0.0
    for n in sorted({human, len(x)} - {0}):
        for matrix in (s[:n, :n], s[:n, :n].T):
            for i in range(n):
                others = torch.cat([matrix[i, :i], matrix[i, i + 1 :]])
                weights = (n - 1) * (beta * others).softmax(0)
                hard = (weights * others.exp()).sum()
                total = total - torch.log(matrix[i, i].exp() / (matrix[i, i].exp() + hard)) / n
    return total


@pytest.mark.parametrize("human, beta", [(0, 0.0), (4, 0.5), (7, 0.5)])
def test_the_loss_is_that_of_the_definition(human, beta):
    normal, draw = torch.nn.functional.normalize, torch.Generator().manual_seed(0)
    x = normal(torch.randn(7, 5, 6, generator=draw), dim=-1)
    c, tau = normal(torch.randn(7, 6, generator=draw), dim=-1).requires_grad_(), torch.tensor(0.3, requires_grad=True)
    loss = l_tcc_max_ranks(x, c, human, tau, 1.0, beta)
    loss.backward()
    c64, tau64 = c.detach().double().requires_grad_(), tau.detach().double().requires_grad_()
    wanted = brute_loss(x.double(), c64, tau64, human, beta)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(c.grad.double(), c64.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tau.grad.double(), tau64.grad, rtol=1e-4, atol=1e-5)
    one = l_tcc_max_ranks(x[:, :1], c.detach(), human, 0.3, 1.0, beta)
    assert one.item() == pytest.approx(l_tcc(x[:, 0], c.detach(), human, 0.3, 1.0, beta).item(), rel=1e-5)


def test_two_ranks_share_the_loss():
    normal, draw = torch.nn.functional.normalize, torch.Generator().manual_seed(0)
    x = normal(torch.randn(7, 5, 6, generator=draw), dim=-1)
    c = normal(torch.randn(7, 6, generator=draw), dim=-1)
    parts = [[0, 1, 4], [2, 3, 5, 6]]  # rows 0 to 3 are human

    def share() -> tuple:
        rank, size = (torch.distributed.get_rank(), 2) if torch.distributed.is_initialized() else (0, 1)
        rows = parts[rank] if size == 2 else list(range(7))
        own, tau = c[rows].clone().requires_grad_(), torch.tensor(0.3, requires_grad=True)
        loss = l_tcc_max_ranks(x[rows], own, sum(row < 4 for row in rows), tau, 1.0, 0.5)
        loss.backward()
        return loss.item(), own.grad.tolist(), tau.grad.item()

    alone, shares = share(), run_ranks(2, share)
    assert sum(part[0] for part in shares) == pytest.approx(alone[0], rel=1e-5)
    assert sum(part[2] for part in shares) == pytest.approx(alone[2], rel=1e-4)
    for rows, (_, grads, _) in zip(parts, shares, strict=True):
        torch.testing.assert_close(torch.tensor(grads), torch.tensor(alone[1])[rows], rtol=1e-4, atol=1e-6)


def test_what_the_loss_cannot_take_stops():
    x, c = torch.randn(3, 2, 4), torch.randn(3, 4)
    for given in ((x[:, 0], c, 0, 0.1), (x[:2], c, 0, 0.1), (x, c[:, :3], 0, 0.1), (x, c, 4, 0.1)):
        with pytest.raises(ValueError, match="wanted, found"):
            l_tcc_max_ranks(*given)
    with pytest.raises(ValueError, match="no bank"):
        l_tcc_max_ranks(x, c, 0, 0.1, bank=c)
    with pytest.raises(ValueError, match="frozen"):
        l_tcc_max_ranks(x.requires_grad_(), c, 0, 0.1)


# ---- training and evaluation ----
def test_a_trained_model_is_measured_as_by_brute_force(blip2, zoo, tmp_path, monkeypatch):
    folder = trained(monkeypatch, tmp_path, zoo, "--model", "qformer", "--backbone", blip2, "--lr", 1e-2)
    model, plain = train_cir.load_cir(str(folder)), train_cir.build_cir("qformer", str(blip2)).eval()
    names = {n for n, _ in plain.named_parameters() if n.startswith(("backbone.qformer.", "backbone.embeddings."))}
    projection = {"backbone.text_projection.weight", "backbone.text_projection.bias"}
    assert set(cir_model.get_trained(model)) == names | projection
    for p in model.parameters():
        p.requires_grad_(False)
    pixels = pixels_of(3)
    assert torch.equal(model.image(pixels)[1], plain.image(pixels)[1])  # the gallery is the frozen model's
    tokens = model.tokens(pixels)
    assert (model.compose(tokens, TEXTS) - plain.compose(tokens, TEXTS)).abs().max() > 1e-2

    root = tmp_path / "world/cirr"
    flags = ["--root", root, "--official", "false", "--show", 2, "--out", tmp_path / "out", "--checkpoint", folder]
    run_flags(monkeypatch, eval_cir, *flags)
    benchmark, lines = read_cirr(str(root), "val"), read_jsonl(tmp_path / "out/found.jsonl")
    opened = {name: model.preprocess(benchmark.images.open(name))[None] for name in benchmark.gallery}
    targets = {name: plain.target(plain.tokens(x))[0] for name, x in opened.items()}
    for line, query in zip(lines, benchmark.queries, strict=True):
        c = model.compose(model.tokens(opened[query.reference]), [query.delta])[0]
        scores = {name: max(float(c @ vector) for vector in vectors) for name, vectors in targets.items()}
        order = sorted(scores.keys() - {query.reference}, key=lambda name: -scores[name])  # noqa: B023
        assert line["rank"] == order.index(query.target) + 1 and line["top"] == order[:10]
    assert len({line["rank"] for line in lines}) > 3

    # a subgroup's ranks, which --filter asks for
    within = subgroup_ranks(model, benchmark, Compute(4))
    for rank, query in zip(within, benchmark.queries, strict=True):
        c = model.compose(model.tokens(opened[query.reference]), [query.delta])[0]
        own = [name for name in query.members if name != query.reference]
        scores = {name: max(float(c @ vector) for vector in targets[name]) for name in own}
        assert rank == sum(score >= scores[query.target] for score in scores.values())


def test_a_query_over_a_folder(blip2, zoo, tmp_path, monkeypatch, capsys):
    folder = trained(monkeypatch, tmp_path, zoo, "--model", "qformer", "--backbone", blip2)
    pictures = tmp_path / "world/img_raw/val"
    flags = ["--checkpoint", folder, "--reference", pictures / "val-0-img0.png", "--text", "a red hat"]
    run_flags(monkeypatch, eval_cir, *flags, "--gallery", pictures, "--top", 5, "--out", tmp_path / "q")
    once = [line for line in capsys.readouterr().out.splitlines() if "val-" in line and ".png" in line]
    run_flags(monkeypatch, eval_cir, *flags, "--gallery", pictures, "--top", 5, "--out", tmp_path / "q")
    again = [line for line in capsys.readouterr().out.splitlines() if "val-" in line and ".png" in line]
    assert len(once) == 5 and once == again  # the second time from the kept features, (M, Q, d)


def test_resume_and_stage_two_start_from_it(blip2, zoo, tmp_path, monkeypatch):
    flags = ["--model", "qformer", "--backbone", blip2]
    one = trained(monkeypatch, tmp_path, zoo, *flags)
    two = trained(
        monkeypatch, tmp_path, zoo, "--model", "qformer", "--start_from", one, "--train_text", "false", out="two"
    )
    first, second = (cir_model.get_trained(train_cir.load_cir(str(folder))) for folder in (one, two))
    assert set(second) == {"backbone.text_projection.weight", "backbone.text_projection.bias"} < set(first)
    loaded = train_cir.load_cir(str(two))
    for name, weight in first.items():
        if "text_projection" not in name:
            assert torch.equal(dict(loaded.named_parameters())[name], weight)


def test_what_it_cannot_do_is_refused_in_a_line(blip2, zoo, tmp_path, monkeypatch):
    flags = ["--model", "qformer", "--backbone", blip2]
    for more, words in (
        (["--bidirectional", 0.1], "qformer and --bidirectional: no direction token"),
        (["--bidirectional", 0.1, "--reversed_text", "delta"], "qformer and --bidirectional"),
        (["--bank", "true"], "qformer and --bank: its pictures have several vectors"),
        (["--text_proj_lr", 9], "--text_proj_lr is for --model sum or combiner on BLIP; qformer"),
        (["--text_length", 41], "--text_length 41: the text encoder has 40 positions"),
    ):
        with pytest.raises(UserError, match=words):
            trained(monkeypatch, tmp_path, zoo, *flags, *more)
    with pytest.raises(UserError, match="no direction token"):
        train_cir.build_cir("qformer", str(blip2), directions=True)
    with pytest.raises(UserError, match="is a clip model, wanted blip-2"):
        train_cir.build_cir("qformer", str(zoo / "clip"))
    with pytest.raises(UserError, match="is a blip-2 model, wanted clip, blip, siglip"):
        train_cir.build_cir("sum", str(blip2))
    silent = tmp_path / "silent"
    silent.mkdir()
    for file in blip2.iterdir():
        (silent / file.name).write_bytes(file.read_bytes())
    config = read_json(silent / "config.json")
    config["qformer_config"]["use_qformer_text_input"] = False
    (silent / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="Q-Former of this BLIP-2 reads no text; wanted one of image-text retrieval"):
        train_cir.build_cir("qformer", str(silent))

    folder = trained(monkeypatch, tmp_path, zoo, *flags)
    asked = ["--root", tmp_path / "world/cirr", "--official", "false", "--show", 0, "--out", tmp_path / "out"]
    with pytest.raises(UserError, match="--audit wants one vector a picture, --model qformer has 5"):
        run_flags(monkeypatch, eval_cir, *asked, "--checkpoint", folder, "--audit", "true")
    with pytest.raises(UserError, match="--reversed: --model qformer has no direction token"):
        run_flags(monkeypatch, eval_cir, *asked, "--checkpoint", folder, "--reversed", "true")
    with pytest.raises(UserError, match="--rerank wants a checkpoint of --model blip_tdm"):
        run_flags(monkeypatch, eval_cir, *asked, "--checkpoint", folder, "--rerank", 5)
    with pytest.raises(UserError, match="search.py wants one vector a picture"):
        search.load_model(str(folder), "", "cpu")
