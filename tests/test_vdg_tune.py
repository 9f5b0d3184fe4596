"""Stage 2 against PEFT and Hugging Face, and its run: resume, ranks, checkpoints."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_vdg_align import chat, fresh, records, stage
from zoo import draw

import vdg_align
import vdg_tune
from common import held_out, llama, memory, ranks
from common.annotations import Triplet, read_chat, read_own, training_triplets
from common.batches import training_steps
from common.console import UserError
from common.decode import Sampling, prompt_parts, prompt_pieces, start_engine, text_of
from common.files import read_json, save_folder
from common.flags import read_flags
from common.images import load_pixels
from common.llama import Shape, answer_ids, llm_shape, load_llm, load_tokenizer
from common.ranks import World
from common.seeds import seeded_rng

LORA = {"rank": 4, "alpha": 16.0, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def flags(zoo, tmp_path_factory) -> list[str]:
    """12 triplets of which 2 are held out, 2 epochs of 3 steps (4 + 4 + 2), after a short alignment."""
    folder = tmp_path_factory.mktemp("tune")
    chat(folder, 8)
    models = ["--vision", str(zoo / "instructblip"), "--llm", str(zoo / "llama")]
    files = ["--chat", str(folder / "chat.json"), "--images", str(folder / "images")]
    how = ["--batch", "8", "--start_size", "1.0", "--workers", "0"]
    stage("vdg_align", *models, *files, *how, "--out", str(folder / "aligned"))
    names = draw(folder / "images", 9, seed=1)
    triplets = [
        {
            "reference": names[i % 9],
            "target": names[(i + 1 + 2 * (i // 9) + i % 3) % 9],
            "delta": "make it red" + " and long" * (i % 3),
        }
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
    llm, tokenizer = load_llm(str(zoo / "llama"), torch.float32, "cpu")
    vdg_tune.add_lora(llm, lora["rank"], lora["alpha"], lora["dropout"], lora["targets"])
    for module in vdg_tune.lora_modules(llm).values():
        torch.nn.init.normal_(module.lora_B, std=0.2)
    return llm.eval(), tokenizer


def saved(llm, folder: Path, lora=LORA) -> Path:
    tensors = {"adapter_model.safetensors": vdg_tune.adapter_tensors(llm)}
    save_folder(folder, tensors, {"adapter_config.json": vdg_tune.adapter_config(lora, "llama")})
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
    pieces = prompt_pieces(tokenizer, vdg_tune.PROMPT)
    queries = torch.randn(3, 2, 32, 24)
    answers = [answer_ids(tokenizer, text) for text in ("make it red", "x", "two cats on the table")]
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
            torch.testing.assert_close(getattr(module, part).grad, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vision.projection.weight.grad, projection.weight.grad, rtol=1e-5, atol=1e-6)


def test_peft_round_trip_without_a_difference(zoo, tmp_path):
    llm, _ = adapted(zoo)
    ids = torch.arange(3, 20)[None]
    theirs = peft.PeftModel.from_pretrained(hugging_face(zoo), saved(llm, tmp_path / "ours"))
    with torch.no_grad():
        out = llm(ids).logits
        assert (out - theirs(ids).logits).abs().max() == 0
        assert (out - hugging_face(zoo)(ids).logits).abs().max() > 0.1  # the adapter does something
    theirs.save_pretrained(tmp_path / "theirs")
    again, _ = load_llm(str(zoo / "llama"), torch.float32, "cpu")
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
        with pytest.raises(UserError, match=key):
            vdg_tune.load_adapter(load_llm(str(zoo / "llama"), torch.float32, "cpu")[0], str(bad), LORA)
    mixed = tmp_path / "lora_alpha" / "adapter_config.json"
    for value, words in (([], "wanted an object"), ({**config, "target_modules": ["q_proj", ["v_proj"]]}, "target_")):
        mixed.write_text(json.dumps(value))
        with pytest.raises(UserError, match=words):
            vdg_tune.load_adapter(load_llm(str(zoo / "llama"), torch.float32, "cpu")[0], str(mixed.parent), LORA)
    for key, value in wrong_tensors.items():
        bad = tmp_path / key
        shutil.copytree(good, bad)
        (bad / "manifest.json").unlink()
        save_file({name: t.contiguous() for name, t in value.items()}, bad / "adapter_model.safetensors")
        with pytest.raises(UserError, match="wrong LLM"):
            vdg_tune.load_adapter(load_llm(str(zoo / "llama"), torch.float32, "cpu")[0], str(bad), LORA)
    vdg_tune.check_saved(llm, str(good))
    (good / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 15}))
    with pytest.raises(AssertionError, match="does not survive saving"):
        vdg_tune.check_saved(llm, str(good))
    with pytest.raises(UserError, match="the LLM has no w_pack"):
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
    tokenizer = load_tokenizer(str(zoo / "llama"))
    pieces = prompt_pieces(tokenizer, vdg_tune.PROMPT)
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
    with pytest.raises(UserError, match="once each"):
        prompt_pieces(tokenizer, "Reference: <reference>\nResponse:")


@pytest.mark.parametrize("views", ["0", "2"])
def test_resume_is_step_exact(whole, flags, tmp_path, monkeypatch, views):
    argv = [*flags, "--batch", "4", "--views", views, "--out"]
    if views != "0":
        stage("vdg_tune", *argv, str(tmp_path / "whole"))
        whole = tmp_path / "whole"
    asked = iter([False, False, True])
    monkeypatch.setattr(ranks, "stop_requested", lambda: next(asked))  # a SIGTERM in the third step
    with pytest.raises(SystemExit) as stopped:
        stage("vdg_tune", *argv, str(tmp_path / "out"))
    assert stopped.value.code == 143
    monkeypatch.setattr(ranks, "stop_requested", lambda: False)
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
    stage("vdg_tune", *argv, str(tmp_path / "halves"), "--batch", "2", "--accumulate", "2")  # fp32 in another order
    run_ranks(2, stage, "vdg_tune", *argv, str(tmp_path / "two"), "--batch", "2")
    for file in ("adapter_model.safetensors", "projection.safetensors"):
        one, two, halves = (load_file(tmp_path / run / file) for run in ("one", "two", "halves"))
        lost = max(float((halves[name] - one[name]).abs().max()) for name in one)  # on this machine
        assert lost < 1e-5
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6 + 4 * lost)
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
    triplets, images = training_triplets("jsonl", flags[5], "train", images=flags[7])
    chosen = sorted(seeded_rng("held out", 0).permutation(12).tolist()[:2])
    held = [triplets[i] for i in chosen]
    pixels = load_pixels(images, [n for t in held for n in (t.reference, t.target)], vision.preprocess)
    answers = [answer_ids(tokenizer, t.delta) for t in held]
    pieces = prompt_pieces(tokenizer, config["prompt"])
    queries = vision.queries(pixels).unflatten(0, (2, 2))
    with torch.no_grad():
        batch = vdg_tune.delta_batch(llm, vision, pieces, queries, answers)
        loss = vdg_align.caption_loss(llm, batch, len(batch.labels))
    logged = [r["held_out_loss"] for r in records(whole) if "held_out_loss" in r]
    assert loss.item() == pytest.approx(logged[-1], rel=1e-6)
    assert config["lora"] == {**LORA, "dropout": 0.05} and not any(p.requires_grad for p in llm.parameters())


def test_a_held_out_pair_is_in_training_under_no_text():
    """100 pairs with 3 texts each, in the order of the texts: none of the 30 held out is trained on. Of pairs that
    stand once so many triplets are held out, the first of a permutation."""
    several = [Triplet(f"{i}.png", f"{i + 1}.png", f"{text}") for text in range(3) for i in range(100)]
    trained, held = held_out.split_pairs(several, 0.1, seed=0)
    assert (len(held), len(trained)) == (30, 270) and [t for t in several if t in held] == held
    pairs = {(t.reference, t.target) for t in held}
    assert len(pairs) == 10 and not pairs & {(t.reference, t.target) for t in trained}

    once = several[:100]
    trained, held = held_out.split_pairs(once, 0.07, seed=3)
    chosen = sorted(seeded_rng("held out", 3).permutation(100).tolist()[:7])
    assert held == [once[i] for i in chosen] and trained == [t for t in once if t not in held]
    assert held_out.split_pairs(once, 0, seed=3) == (once, []) and held_out.split_pairs([], 0.1, 0) == ([], [])
    assert [len(part) for part in held_out.split_pairs(once, 0.001, seed=3)] == [99, 1]


def test_what_evaluation_asks_is_not_learnt_and_of_several_texts_the_first_is(flags, tmp_path, monkeypatch, capsys):
    """--hold_out leaves out those triplets that eval_cir.py --hold_out reads."""
    names = [Path(name).name for name in sorted(Path(flags[7]).glob("1-*.png"))]
    texts = [f"make it {'very ' * i}red" for i in range(9)]
    lines = [
        {"reference": names[i], "target": names[i - 1], "delta": [text, "what a model said"]}
        for i, text in enumerate(texts)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = read_own(str(tmp_path / "own.jsonl"), flags[7], "", 3, "held").queries
    module, learnt = fresh("vdg_tune", *flags, "--root", str(tmp_path / "own.jsonl"), "--hold_out", "3"), []
    module.EPOCHS, module.HELD_OUT, module.OUT = 1, 0, str(tmp_path / "out")
    monkeypatch.setattr(module, "answer_ids", lambda words, text: learnt.append(text) or answer_ids(words, text))
    module.main()
    assert len(asked) == 3 and set(learnt) == set(texts) - {query.delta for query in asked}
    assert "6 of 6 triplets have several texts: the first is learnt" in capsys.readouterr().out


def short_of_positions(zoo, folder: Path, most: int) -> str:
    """The LLaMA, which reads so many tokens."""
    shutil.copytree(zoo / "llama", folder / str(most), dirs_exist_ok=True)
    config = json.loads((folder / str(most) / "config.json").read_text())
    (folder / str(most) / "config.json").write_text(json.dumps(config | {"max_position_embeddings": most}))
    return str(folder / str(most))


def test_no_stage_takes_a_row_that_is_longer_than_the_llm_reads(zoo, flags, whole, tmp_path):
    """The longest row, as it is packed or decoded, still goes; with one position less the stage stops."""
    vision, llm, tokenizer, _ = vdg_tune.load_vdg(str(whole), "cpu", torch.float32)
    pieces = prompt_pieces(tokenizer, vdg_tune.PROMPT)
    chat(tmp_path, 3)
    captions = read_chat(str(tmp_path / "chat.json"))
    rows = [vdg_align.caption_row(tokenizer, caption, torch.zeros(32, 64)) for caption in captions]
    align = vdg_align.pack(llm.get_input_embeddings(), rows, [answer_ids(tokenizer, c.text) for c in captions])
    triplets, _ = training_triplets("jsonl", flags[5], "train", images=flags[7])
    answers = [answer_ids(tokenizer, t.delta) for t in triplets]
    tune = vdg_tune.delta_batch(llm, vision, pieces, torch.zeros(len(answers), 2, 32, 24), answers)
    greedy = Sampling(tokenizer.eos_token_id, 40, 0.0, 0)
    decoded = start_engine(llm, prompt_parts(pieces)[0], 32, 2, greedy, False).pairs.keys.shape[2]

    files = ["--chat", str(tmp_path / "chat.json"), "--images", str(tmp_path / "images"), "--device", "cpu"]
    pairs = [{"id": i, "reference": t.reference, "target": t.target} for i, t in enumerate(triplets[:2])]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    deltas = ["--vdg", str(whole), "--pairs", str(tmp_path / "pairs.jsonl"), "--images", flags[7], "--device", "cpu"]
    short, tuned = ["--epochs", "1", "--workers", "0"], [*flags, "--epochs", "1"]
    cases = {
        "align": ("vdg_align", align, [*files, *short, "--vision", str(zoo / "instructblip")], "record item-2 has"),
        "tune": ("vdg_tune", tune, [*tuned, "--held_out", "0"], "record 2 has"),
        "held out": ("vdg_tune", decoded, [*tuned, "--max_new", "40"], "a delta of --max_new 40 tokens has"),
        "deltas": ("gen_deltas", decoded, [*deltas, "--max_new", "40"], "a delta of --max_new 40 tokens has"),
    }
    for name, (which, longest, argv, words) in cases.items():
        most = longest if isinstance(longest, int) else int(longest.positions.max()) + 1
        with pytest.raises(UserError, match=f"reads {most - 1} tokens at most, and .*{words} {most} "):
            stage(which, *argv, "--llm", short_of_positions(zoo, tmp_path, most - 1), "--out", str(tmp_path / name))
        stage(which, *argv, "--llm", short_of_positions(zoo, tmp_path, most), "--out", str(tmp_path / name))


def test_a_projection_of_another_width_is_refused(flags, whole, tmp_path):
    bad = tmp_path / "aligned"
    shutil.copytree(flags[1], bad)
    (bad / "manifest.json").unlink()
    save_file({"weight": torch.zeros(80, 24), "bias": torch.zeros(80)}, bad / "projection.safetensors")
    with pytest.raises(UserError, match=r"projection.safetensors holds .*80, 24.* want .*64, 24"):
        stage("vdg_tune", *flags, "--aligned", str(bad), "--out", str(tmp_path / "out"))
    with pytest.raises(UserError, match="not a checkpoint of vdg_align.py"):
        stage("vdg_tune", *flags, "--aligned", str(whole), "--out", str(tmp_path / "other"))


def test_constants_of_the_paper_stand_at_their_values():
    """[S4.1] and Fig. 3, from the scripts' own text, each with its source beside it."""
    root = Path(vdg_tune.__file__).parent
    wanted = {
        "vdg_align": {"EPOCHS": 1, "BATCH": 64, "LR": 1e-3, "BETAS": (0.9, 0.99), "WEIGHT_DECAY": 0.05},
        "vdg_tune": {
            **{"EPOCHS": 10, "BATCH": 8, "LR": 2e-4, "WARMUP": 100, "DECAY_AT": 0.5, "DECAY": 0.1, "LORA_RANK": 64},
            **{"LORA_ALPHA": 16.0, "LORA_DROPOUT": 0.05, "SCALE": (0.8, 1.0), "RATIO": (0.9, 1.1), "VIEWS": 0},
            **{"BETAS": (0.9, 0.99), "WEIGHT_DECAY": 0.05},
        },
        "gen_deltas": {"TEMPERATURE": 0.2, "TOP_K": 50},
    }
    for script, constants in wanted.items():
        flags = {flag.name: flag for flag in read_flags(root / f"{script}.py")}
        for name, value in constants.items():
            assert flags[name].default == value and "[S4.1]" in flags[name].help, f"{script} {name}"
    assert vdg_align.LLM == "meta-llama/Llama-2-13b-hf" and vdg_align.VISION == "Salesforce/instructblip-vicuna-13b"


