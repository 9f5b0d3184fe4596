"""Stage 2 against PEFT and Hugging Face, and its run: resume, ranks, checkpoints."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_vdg_align import chat, records, stage
from zoo import draw

import common
import data
import vdg_align
import vdg_tune

LORA = {"rank": 4, "alpha": 16.0, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def flags(zoo, tmp_path_factory) -> list[str]:
    """12 triplets of which 2 are held out, 2 epochs of 3 steps (4 + 4 + 2), after a short alignment."""
    folder = tmp_path_factory.mktemp("tune")
    chat(folder, 8)
    models = ["--vision", str(zoo / "instructblip"), "--llm", str(zoo / "llama")]
    files = ["--chat", str(folder / "chat.json"), "--images", str(folder / "images")]
    stage(
        "vdg_align",
        *models,
        *files,
        "--batch",
        "8",
        "--start",
        "1.0",
        "--workers",
        "0",
        "--out",
        str(folder / "aligned"),
    )
    names = draw(folder / "images", 9, seed=1)
    triplets = [
        {"reference": names[i % 9], "target": names[(i * 2 + 1) % 9], "delta": "make it red" + " and long" * (i % 3)}
        for i in range(12)
    ]
    (folder / "triplets.jsonl").write_text("".join(json.dumps(t) + "\n" for t in triplets))
    files = ["--dataset", "jsonl", "--root", str(folder / "triplets.jsonl"), "--images", str(folder / "images")]
    run = ["--epochs", "2", "--lora_rank", "4", "--warmup", "2", "--held_out", "0.17", "--lr", "0.01"]
    return ["--aligned", str(folder / "aligned"), *files, *run, "--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    stage("vdg_tune", *flags, "--batch", "4", "--out", str(out))
    return out


def adapted(zoo, lora=LORA):
    """LLaMA with our LoRA, B not zero."""
    torch.manual_seed(0)
    llm, tokenizer = vdg_align.load_llm(str(zoo / "llama"), torch.float32, "cpu")
    for module in vdg_tune.add_lora(llm, lora["rank"], lora["alpha"], lora["dropout"], lora["targets"]).values():
        torch.nn.init.normal_(module.lora_B, std=0.2)
    return llm.eval(), tokenizer


def saved(llm, folder: Path, lora=LORA) -> Path:
    tensors = {"adapter_model.safetensors": vdg_tune.adapter_tensors(llm)}
    common.save_folder(folder, tensors, {"adapter_config.json": vdg_tune.adapter_config(lora, "llama")})
    return folder


def hugging_face(zoo):
    return transformers.LlamaForCausalLM.from_pretrained(zoo / "llama", dtype=torch.float32).eval()


def test_outputs_and_gradients_equal_peft(zoo, tmp_path):
    llm, tokenizer = adapted(zoo)
    theirs = peft.PeftModel.from_pretrained(hugging_face(zoo), saved(llm, tmp_path / "a"), is_trainable=True).eval()
    torch.manual_seed(0)
    vision = vdg_align.VisionProjector(str(zoo / "instructblip"), 64)
    projection = torch.nn.Linear(24, 64)
    projection.load_state_dict(vision.projection.state_dict())
    pieces = vdg_tune.prompt_pieces(tokenizer, vdg_tune.PROMPT)
    queries = torch.randn(3, 2, 32, 24)
    answers = [vdg_align.answer_ids(tokenizer, text) for text in ("make it red", "x", "two cats on the table")]
    batch = vdg_tune.delta_batch(llm, vision, pieces, queries, answers)
    loss = vdg_align.caption_loss(llm, batch, len(batch.labels))
    loss.backward()

    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    head, middle, tail = vdg_tune.PROMPT.replace("<target>", "<reference>").split("<reference>")
    embed, embeddings, labels = theirs.get_input_embeddings(), [], []
    for (reference, target), answer in zip(projection(queries), answers, strict=True):
        texts = [[1, *ids(head.rstrip(" "))], ids(middle.rstrip(" ")), [*ids(tail), *answer]]
        first, second, third = (embed(torch.tensor(t)) for t in texts)
        embeddings.append(torch.cat([first, reference, second, target, third]))
        labels.append(torch.tensor([-100] * (len(embeddings[-1]) - len(answer)) + answer))
    x = torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(e)) for e in embeddings], batch_first=True)
    other = theirs(inputs_embeds=x, attention_mask=mask, labels=labels).loss
    other.backward()

    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) == 8  # 2 layers x (q, v) x (A, B)
    for name, module in vdg_tune.lora_modules(llm).items():
        for part in ("lora_A", "lora_B"):
            expected = gradients[f"base_model.model.{name}.{part}.default.weight"]
            torch.testing.assert_close(getattr(module, part).grad, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(vision.projection.weight.grad, projection.weight.grad, rtol=1e-4, atol=1e-6)


def test_peft_round_trip_without_a_difference(zoo, tmp_path):
    llm, _ = adapted(zoo)
    ids = torch.arange(3, 20)[None]
    theirs = peft.PeftModel.from_pretrained(hugging_face(zoo), saved(llm, tmp_path / "ours"))
    with torch.no_grad():
        out = llm(ids).logits
        assert (out - theirs(ids).logits).abs().max() == 0
        assert (out - hugging_face(zoo)(ids).logits).abs().max() > 0.1  # the adapter does something
    theirs.save_pretrained(tmp_path / "theirs")
    again, _ = vdg_align.load_llm(str(zoo / "llama"), torch.float32, "cpu")
    vdg_tune.load_adapter(again, str(tmp_path / "theirs"), LORA)
    with torch.no_grad():
        assert (out - again.eval()(ids).logits).abs().max() == 0
    vdg_tune.merge_lora(again)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, out, rtol=1e-4, atol=1e-4)
    assert not vdg_tune.lora_modules(again)


def test_a_changed_adapter_is_refused(zoo, tmp_path):
    llm, _ = adapted(zoo)
    good = saved(llm, tmp_path / "good")
    config = json.loads((good / "adapter_config.json").read_text())
    tensors = load_file(good / "adapter_model.safetensors")
    first = min(tensors)
    wrong_configs = {
        "lora_alpha": 32,
        "r": 8,
        "target_modules": ["q_proj"],
        "use_rslora": True,
        "alpha_pattern": {"q_proj": 1},
    }
    wrong_tensors = {
        "wrong prefix": {name.removeprefix("base_model."): t for name, t in tensors.items()},
        "a subset": {name: t for name, t in tensors.items() if name != first},
        "another width": {name: t[:, :-1] if name == first else t for name, t in tensors.items()},
    }
    for key, value in wrong_configs.items():
        bad = tmp_path / key
        shutil.copytree(good, bad)
        (bad / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(common.UserError, match=key):
            vdg_tune.load_adapter(vdg_align.load_llm(str(zoo / "llama"), torch.float32, "cpu")[0], str(bad), LORA)
    for key, value in wrong_tensors.items():
        bad = tmp_path / key
        shutil.copytree(good, bad)
        (bad / "manifest.json").unlink()
        save_file({name: t.contiguous() for name, t in value.items()}, bad / "adapter_model.safetensors")
        with pytest.raises(common.UserError, match="wrong LLM"):
            vdg_tune.load_adapter(vdg_align.load_llm(str(zoo / "llama"), torch.float32, "cpu")[0], str(bad), LORA)
    vdg_tune.check_saved(llm, str(good))
    (good / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 15}))
    with pytest.raises(AssertionError, match="does not survive saving"):
        vdg_tune.check_saved(llm, str(good))
    with pytest.raises(common.UserError, match="the LLM has no w_pack"):
        vdg_tune.add_lora(llm, 4, 16.0, 0.0, ("w_pack",))


def test_dropout_is_on_the_input_of_a_alone_and_only_in_training(zoo):
    torch.manual_seed(0)
    module = vdg_tune.LoRALinear(torch.nn.Linear(8, 6), 2, 4.0, 0.5)
    torch.nn.init.normal_(module.lora_B)
    x = torch.randn(5, 8)
    torch.manual_seed(1)
    kept = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(module(x), module.base(x) + 2 * kept @ module.lora_A.T @ module.lora_B.T)
    module.eval()
    torch.testing.assert_close(module(x), module.base(x) + 2 * x @ module.lora_A.T @ module.lora_B.T)


def test_prompt_is_figure_3(zoo):
    tokenizer = vdg_align.load_tokenizer(str(zoo / "llama"))
    pieces = vdg_tune.prompt_pieces(tokenizer, vdg_tune.PROMPT)
    text = [piece if isinstance(piece, str) else tokenizer.decode(piece) for piece in pieces]
    assert text == [
        "<s>",
        "Request: Analyze given reference and target images and provide a description that transforms the reference to "
        "match the target.\nReference:",
        "<reference>",
        "\nTarget:",
        "<target>",
        "\nResponse:",
    ]
    a, b = torch.zeros(32, 4), torch.ones(32, 4)
    assert [p is q for p, q in zip(vdg_tune.delta_row(pieces, a, b), pieces, strict=True)].count(False) == 2
    assert vdg_tune.delta_row(pieces, a, b)[2] is a and vdg_tune.delta_row(pieces, a, b)[4] is b
    with pytest.raises(common.UserError, match="once each"):
        vdg_tune.prompt_pieces(tokenizer, "Reference: <reference>\nResponse:")


@pytest.mark.parametrize("views", ["0", "2"])
def test_resume_is_step_exact(whole, flags, tmp_path, monkeypatch, views):
    argv = [*flags, "--batch", "4", "--views", views, "--out"]
    if views != "0":
        stage("vdg_tune", *argv, str(tmp_path / "whole"))
        whole = tmp_path / "whole"
    asked = iter([False, False, True])
    monkeypatch.setattr(common, "stop_requested", lambda: next(asked))  # a SIGTERM in the third step
    with pytest.raises(SystemExit) as stopped:
        stage("vdg_tune", *argv, str(tmp_path / "out"))
    assert stopped.value.code == 143
    monkeypatch.setattr(common, "stop_requested", lambda: False)
    torch.manual_seed(12345)  # whatever the generator's state: dropout is a function of the step
    stage("vdg_tune", *argv, str(tmp_path / "out"))
    for file in ("adapter_model.safetensors", "projection.safetensors"):
        a, b = load_file(whole / file), load_file(tmp_path / "out" / file)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for a, b in zip(records(whole), records(tmp_path / "out"), strict=True):
        assert a["step"] == b["step"] and a.get("loss") == b.get("loss")
        assert a.get("held_out_loss") == b.get("held_out_loss")


def test_two_ranks_equal_one_rank(flags, tmp_path):
    argv = [*flags, "--lora_dropout", "0.0", "--epochs", "1", "--out"]
    stage("vdg_tune", *argv, str(tmp_path / "one"), "--batch", "4")
    run_ranks(2, stage, "vdg_tune", *argv, str(tmp_path / "two"), "--batch", "2")
    for file in ("adapter_model.safetensors", "projection.safetensors"):
        one, two = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6)
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        key = "loss" if "loss" in a else "held_out_loss"
        assert abs(a[key] - b[key]) < 1e-5


def test_schedule_and_log(whole):
    steps = [r for r in records(whole) if "loss" in r]
    assert [r["lr"] for r in steps] == pytest.approx([0.005, 0.01, 0.01, 0.001, 0.001, 0.001])
    assert steps[-1]["seconds_left"] == 0 and all(r["grad_norm"] > 0 for r in steps)
    held = [r["held_out_loss"] for r in records(whole) if "held_out_loss" in r]
    assert len(held) == 2 and held[1] < held[0]


def test_load_vdg_gives_the_held_out_loss_of_the_run(whole, flags):
    vision, llm, tokenizer, config = vdg_tune.load_vdg(str(whole), "cpu", torch.float32)
    triplets, images = data.training_triplets("jsonl", flags[5], "train", images=flags[7])
    chosen = sorted(common.rng("held out", 0).permutation(12).tolist()[:2])
    held = [triplets[i] for i in chosen]
    pixels = data.load_pixels(images, [n for t in held for n in (t.reference, t.target)], vision.preprocess)
    answers = [vdg_align.answer_ids(tokenizer, t.delta) for t in held]
    pieces = vdg_tune.prompt_pieces(tokenizer, config["prompt"])
    queries = vision.queries(pixels).unflatten(0, (2, 2))
    with torch.no_grad():
        batch = vdg_tune.delta_batch(llm, vision, pieces, queries, answers)
        loss = vdg_align.caption_loss(llm, batch, len(batch.labels))
    logged = [r["held_out_loss"] for r in records(whole) if "held_out_loss" in r]
    assert loss.item() == pytest.approx(logged[-1], rel=1e-6)
    assert config["lora"] == {**LORA, "dropout": 0.05} and not any(p.requires_grad for p in llm.parameters())


def test_a_projection_of_another_width_is_refused(flags, whole, tmp_path):
    bad = tmp_path / "aligned"
    shutil.copytree(flags[1], bad)
    (bad / "manifest.json").unlink()
    save_file({"weight": torch.zeros(80, 24), "bias": torch.zeros(80)}, bad / "projection.safetensors")
    with pytest.raises(common.UserError, match=r"projection.safetensors holds .*80, 24.* want .*64, 24"):
        stage("vdg_tune", *flags, "--aligned", str(bad), "--out", str(tmp_path / "out"))
    with pytest.raises(common.UserError, match="not a checkpoint of vdg_align.py"):
        stage("vdg_tune", *flags, "--aligned", str(whole), "--out", str(tmp_path / "other"))
