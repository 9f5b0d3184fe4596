"""A real, pretrained LLaMA (VDG_SMOLLM2=FOLDER, of bench/real_llm.py) in stages 1, 2 and 4, against HF and PEFT."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_blip2 import plain, said_by_the_card
from test_vdg_align import records

import vdg_align
from common.annotations import Caption, Triplet, read_chat, read_cirr, training_triplets
from common.files import read_jsonl, write_jsonl
from common.images import ImageStore, load_pixels
from common.llama import load_llm, tokenize
from common.seeds import seeded_rng
from demo import world

ROOT = Path(__file__).resolve().parent.parent
SAID = 12  # tokens of a generated delta
HOW = ["--dtype", "fp32", "--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def smollm2() -> str:
    """Folder of a pretrained LLaMA, as bench/real_llm.py makes it."""
    folder = os.environ.get("VDG_SMOLLM2", "")
    if not os.path.isdir(folder):
        pytest.skip("needs a pretrained LLaMA: VDG_SMOLLM2=FOLDER, which bench/real_llm.py makes")
    return os.path.abspath(folder)


@torch.no_grad()
def test_a_pretrained_llama_equals_hugging_face(smollm2):
    """9 heads and 3 of keys, embeddings tied, ByteLevel words, <|im_start|>: logits, and Eq. 1's loss of captions."""
    llm, tokenizer = load_llm(smollm2, torch.float32, "cpu")
    theirs = transformers.LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    for text in ("make it red", "Ünïcode, 12 dogs\n and  two spaces <|im_end|>"):
        assert tokenizer.decode(tokenize(tokenizer, text)) == text
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenize(tokenizer, "The capital of France is")]])
    ours, wanted = llm(ids).logits, theirs(ids).logits
    assert tokenizer.decode(ours[0, -1].argmax()) == " Paris"
    assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max()

    torch.manual_seed(0)
    image = torch.randn(32, 576) * llm.get_input_embeddings().weight.std()
    prompt, texts = tokenize(tokenizer, "Describe the image.\n"), ("a red dress with short sleeves", "two dogs in snow")
    answers = [[*tokenize(tokenizer, text), tokenizer.eos_token_id] for text in texts]
    rows = [[[tokenizer.bos_token_id] + prompt, image, tokenize(tokenizer, "\n")] for _ in texts]
    count = sum(map(len, answers))
    batch = vdg_align.pack(llm.get_input_embeddings(), rows, answers)
    loss = vdg_align.caption_loss(llm, batch, count)
    total = 0.0
    embed = theirs.get_input_embeddings()
    for row, answer in zip(rows, answers, strict=True):
        pieces = [piece if torch.is_tensor(piece) else embed(torch.tensor(piece)) for piece in (*row, answer)]
        logits = theirs(inputs_embeds=torch.cat(pieces)[None]).logits[0, -len(answer) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-4)


