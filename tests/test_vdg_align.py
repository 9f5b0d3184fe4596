"""Stage 1 against Hugging Face's own modules, and its run: resume, ranks, faults."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from ranks import run_ranks
from safetensors.torch import load_file
from zoo import draw

import vdg_align
from common import images, ranks
from common.annotations import Caption
from common.batches import gather_dealt
from common.console import UserError
from common.flags import override
from common.llama import answer_ids, load_llm, load_tokenizer, tokenize
from common.pretrained import copy_weights

ROOT = Path(__file__).resolve().parent.parent


def fresh(name: str, *argv: str):
    """A stage as a module of its own, with its public flags and fresh constants."""
    spec = importlib.util.spec_from_file_location(f"{name}_run", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    override(vars(module), list(argv))
    return module


def stage(name: str, *argv: str) -> None:
    """main() of a stage in this process."""
    fresh(name, *argv).main()


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def chat(folder: Path, n: int) -> None:
    """n captions of different lengths, the image before or after the instruction."""
    prompts = ["Provide a brief description of the given image.\n<image>", "<image>\nWhat is this?"]
    entries = []
    for i, name in enumerate(draw(folder / "images", n)):
        answer = "a box" + " on a table" * (i % 3)
        turns = [{"from": "human", "value": prompts[i % 2]}, {"from": "gpt", "value": answer}]
        entries.append({"id": f"item-{i}", "image": name, "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(entries))


@pytest.fixture(scope="module")
def flags(zoo, tmp_path_factory) -> list[str]:
    """10 captions, 2 epochs of 3 steps (4 + 4 + 2 items)."""
    folder = tmp_path_factory.mktemp("align")
    chat(folder, 10)
    models = ["--vision", str(zoo / "instructblip"), "--llm", str(zoo / "llama")]
    files = ["--chat", str(folder / "chat.json"), "--images", str(folder / "images")]
    return [*models, *files, "--epochs", "2", "--device", "cpu", "--workers", "0", "--save_every", "100"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """Six steps without a stop, as a process of its own."""
    out = tmp_path_factory.mktemp("whole") / "out"
    command = [sys.executable, str(ROOT / "vdg_align.py"), *flags, "--batch", "4", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def blip2(folder: Path) -> Path:
    vision = transformers.Blip2VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    qformer = transformers.Blip2QFormerConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, encoder_hidden_size=32
    )
    text = transformers.OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=16
    )
    config = transformers.Blip2Config(
        vision_config=vision.to_dict(), qformer_config=qformer.to_dict(), text_config=text.to_dict(), num_query_tokens=8
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["instructblip", "blip-2"])
def test_vision_equals_hugging_face_exactly(zoo, tmp_path, kind):
    if kind == "blip-2":
        folder, model = blip2(tmp_path / "blip2"), transformers.Blip2ForConditionalGeneration
        shutil.copy(zoo / "instructblip" / "preprocessor_config.json", folder)
    else:
        folder, model = zoo / "instructblip", transformers.InstructBlipForConditionalGeneration
    theirs = model.from_pretrained(folder, dtype=torch.float32).eval()
    ours = vdg_align.VisionProjector(str(folder), theirs.config.text_config.hidden_size)
    ours.projection.load_state_dict(theirs.language_projection.state_dict())
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        patches = theirs.vision_model(pixel_values=pixels).last_hidden_state
        prompt = {"input_ids": None} if kind == "instructblip" else {}
        start = theirs.query_tokens.expand(3, -1, -1)
        queries = theirs.qformer(query_embeds=start, encoder_hidden_states=patches, **prompt).last_hidden_state
        assert torch.equal(ours.queries(pixels), queries)
        assert torch.equal(ours(queries), theirs.language_projection(queries))
    assert queries.std(dim=1).min() > 0.01  # the learned queries differ, so the comparison says something
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == ["projection.weight", "projection.bias"]


@pytest.mark.parametrize("kind", ["instructblip", "blip-2"])
def test_the_q_former_stays_in_fp32_behind_a_bf16_vit(zoo, tmp_path, kind):
    """As transformers keeps BLIP-2's beside an fp16 ViT (but not beside a bf16 one)."""
    folder, model = zoo / "instructblip", transformers.InstructBlipForConditionalGeneration
    if kind == "blip-2":
        folder, model = blip2(tmp_path / "blip2"), transformers.Blip2ForConditionalGeneration
        shutil.copy(zoo / "instructblip" / "preprocessor_config.json", folder)
    exact, theirs = (model.from_pretrained(folder, dtype=dtype).eval() for dtype in (torch.float32, torch.bfloat16))
    ours = vdg_align.VisionProjector(str(folder), 64, dtype=torch.bfloat16)
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    prompt = {"input_ids": None} if kind == "instructblip" else {}

    def queries_of(start, qformer, patches):
        start = start.expand(3, -1, -1).to(qformer.dtype)
        return qformer(query_embeds=start, encoder_hidden_states=patches, **prompt).last_hidden_state

    with torch.no_grad():
        patches = theirs.vision_model(pixel_values=pixels.bfloat16()).last_hidden_state.float()
        rounded = queries_of(exact.query_tokens, exact.qformer, patches).bfloat16()
        truth = queries_of(exact.query_tokens, exact.qformer, exact.vision_model(pixel_values=pixels).last_hidden_state)
        queries = ours.queries(pixels)
    assert torch.equal(queries, rounded), "an fp32 Q-Former, then one rounding"
    assert torch.cosine_similarity(queries.float(), truth, dim=-1).min() > 0.999