def test_a_tree_batch_gives_the_gradients_of_lora_and_projection(zoo):
    """Five pairs of two references: instruction and references held once, against every row by itself."""
    llm, tokenizer = adapted(zoo)
    torch.manual_seed(0)
    vision = vdg_align.VisionProjector(str(zoo / "instructblip"), 64)
    pieces = prompt_pieces(tokenizer, vdg_tune.PROMPT)
    images = torch.randn(7, 32, 24)
    queries = torch.stack([torch.stack([images[i], images[j]]) for i, j in ((0, 2), (0, 3), (1, 4), (0, 5), (1, 6))])
    texts = ("make it red", "x", "two cats", "a dog", "make it red")
    answers = [answer_ids(tokenizer, text) for text in texts]
    weights = [*vision.projection.parameters()]
    weights += [w for m in vdg_tune.lora_modules(llm).values() for w in (m.lora_A, m.lora_B)]
    results = []
    for names in ("no tree", None, ["a", "a", "b", "a", "b"]):
        if names == "no tree":
            rows = [vdg_tune.delta_row(pieces, *pair) for pair in vision(queries)]
            batch = vdg_align.pack(llm.get_input_embeddings(), rows, answers, share=False)
        else:
            batch = vdg_tune.delta_batch(llm, vision, pieces, queries, answers, names)
        loss = vdg_align.caption_loss(llm, batch, len(batch.labels))
        results.append((loss.detach(), torch.autograd.grad(loss, weights), len(batch.home)))
    first, *_, between = map(len, pieces[:4])  # the text after a shared reference is shared too
    assert results[0][2] - results[1][2] == 4 * (first + len(pieces[1]))
    assert results[1][2] - results[2][2] == 3 * (32 + between)
    for loss, gradients, _ in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)
        for a, b in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [["--tree"], ["--tree", "--views", "2"], ["--checkpoint"]])