# ---- stages 1, 2 and 4 from the command line ----
def command(name: str, *argv: str | Path) -> None:
    """A stage as a user runs it."""
    line = [sys.executable, str(ROOT / f"{name}.py"), *map(str, argv)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def road(smollm2, tmp_path_factory) -> Path:
    """align/ of 24 captions, vdg/ of 24 triplets (8 held out), deltas/ of 50 pairs, merged/, blip2/: three minutes."""
    out = tmp_path_factory.mktemp("road")
    drawn = out / "world"
    world.write_world(str(drawn), 5, train=32, dev=1, val=6, test=1, queries=9, chat=24, aux=1, fashioniq=1)
    triplets, _ = training_triplets("cirr", str(drawn / "cirr"), "train")
    keys = ("reference", "target", "delta")
    write_jsonl(out / "triplets.jsonl", [{key: getattr(t, key) for key in keys} for t in triplets])

    # stage 1: every step sees all captions, so its loss does not depend on their order
    models = ["--vision", ROOT / "demo/models/instructblip", "--llm", smollm2]
    files = ["--chat", drawn / "chat/chat.json", "--images", drawn / "chat/images", "--keep"]
    run = ["--epochs", 6, "--batch", 8, "--accumulate", 3, "--warmup", 0.3, "--save_every", 1]
    command("vdg_align", *models, *files, *run, *HOW, "--out", out / "align")

    # stage 2, with a LoRA that changes much
    files = ["--aligned", out / "align", "--root", drawn / "cirr", "--held_out", 0.25]
    run = ["--epochs", 2, "--batch", 8, "--lora_rank", 8, "--lr", 1e-3, "--warmup", 2, "--max_new", SAID]
    command("vdg_tune", *files, *run, *HOW, "--out", out / "vdg")

    # stage 4 without chance, and the LLaMA that others would load
    pairs = ["--triplets", "cirr/val", "--root", drawn / "cirr", "--max_pairs", 50]
    run = ["--temperature", 0, "--max_new", SAID, "--batch", 16]
    command("gen_deltas", "--vdg", out / "vdg", *pairs, *run, *HOW, "--out", out / "deltas")
    command("vdg_tune", "--out", out / "vdg", "--merge", out / "merged", "--dtype", "fp32")
    command("vdg_tune", "--out", out / "vdg", "--merge", out / "blip2", "--format", "blip2", "--dtype", "fp32")
    return out


class Theirs:
    """A LLaMA of Hugging Face, its tokenizer, and the embeddings of what stands around pictures."""

    def __init__(self, llm: transformers.PreTrainedModel, folder: str | Path):
        self.llm, self.words = llm.eval(), transformers.PreTrainedTokenizerFast.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        return self.words(text, add_special_tokens=False).input_ids

    def embed(self, pieces: list) -> torch.Tensor:
        """Texts and image tokens (Q, D), <|im_start|> before them -> (1, T, D)."""
        table = self.llm.get_input_embeddings()
        rows = [table(torch.tensor([self.words.bos_token_id]))]
        rows += [
            piece if torch.is_tensor(piece) else table(torch.tensor(self.ids(piece))) for piece in pieces if len(piece)
        ]
        return torch.cat(rows)[None]

    def loss(self, rows: list[tuple[list, str]]) -> float:
        """Hugging Face's own loss of (pieces, answer), as a mean over the answers' tokens."""
        total = count = 0
        for pieces, answer in rows:
            x, answer = self.embed(pieces), [*self.ids(answer.strip()), self.words.eos_token_id]
            whole = torch.cat([x, self.llm.get_input_embeddings()(torch.tensor([answer]))], dim=1)
            labels = torch.tensor([[-100] * x.shape[1] + answer])
            total += self.llm(inputs_embeds=whole, labels=labels).loss.item() * len(answer)
            count += len(answer)
        return total / count


def projected(images: ImageStore, names: list[str], projection: dict) -> dict[str, torch.Tensor]:
    """Image tokens (Q, D) by name, with the weight and the bias of a projection."""
    vision = vdg_align.VisionProjector(str(ROOT / "demo/models/instructblip"), len(projection["bias"]))
    queries = vision.queries(load_pixels(images, names, vision.preprocess))
    return dict(zip(names, queries @ projection["weight"].T + projection["bias"], strict=True))


def prompt_of(caption: Caption, image: torch.Tensor) -> list:
    return [image, f"\n{caption.prompt}\n"] if caption.image_first else [f"{caption.prompt}\n", image, "\n"]


def request_of(pair: Triplet | dict, tokens: dict[str, torch.Tensor], prompt: str) -> list:
    """Fig. 3's prompt with the tokens of both pictures in their places."""
    reference, target = (pair["reference"], pair["target"]) if isinstance(pair, dict) else (pair.reference, pair.target)
    known = {"<reference>": tokens[reference], "<target>": tokens[target]}
    parts = [part if part in known else part.strip(" ") for part in re.split("(<reference>|<target>)", prompt)]
    return [known.get(part, part) for part in parts]


@torch.no_grad()
def test_align_logs_the_loss_of_hugging_face(smollm2, road):
    """The loss of the last step is that of Hugging Face with the projection before this step."""
    llm = transformers.LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    captions = read_chat(road / "world/chat/chat.json")
    state = torch.load(road / "align/last/step-5/state.pt", weights_only=True)["state"]
    names = [caption.image for caption in captions]
    tokens = projected(ImageStore(road / "world/chat/images"), names, state["projection"])
    wanted = Theirs(llm, smollm2).loss([(prompt_of(c, tokens[c.image]), c.text) for c in captions])
    losses = [record["loss"] for record in records(road / "align")]
    assert losses[-1] == pytest.approx(wanted, rel=1e-4)
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.1  # it is another projection than the first


@torch.no_grad()
def test_tune_logs_the_loss_of_peft(smollm2, road):
    """The held-out loss of the last epoch is that of Hugging Face with PEFT and the adapter as saved."""
    llm = transformers.LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    llm = peft.PeftModel.from_pretrained(llm, str(road / "vdg"))
    triplets, images = training_triplets("cirr", str(road / "world/cirr"), "train")
    held = [triplets[i] for i in sorted(seeded_rng("held out", 0).permutation(32).tolist()[:8])]
    names = sorted({name for t in held for name in (t.reference, t.target)})
    tokens = projected(images, names, load_file(road / "vdg/projection.safetensors"))
    prompt = json.loads((road / "vdg/config.json").read_text())["prompt"]
    rows = [(request_of(t, tokens, prompt), t.delta) for t in held]
    logged = [record["held_out_loss"] for record in records(road / "vdg") if "held_out_loss" in record]
    assert logged[-1] == pytest.approx(Theirs(llm, smollm2).loss(rows), rel=1e-4)
    with llm.disable_adapter():
        assert abs(logged[-1] / Theirs(llm, smollm2).loss(rows) - 1) > 1e-2


@torch.no_grad()
def test_greedy_deltas_equal_generate(smollm2, road):
    """50 pairs: the text of gen_deltas.py is the one that generate makes with PEFT's merged LLaMA, which is ours."""
    base = transformers.LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    llm = peft.PeftModel.from_pretrained(base, str(road / "vdg")).merge_and_unload()
    ours = transformers.LlamaForCausalLM.from_pretrained(road / "merged", dtype=torch.float32)
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(llm.state_dict()[name], weight, rtol=1e-5, atol=1e-6)
    theirs, said = Theirs(llm, road / "merged"), read_jsonl(road / "deltas/pseudo.jsonl")
    images = read_cirr(str(road / "world/cirr"), "val").images
    names = sorted({name for pair in said for name in (pair["reference"], pair["target"])})
    tokens = projected(images, names, load_file(road / "vdg/projection.safetensors"))
    prompt = json.loads((road / "vdg/config.json").read_text())["prompt"]
    end = theirs.words.eos_token_id
    how = {"max_new_tokens": SAID, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
    wanted = []
    for pair in said:
        x = theirs.embed(request_of(pair, tokens, prompt))
        ids = llm.generate(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2]), **how)[0].tolist()
        ids = ids[: ids.index(end)] if end in ids else ids
        wanted.append(" ".join(theirs.words.decode(ids, skip_special_tokens=True).split()))
    assert len(said) == 50 and len(set(wanted)) > 10
    assert [pair["delta"] for pair in said] == wanted


def test_blip2_of_plain_transformers_says_the_same(road, tmp_path):
    """50 pairs by the lines of the exported folder's card, in a process of their own: tied embeddings, ByteLevel."""
    said, images = read_jsonl(road / "deltas/pseudo.jsonl"), read_cirr(str(road / "world/cirr"), "val").images
    write_jsonl(tmp_path / "pairs.jsonl", [{key: pair[key] for key in ("reference", "target")} for pair in said])
    (tmp_path / "images").mkdir()
    for name in {name for pair in said for name in (pair["reference"], pair["target"])}:
        (tmp_path / "images" / name).symlink_to(os.path.abspath(images.path(name)))
    texts, ours, *_ = said_by_the_card(road / "blip2", tmp_path, said=SAID)
    assert ours == [] and plain(texts) == [pair["delta"] for pair in said]