def test_the_language_model_inside_is_not_read(zoo, tmp_path):
    folder = tmp_path / "vision"
    shutil.copytree(zoo / "instructblip", folder)
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in shards.items() if name.startswith(("vision_model.", "qformer.", "query_tokens"))}
    others = set(shards.values()) - needed
    for file in others:
        (folder / file).unlink()
    vdg_align.VisionProjector(str(folder), 64)
    assert others
    (folder / max(needed)).write_bytes(b"\x08")
    with pytest.raises(UserError, match="damaged"):
        vdg_align.VisionProjector(str(folder), 64)
    (folder / max(needed)).unlink()
    with pytest.raises(UserError, match="is missing"):
        vdg_align.VisionProjector(str(folder), 64)


def test_vision_weights_are_strict(zoo, tmp_path):
    folder = tmp_path / "vision"
    shutil.copytree(zoo / "instructblip", folder)
    config = json.loads((folder / "config.json").read_text())
    config["qformer_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="not in the files, first qformer.encoder.layer.2"):
        vdg_align.VisionProjector(str(folder), 64)
    with pytest.raises(UserError, match="a llama model; wanted instructblip"):
        vdg_align.VisionProjector(str(zoo / "llama"), 64)


def test_llm_equals_from_pretrained(zoo, tmp_path):
    ids = torch.arange(10)[None]
    for dtype in (torch.float32, torch.bfloat16):
        llm, tokenizer = load_llm(str(zoo / "llama"), dtype, "cpu")
        theirs = transformers.LlamaForCausalLM.from_pretrained(zoo / "llama", dtype=dtype).eval()
        with torch.no_grad():
            assert torch.equal(llm(ids).logits, theirs(ids).logits)
        assert not any(p.requires_grad for p in llm.parameters()) and tokenizer.eos_token_id == 2
    config = transformers.LlamaConfig.from_pretrained(zoo / "llama", tie_word_embeddings=True)
    tied = transformers.LlamaForCausalLM(config).eval()
    tied.save_pretrained(tmp_path / "tied", max_shard_size="40KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(zoo / "llama" / file, tmp_path / "tied")
    llm, _ = load_llm(str(tmp_path / "tied"), torch.float32, "cpu")
    with torch.no_grad():
        assert torch.equal(llm(ids).logits, tied(ids).logits)
    (tmp_path / "tied" / "tokenizer.json").rename(tmp_path / "tied" / "tokenizer.model")
    with pytest.raises(UserError, match="no tokenizer.json"):
        load_llm(str(tmp_path / "tied"), torch.float32, "cpu")
    with pytest.raises(UserError, match="no such folder"):
        load_llm(str(tmp_path / "absent"), torch.float32, "cpu")


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantised_llm_is_close_and_passes_gradients(zoo, quantize):
    pytest.importorskip("bitsandbytes")
    plain, tokenizer = load_llm(str(zoo / "llama"), torch.float32, "cpu")
    llm, _ = load_llm(str(zoo / "llama"), torch.float32, "cpu", quantize)
    assert type(llm.model.layers[0].self_attn.q_proj) is not torch.nn.Linear
    results = []
    for model in (plain, llm):
        image = torch.full((4, 64), 0.01, requires_grad=True)
        row, answer = [[1], image], answer_ids(tokenizer, "a red hat")
        batch = vdg_align.pack(model.get_input_embeddings(), [row], [answer])
        loss = vdg_align.caption_loss(model, batch, len(answer))
        loss.backward()
        results.append((loss.item(), image.grad))
    assert abs(results[0][0] - results[1][0]) < 0.05 * results[0][0]
    assert torch.nn.functional.cosine_similarity(results[0][1].flatten(), results[1][1].flatten(), dim=0) > 0.9


def pair(zoo):
    """LLM, tokenizer, projector, captions and pixels of a small batch with rows of different length."""
    llm, tokenizer = load_llm(str(zoo / "llama"), torch.float32, "cpu")
    torch.manual_seed(3)
    vision = vdg_align.VisionProjector(str(zoo / "instructblip"), 64)
    captions = [
        Caption("a", "Describe it.", "a red hat", True, "0"),
        Caption("b", "Provide a brief description.", "two cats on the table in a room", False, "1"),
        Caption("c", "Describe it.", "x", False, "2"),
    ]
    return llm, tokenizer, vision, captions, torch.randn(3, 3, 28, 28)


def ours(llm, tokenizer, vision, captions, pixels, tokens=None):
    answers = [answer_ids(tokenizer, c.text) for c in captions]
    images = vision(vision.queries(pixels))
    rows = [vdg_align.caption_row(tokenizer, c, image) for c, image in zip(captions, images, strict=True)]
    batch = vdg_align.pack(llm.get_input_embeddings(), rows, answers)
    return vdg_align.caption_loss(llm, batch, tokens or sum(map(len, answers))), batch


def test_loss_and_gradients_equal_hugging_face(zoo):
    llm, tokenizer, vision, captions, pixels = pair(zoo)
    loss, _ = ours(llm, tokenizer, vision, captions, pixels)
    loss.backward()
    got = [p.grad.clone() for p in vision.projection.parameters()]

    hf = transformers.InstructBlipForConditionalGeneration.from_pretrained(zoo / "instructblip").eval()
    lm = transformers.LlamaForCausalLM.from_pretrained(zoo / "llama", dtype=torch.float32).eval()
    linear = torch.nn.Linear(24, 64)
    linear.load_state_dict(vision.projection.state_dict())
    with torch.no_grad():
        patches = hf.vision_model(pixel_values=pixels).last_hidden_state
        queries = hf.qformer(None, query_embeds=hf.query_tokens.expand(3, -1, -1), encoder_hidden_states=patches)
    images, embed = linear(queries.last_hidden_state), lm.get_input_embeddings()

    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    embeddings, labels = [], []
    for c, image in zip(captions, images, strict=True):
        answer = [*ids(c.text), 2]
        before = [1] if c.image_first else [1, *ids(c.prompt + "\n")]
        after = ids(f"\n{c.prompt}\n") if c.image_first else ids("\n")
        embeddings.append(torch.cat([embed(torch.tensor(before)), image, embed(torch.tensor([*after, *answer]))]))
        labels.append(torch.tensor([-100] * (len(before) + 32 + len(after)) + answer))
    x = torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(e)) for e in embeddings], batch_first=True)
    theirs = lm(inputs_embeds=x, attention_mask=mask, labels=labels).loss
    theirs.backward()
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(got, linear.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-5, atol=1e-6)