def test_runs_with_tree_batches_and_checkpoints(flags, whole, tmp_path, how):
    stage("vdg_tune", *flags, "--batch", "4", "--lora_dropout", "0", *how, "--out", str(tmp_path / "out"))
    steps = [r for r in records(tmp_path / "out") if "loss" in r]
    assert len(steps) == 6 and steps[-1]["loss"] < steps[0]["loss"]
    if how == ["--checkpoint"]:
        stage("vdg_tune", *flags, "--batch", "4", "--lora_dropout", "0", "--out", str(tmp_path / "plain"))
        a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "plain"))
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(r["tokens_per_s"] > 0 and r["memory"] > 0.1 for r in steps)


def test_groups_keep_together_and_every_item_comes_once():
    groups = [[0, 1, 2], [3], [4, 5], [6, 7, 8]]
    world = World(0, 1, 0, torch.device("cpu"))
    batches = [mine for _, _, mine in training_steps(groups, 2, 4, 0, world, 0)]
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    for order in (first, second):
        assert sorted(order) == list(range(9))
        assert all([order[order.index(g[0]) + i] for i in range(len(g))] == g for g in groups)
    assert first != second


def test_eight_bit_adamw_resumes_exactly(flags, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    argv = [*flags, "--batch", "4", "--lora_rank", "64", "--optimizer", "adamw8bit", "--held_out", "0", "--out"]
    stage("vdg_tune", *argv, str(tmp_path / "whole"))
    asked = iter([False, False, True])
    monkeypatch.setattr(ranks, "stop_requested", lambda: next(asked))
    with pytest.raises(SystemExit):
        stage("vdg_tune", *argv, str(tmp_path / "out"))
    monkeypatch.setattr(ranks, "stop_requested", lambda: False)
    stage("vdg_tune", *argv, str(tmp_path / "out"))
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [r["loss"] for r in records(tmp_path / "whole")]
    assert losses[-1] < losses[0]
    with pytest.raises(UserError, match="adamw8bit"):
        vdg_tune.make_optimizer("sgd", [])


def test_held_out_deltas_are_shown_and_counted(whole, flags):
    """The page and the counts against deltas generated here, greedily, by the finished checkpoint."""
    record = [r for r in records(whole) if "held_out_loss" in r][-1]
    assert record["perplexity"] == pytest.approx(2.718281828 ** record["held_out_loss"])
    vision, llm, tokenizer, config = vdg_tune.load_vdg(str(whole), "cpu", torch.float32)
    triplets, images = training_triplets("jsonl", flags[5], "train", images=flags[7])
    chosen = sorted(seeded_rng("held out", 0).permutation(12).tolist()[:2])
    held, rest = [triplets[i] for i in chosen], [t for i, t in enumerate(triplets) if i not in chosen]
    pieces, embed, said = prompt_pieces(tokenizer, config["prompt"]), llm.get_input_embeddings(), []
    for t in held:
        with torch.no_grad():
            tokens = vision(vision.queries(load_pixels(images, [t.reference, t.target], vision.preprocess)))
            row = vdg_tune.delta_row(pieces, *tokens)
            x = torch.cat([p if torch.is_tensor(p) else embed(torch.tensor(p)) for p in row])[None]
            ids = llm.generate(
                inputs_embeds=x, attention_mask=torch.ones(x.shape[:2]), max_new_tokens=32, do_sample=False,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        said.append(text_of(ids[0].tolist(), tokenizer))
    page = (whole / "held_out.html").read_text()
    for t, (delta, _) in zip(held, said, strict=True):
        assert f"human: {t.delta}" in page and (delta.split(" ")[0] in page or not delta)
    assert page.count("<img") == 4 and "<script" not in page
    counts = {
        "deltas": 2,
        "empty": sum("empty" in f for _, f in said),
        "repeated": sum("repeated" in f for _, f in said),
        "too_long": sum("runaway" in f for _, f in said),
        "copied": sum(d.lower() in {t.delta.lower() for t in rest} for d, _ in said),
    }
    assert {name: record[name] for name in counts} == counts
    said = [("Make it  red", []), ("", ["empty"]), ("a a a", ["repeated", "runaway"]), ("blue", [])]
    wanted = {"deltas": 4, "empty": 1, "repeated": 1, "too_long": 1, "copied": 1}
    assert held_out.count_flags(said, {"make it red", "blue hat"}) == wanted


def test_a_script_has_one_lora_class_after_its_held_out_report(flags, tmp_path):
    """Loaded again under its own name the stage would have another LoRALinear, of which merge_lora finds none."""
    out = str(tmp_path / "out")
    code = """if True:
        import gc, json, runpy, sys
        run = runpy.run_path("vdg_tune.py", run_name="__main__")
        copies = sum(isinstance(x, type) and x.__name__ == "LoRALinear" for x in gc.get_objects())
        import torch
        out = sys.argv[sys.argv.index("--out") + 1]
        llm = next(part for part in run["load_vdg"](out, "cpu", torch.float32) if hasattr(part, "lm_head"))
        before = len(run["lora_modules"](llm))
        run["merge_lora"](llm)
        print(json.dumps([copies, "vdg_tune" in sys.modules, before, len(run["lora_modules"](llm))]))
    """
    argv = [*flags, "--batch", "4", "--epochs", "1", "--out", out]
    root = Path(vdg_tune.__file__).parent
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "held_out.html").exists()
    assert json.loads(done.stdout.splitlines()[-1]) == [1, False, 4, 0]  # 2 layers x (q, v)


def test_shares_that_cannot_be_kept_stop_before_anything_loads(flags, tmp_path, monkeypatch):
    argv = [*flags, "--out", str(tmp_path / "out")]
    wrong = {
        "--held_out 1 ": "--held_out 1.0: wanted less than 1",
        "--held_out -0.1": "--held_out -0.1: wanted 0 or more",
        "--lora_dropout 1": "--lora_dropout 1.0: wanted less than 1",
        "--decay_at 1.5": "--decay_at 1.5: wanted 0 to 1",
        "--betas 0.9": "--betas wants 2 numbers",
        "--betas 0.9,1": "--betas 0.9,1.0: wanted less than 1",
        "--scale 0.8,1.2": "--scale 0.8,1.2: wanted 0.01 to 1",
        "--optimizer sgd": "--optimizer sgd: wanted adamw or adamw8bit",
        "--lora_rank 0": "--lora_rank 0: wanted 1 or more",
    }
    monkeypatch.setattr(llama, "load_llm", None)
    for flag, text in wrong.items():
        with pytest.raises(UserError, match=re.escape(text)):
            stage("vdg_tune", *argv, *flag.split())
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match=r"none.jsonl.* no triplet"):
        stage("vdg_tune", *argv, "--root", str(tmp_path / "none.jsonl"))
    assert not (tmp_path / "out").exists()