def test_only_the_caption_and_its_end_are_supervised(zoo):
    llm, tokenizer, vision, captions, pixels = pair(zoo)
    _, batch = ours(llm, tokenizer, vision, captions, pixels)
    labels = batch.labels.tolist()
    for slots, caption in zip(batch.slots, captions, strict=True):
        row = list(dict.fromkeys(slots.tolist()))  # less what fills the end
        answer = answer_ids(tokenizer, caption.text)
        assert labels[: len(answer)] == answer and tokenizer.decode(answer[:-1]) == caption.text
        at = [row.index(i) for i in batch.predict[: len(answer)].tolist()]
        assert at == list(range(len(row) - len(answer) - 1, len(row) - 1))
        labels, batch = labels[len(answer) :], batch._replace(predict=batch.predict[len(answer) :])
    assert not labels


@pytest.mark.parametrize("heads", [4, 2])
def test_layers_equal_hugging_face(zoo, heads):
    """Hidden states of padded rows by LlamaModel.forward; also with two queries to a key."""
    config = transformers.LlamaConfig.from_pretrained(zoo / "llama", num_key_value_heads=heads)
    torch.manual_seed(0)
    llm = transformers.LlamaForCausalLM(config).eval()
    rows = [[1, *range(5, 5 + n)] for n in (3, 17, 9)]
    pieces, answers = [[row[:2]] for row in rows], [row[2:] for row in rows]
    batch = vdg_align.pack(llm.get_input_embeddings(), pieces, answers, share=False)
    assert len(batch.embeddings) == sum(map(len, rows))
    ids, mask = torch.zeros(3, 18, dtype=torch.long), torch.zeros(3, 18, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    with torch.no_grad():
        wanted = llm(ids, attention_mask=mask, labels=labels).loss
        found = vdg_align.caption_loss(llm, batch, len(batch.labels))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        alone = [
            vdg_align.caption_loss(llm, vdg_align.pack(llm.get_input_embeddings(), [[row[:2]]], [row[2:]]), 1)
            for row in rows
        ]
        torch.testing.assert_close(sum(alone) / len(batch.labels), wanted, rtol=1e-6, atol=1e-6)


def test_a_tree_of_shared_beginnings_changes_neither_loss_nor_gradients(zoo):
    """Rows that begin with the same instruction and some with the same image: fewer tokens, everything else equal."""
    llm, tokenizer = load_llm(str(zoo / "llama"), torch.float32, "cpu")
    start, tail = [1, *tokenize(tokenizer, "Describe it.")], tokenize(tokenizer, "Response:")
    answers = [answer_ids(tokenizer, text) for text in ("a red hat", "x", "two cats on it", "two cats on it")]
    results = []
    for share, checkpoint in ((False, False), (True, False), (False, True), (True, True)):
        images = torch.randn(5, 6, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        first, second, *targets = images.unbind()
        pairs = [(first, targets[0]), (second, targets[1]), (first, targets[2]), (first, targets[2])]
        rows = [[start, a, tail, b, tail] for a, b in pairs]
        batch = vdg_align.pack(llm.get_input_embeddings(), rows, answers, share)
        vdg_align.caption_loss(llm, batch, 7, checkpoint).backward()
        results.append((vdg_align.caption_loss(llm, batch, 7), images.grad, len(batch.embeddings)))
    own = sum(len(tail) * 2 + 12 + len(start) + len(answer) for answer in answers)
    saved = 3 * len(start) + 2 * 6 + 2 * len(tail) + (6 + len(tail) + len(answers[3]))  # the last two rows are the same
    assert [size for _, _, size in results] == [own, own - saved] * 2
    for loss, gradient, _ in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-5, atol=1e-7)


def test_a_longer_row_in_the_batch_changes_nothing(zoo):
    llm, tokenizer, vision, captions, pixels = pair(zoo)
    alone = [ours(llm, tokenizer, vision, [c], p[None], 1)[0] for c, p in zip(captions, pixels, strict=True)]
    together, _ = ours(llm, tokenizer, vision, captions, pixels, 1)
    torch.testing.assert_close(sum(alone), together, rtol=1e-6, atol=0)


def test_an_end_token_written_in_a_caption_is_text(zoo):
    tokenizer = load_tokenizer(str(zoo / "llama"))
    ids = answer_ids(tokenizer, "a </s> b <s>")
    assert ids.count(2) == 1 and ids[-1] == 2 and 1 not in ids and tokenizer.decode(ids[:-1]) == "a </s> b <s>"
    with pytest.raises(UserError, match="at least one supervised token"):
        answer_ids(tokenizer, "  ")


def test_resume_is_step_exact(whole, flags, tmp_path, monkeypatch, capsys):
    argv = [*flags, "--batch", "4", "--out", str(tmp_path / "out")]
    asked = iter([False, False, True])
    monkeypatch.setattr(ranks, "stop_requested", lambda: next(asked))  # a SIGTERM in the third step
    with pytest.raises(SystemExit) as stopped:
        stage("vdg_align", *argv)
    assert stopped.value.code == 143 and not (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr(ranks, "stop_requested", lambda: False)
    stage("vdg_align", *argv)
    a, b = (load_file(folder / "projection.safetensors") for folder in (whole, tmp_path / "out"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [r["loss"] for r in records(whole)] == [r["loss"] for r in records(tmp_path / "out")]
    assert [r["step"] for r in records(whole)] == [1, 2, 3, 4, 5, 6]
    capsys.readouterr()
    stage("vdg_align", *argv)
    assert "is finished (6 steps)" in capsys.readouterr().out
    with pytest.raises(UserError, match="LR: 0.001 there, 0.5 now"):
        stage("vdg_align", *argv, "--lr", "0.5")


def same_run(found, wanted) -> None:
    """Weights of the same steps in fp32 sums of another order.

    Adam divides by the gradient's own size: an entry of 1e-7 moves its weight as far as any (lr 1e-3), by rounding. So
    all together are equal to 2e-4, and a single one to 5 % of a step."""
    for name in wanted:
        difference = found[name] - wanted[name]
        assert difference.norm() < 2e-4 * wanted[name].norm() and difference.abs().max() < 5e-5


def test_images_encoded_once_give_the_same_run(whole, flags, tmp_path, monkeypatch, capsys):
    module = fresh("vdg_align", *flags, "--batch", "4", "--keep", "true", "--out", str(tmp_path / "kept"))
    shown, queries = [], module.VisionProjector.queries
    monkeypatch.setattr(
        module.VisionProjector, "queries", lambda self, pixels: shown.append(len(pixels)) or queries(self, pixels)
    )
    module.main()
    assert sum(shown) == 10  # 20 without: two epochs of ten images
    assert "GiB  Q-Former outputs of 10 images, in host memory" in capsys.readouterr().out
    same_run(*(load_file(folder / "projection.safetensors") for folder in (tmp_path / "kept", whole)))


def test_two_ranks_and_accumulation_equal_one_rank(whole, flags, tmp_path):
    run_ranks(2, stage, "vdg_align", *flags, "--batch", "2", "--out", str(tmp_path / "ranks"))
    stage("vdg_align", *flags, "--batch", "1", "--accumulate", "4", "--out", str(tmp_path / "parts"))
    one = load_file(whole / "projection.safetensors")
    for folder in (tmp_path / "ranks", tmp_path / "parts"):
        same_run(load_file(folder / "projection.safetensors"), one)
        for a, b in zip(records(whole), records(folder), strict=True):
            assert abs(a["loss"] - b["loss"]) < 1e-5


def test_a_loss_that_is_not_finite_stops_before_the_step(flags, tmp_path, monkeypatch):
    normalise, calls = images.Preprocess.normalise, []

    def poisoned(preprocess, pictures):
        calls.append(pictures)
        pixels = normalise(preprocess, pictures)
        return pixels * float("nan") if len(calls) == 3 else pixels

    monkeypatch.setattr(images.Preprocess, "normalise", poisoned)
    argv = [*flags, "--batch", "4", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="not finite at step 3"):
        stage("vdg_align", *argv, "--save_every", "1")
    *good, bad = records(tmp_path / "out")
    assert [r["step"] for r in good] == [1, 2] and bad["step"] == 3 and bad["items"][0].startswith("item-")
    assert sorted(p.name for p in (tmp_path / "out" / "last").glob("step-*")) == ["step-1", "step-2"]


def test_the_projection_starts_alike_on_every_device_and_rank():
    """The draw is the seed's, whatever was drawn before it; rank 0's values are everyone's."""
    drawn = []
    for before in (0, 1000):  # on a GPU the vision side's draws are another generator's
        torch.rand(before)
        projection = torch.nn.Linear(24, 64)
        vdg_align.start_quietly(projection, 0.1, seed=5)
        drawn.append(projection.weight.detach().clone())
    assert torch.equal(*drawn) and not projection.bias.any()
    assert abs(drawn[0].std() / (0.1 / 24**0.5) - 1) < 0.1
    vdg_align.start_quietly(projection, 0.1, seed=6)
    assert not torch.equal(projection.weight, drawn[0])

    def start(rank_seed: int = 7):
        world = ranks.init_world("cpu")
        torch.manual_seed(rank_seed + world.rank)
        weights = list(torch.nn.Linear(3, 2).parameters())
        vdg_align.share_start(weights, world)
        return [weight.detach() for weight in weights]

    torch.manual_seed(7)
    wanted = list(torch.nn.Linear(3, 2).parameters())
    for found in run_ranks(2, start):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_weights_are_copied_by_the_same_names_and_shapes_alone():
    own = {"a": torch.zeros(2, 3), "b": torch.nn.Parameter(torch.zeros(4))}
    good = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    wrong = {
        "first b is missing": {"a": good["a"]},
        "first c is one too many": good | {"c": torch.ones(1)},
        r"first a is \(3, 2\), want \(2, 3\)": good | {"a": torch.ones(3, 2)},
    }
    for text, tensors in wrong.items():
        with pytest.raises(UserError, match=f"^file: weights do not fit the model, {text}$"):
            copy_weights(own, tensors, "file")
        assert not own["a"].any() and not own["b"].any()
    copy_weights(own, good, "file")
    assert own["a"].all() and own["b"].all()


def test_results_of_dealt_items_come_back_in_order():
    def deal(n: int):
        world = ranks.init_world("cpu")
        return gather_dealt(list(range(n))[world.rank :: world.size])

    for n in (0, 1, 2, 7):
        assert run_ranks(3, deal, n) == [list(range(n))] * 3


def test_data_is_checked_at_the_start(flags, tmp_path, capsys):
    stage("vdg_align", *flags, "--check")
    assert "10 expected, 10 present" in capsys.readouterr().out
    chat(tmp_path, 4)
    argv = [*flags, "--chat", str(tmp_path / "chat.json"), "--images", str(tmp_path / "images")]
    entries = json.loads((tmp_path / "chat.json").read_text())
    (tmp_path / "images" / entries[2]["image"]).unlink()
    with pytest.raises(UserError, match="1 of 4 items lack an image, first 0-002.png"):
        stage("vdg_align", *argv, "--out", str(tmp_path / "out"))
    with pytest.raises(UserError, match="1 missing"):
        stage("vdg_align", *argv, "--check")
    chat(tmp_path, 4)
    entries[1]["conversations"][1]["value"] = " "
    (tmp_path / "chat.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match="record item-1: a text of 0 characters"):
        stage("vdg_align", *argv, "--out", str(tmp_path / "out"))
    (tmp_path / "chat.json").write_text("[]")
    for more in ([], ["--check"]):
        with pytest.raises(UserError, match="chat.json holds no caption"):
            stage("vdg_align", *argv, "--out", str(tmp_path / "out"), *more)
    with pytest.raises(UserError, match="--floor 1.5: wanted 0 to 1"):
        stage("vdg_align", *argv, "--out", str(tmp_path / "out"), "--floor", "1.5")
    assert not (tmp_path / "out").exists()