def test_the_card_says_what_was_measured(whole):
    card = (whole / "README.md").read_text()
    record = [r for r in records(whole) if "held_out_loss" in r][-1]
    assert card.startswith("---\nlibrary_name: peft")  # of a folder the hub knows nothing
    hub = held_out.model_card({**read_json(whole / "config.json"), "llm": "owner/llama"}, [])
    assert hub.startswith("---\nbase_model: owner/llama\nlibrary_name: peft")
    for part in ("rank 4, alpha 16", "q_proj, v_proj", "6 steps on 10 triplets", f"{record['held_out_loss']:.4f}"):
        assert part in card
    config = read_json(whole / "config.json")
    assert "No triplets were held out" in held_out.model_card(config, [])


def test_merged_folder_is_a_plain_llama_with_the_same_logits(whole, zoo, tmp_path):
    stage("vdg_tune", "--out", str(whole), "--merge", str(tmp_path / "merged"), "--device", "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert type(theirs) is transformers.LlamaForCausalLM
    _, llm, tokenizer, _ = vdg_tune.load_vdg(str(whole), "cpu", torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        out = llm(ids).logits
        torch.testing.assert_close(theirs(ids).logits, out, rtol=1e-4, atol=1e-4)
        assert (hugging_face(zoo)(ids).logits - out).abs().max() > 1e-2
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()}
    (tmp_path / "new").touch()
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777}  # a colleague may read all of it, as umask says
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again("make it red").input_ids == tokenizer("make it red").input_ids
    with pytest.raises(UserError, match="exists; name a new folder"):
        stage("vdg_tune", "--out", str(whole), "--merge", str(tmp_path / "merged"), "--device", "cpu")


def test_nf4_loss_equals_hugging_face_four_bit(zoo):
    """HF's own 4-bit loading where accelerate is installed (peft brings it)."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantization = transformers.BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=torch.float32)
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        zoo / "llama", quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
    ).eval()
    for module in theirs.modules():  # its own forward fails at these widths on a CPU with AVX512-BF16
        module.support_avx512bf16_for_cpu = False
    ours, _ = load_llm(str(zoo / "llama"), torch.float32, "cpu", "nf4")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted = theirs(ids, labels=ids).loss
        batch = vdg_align.pack(ours.get_input_embeddings(), [[ids[0, :1].tolist()]], [ids[0, 1:].tolist()])
        found = vdg_align.caption_loss(ours, batch, len(batch.labels))
        plain = hugging_face(zoo)(ids, labels=ids).loss
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert abs(plain - wanted) > 1e-4


# ---- memory ----
def test_plan_needs_nothing_and_names_three_cards(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in ([], ["--lora_rank", "128"], ["--optimizer", "adamw8bit"]):
        stage("vdg_tune", "--plan", "--device", "cpu", *argv)
        said = capsys.readouterr().out
        assert [line.split(":")[0] for line in said.splitlines()[-3:]] == [f"memory of {n} GiB" for n in (80, 40, 24)]
        assert "80 GiB: enough" in said and "24 GiB: take --quantize nf4" in said
    with pytest.raises(UserError, match="quantize is 'int4'"):
        stage("vdg_tune", "--plan", "--device", "cpu", "--quantize", "int4")
    stage("vdg_align", "--plan", "--device", "cpu")
    assert "40 GiB: take --checkpoint true" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_plan_of_llama_2_is_what_its_config_says(tmp_path):
    for name, layers in (("7b", 32), ("13b", 40)):
        shape = llm_shape(f"meta-llama/Llama-2-{name}-chat-hf")
        weights = shape.layers * sum(a * b for a, b in shape.linears().values()) + 2 * shape.vocabulary * shape.width
        published = {"7b": 6.74, "13b": 13.02}  # billion
        assert shape.layers == layers and round(weights / 1e9, 2) == published[name]


@pytest.mark.parametrize("quantize", ["", "nf4", "int8"])
def test_planned_bytes_of_the_frozen_weights(zoo, quantize, tmp_path):
    if quantize:
        pytest.importorskip("bitsandbytes")
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(zoo / "llama" / file, tmp_path)
    llm, _ = load_llm(str(tmp_path), torch.float32, "cpu", quantize)
    held = sum(p.numel() * p.element_size() for p in llm.parameters())
    if quantize == "nf4":
        for module in llm.modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            held += sum(t.numel() * t.element_size() for t in (state.absmax, state.state2.absmax)) if state else 0
    plan = memory.frozen(llm_shape(str(tmp_path)), quantize, 4, (0, 0))
    assert next(iter(plan.values())) == pytest.approx(held, rel=0.01)


def test_planned_bytes_of_the_activations(zoo, monkeypatch):
    """Against the tensors that autograd really keeps for the backward pass, each storage once, as a GPU would."""

    def in_16_bits(q, k, v, mask=None, causal=False):  # on a CPU attention learns in fp32, which holds more
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2)

    monkeypatch.setattr(vdg_align, "attention", in_16_bits)
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4
    )
    torch.manual_seed(0)
    llm = transformers.LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    vdg_tune.add_lora(llm, 4, 16.0, 0.05, ("q_proj", "v_proj"))
    llm.train()
    image = torch.randn(32, 128, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in llm.parameters()}
    for checkpoint in (False, True):
        rows, answers, kept = [[[1], image]] * 6, [[5] * 30] * 6, {}
        batch = vdg_align.pack(llm.get_input_embeddings(), rows, answers, share=False)

        def keep(x, kept=kept):
            if x.untyped_storage().data_ptr() not in own:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = vdg_align.caption_loss(llm, batch, 1, checkpoint)
        held = sum(size for size, _ in kept.values())
        shape = Shape(128, 352, 4, 128, 400)
        plan = memory.training(shape, 2, len(batch.home), len(batch.labels), 0, 8, ("q_proj", "v_proj"), checkpoint)
        kinds = [amount for what, amount in plan.items() if what.startswith("activations")]
        planned = sum(kinds) + len(batch.labels) * 400 * 4  # of the logits their log-softmax stays, in fp32
        loss.backward()
        if checkpoint:  # what the plan has beyond: one layer, computed again
            planned -= len(batch.home) * (8 * 128 + 2 * (4 * 128 + 3 * 352) + 6 * 128)
        assert 0.8 < held / planned < 1.2, (checkpoint, held, planned)


def test_running_out_of_memory_is_one_line_with_advice():
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    with pytest.raises(UserError, match=r"Tried to allocate 2 GiB\. Try --batch 4; --plan"):
        memory.advise(main, "--batch 4")()
    with pytest.raises(UserError, match=r"Tried to allocate 2 GiB\. Try --batch 4$"):
        memory.advise(main, "--batch 4", planned=False)()


def test_running_out_of_the_machines_memory_is_one_line_too():
    """What torch and numpy really raise for more than there is; any other RuntimeError stays what it is."""
    large = {
        "no room for 1,048,576.0 GiB more": lambda: torch.empty(2**50, dtype=torch.uint8),
        "No memory has room for that": lambda: torch.empty(2**62, 64),
        "memory is full .Unable to allocate 1.00 PiB": lambda: np.ones(2**50, np.uint8),
        "memory is full .Python": lambda: bytearray(2**50),
    }
    for words, ask in large.items():
        with pytest.raises(UserError, match=f"{words}.*\\. Try a smaller --batch$"):
            memory.advise(ask, "a smaller --batch", planned=False)()
    with pytest.raises(RuntimeError, match="shape"):
        memory.advise(lambda: torch.ones(2).view(3), "a smaller --batch")()


def test_say_names_the_first_option_that_fits(capsys):
    memory.say({"": {"a": 50 * 2**30}, "--checkpoint true": {"a": 30 * 2**30}}, [80, 40, 24])
    last = capsys.readouterr().out.splitlines()[-3:]
    assert last[0].endswith("enough") and "take --checkpoint true: 30.0" in last[1] and "too small" in last[2]


def test_check_looks_at_the_data_alone(flags, tmp_path, capsys):
    stage("vdg_tune", *flags, "--out", str(tmp_path / "out"), "--check")
    assert "12 triplets; images: 9 expected, 9 present" in capsys.readouterr().out
    for more in ([], ["--check"]):  # --check counts first, then it names what is absent
        with pytest.raises(UserError, match="wanted a finished checkpoint of vdg_align.py"):
            stage("vdg_tune", *flags[2:], "--aligned", str(tmp_path / "none"), "--out", str(tmp_path / "out"), *more)
    assert "12 triplets; images: 9 expected, 9 present" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_warm_up_longer_than_the_run_is_said(flags, tmp_path, capsys):
    stage("vdg_tune", *flags, "--batch", "10", "--warmup", "2", "--out", str(tmp_path / "out"))
    assert "--warmup 2: the run has 2 steps, so its rate never comes to --lr" in capsys.readouterr().err
    stage("vdg_tune", *flags, "--batch", "10", "--warmup", "1", "--out", str(tmp_path / "other"))
    assert "--warmup" not in capsys.readouterr().err
