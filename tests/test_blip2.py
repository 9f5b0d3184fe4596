"""vdg_tune.py --merge --format blip2: what plain transformers makes of the folder, in a process without our code."""

import json
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import test_gen_deltas
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_gen_deltas import generate, records_of, tiny_vdg, write_jsonl
from test_vdg_align import stage
from zoo import draw

import vdg_align
import vdg_tune
from common import blip2
from common.console import UserError
from common.files import read_json, save_folder
from common.images import Preprocess
from common.llama import load_tokenizer
from common.pages import clean

SAID = 12  # tokens of a delta

# after the lines of the card: all pairs of a file, and proof that nothing of this repository was read
DRIVER = """
import json, os, sys
pairs = [json.loads(line) for line in open(os.environ["PAIRS"])]
place = os.environ["IMAGES"]
texts = [delta(f"{place}/{p['reference']}", f"{place}/{p['target']}") for p in pairs]
ours = [m for m in sys.modules if m.split(".")[0] in ("common", "kernels", "vdg_tune", "vdg_align", "gen_deltas")]
print("SAID" + json.dumps([texts, ours, str(model.dtype), str(model.qformer.layernorm.weight.dtype)]))
"""


@pytest.fixture(scope="module", params=["plain", "tied, the target first"])
def world(zoo, tmp_path_factory, request) -> Path:
    """vdg/ of a tiny random VDG, images/, pairs.jsonl of 50 pairs."""
    root, other = tmp_path_factory.mktemp("world"), request.param != "plain"
    with pytest.MonkeyPatch.context() as patch:
        if other:
            patch.setattr(test_gen_deltas, "PROMPT", "From\n<target> tell\n<reference>\nResponse:")
        tiny_vdg(zoo, root)
    llm = transformers.LlamaForCausalLM.from_pretrained(root / "llama", dtype=torch.float32)
    llm.lm_head.weight.data[2] /= 3  # long texts, of which a few end by themselves
    if other:
        llm.config.tie_word_embeddings = True
        llm.tie_weights()
        llm.model.embed_tokens.weight.data.mul_(0.3).clamp_(-0.1, 0.1)
    llm.save_pretrained(root / "llama")
    names = draw(root / "images", 12, 5)
    pairs = [{"id": i, "reference": names[i % 12], "target": names[(5 * i + 1 + i // 12) % 12]} for i in range(50)]
    assert len({(p["reference"], p["target"]) for p in pairs}) == 50
    write_jsonl(root / "pairs.jsonl", pairs)
    return root


def merged(world: Path, out: Path, *flags: str) -> Path:
    argv = ["--out", str(world / "vdg"), "--merge", str(out), "--format", "blip2", "--device", "cpu", *flags]
    stage("vdg_tune", *argv)
    return out


def said_by_the_card(folder: Path, world: Path, dtype: str = '"auto"', said: int = SAID) -> list:
    """[texts, modules of ours, dtype of the model, dtype of its Q-Former]: the card's code run in its folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 14 and "max_new_tokens=32" in code
    code = (
        code.replace("max_new_tokens=32", f"max_new_tokens={said}").replace('dtype="auto"', f"dtype={dtype}") + DRIVER
    )
    environment = {"PAIRS": str(world / "pairs.jsonl"), "IMAGES": str(world / "images"), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("SAID")[-1])


def plain(texts: list[str]) -> list[str]:
    """As gen_deltas.py writes them: no control characters, single spaces."""
    return [" ".join(clean(text).split()) for text in texts]


def ours(vdg: Path, world: Path, out: Path, dtype: str) -> list[str]:
    more = {"pairs": world / "pairs.jsonl", "temperature": 0.0, "max_new": SAID, "dtype": dtype}
    return [record["delta"] for record in records_of(generate(vdg, world, out, **more))]


def test_fifty_greedy_texts_equal_plain_transformers(world, tmp_path):
    folder = merged(world, tmp_path / "blip2", "--dtype", "fp32")
    texts, modules, dtype, _ = said_by_the_card(folder, world)
    assert modules == [] and dtype == "torch.float32"
    wanted = ours(world / "vdg", world, tmp_path / "out", "fp32")
    assert len(set(wanted)) > 10 and sum(map(bool, wanted)) > 40
    assert plain(texts) == wanted
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    (tmp_path / "new").touch()
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777}


def rounded(folder: Path, out: Path) -> str:
    """A copy of an InstructBLIP folder whose ViT holds numbers of bf16, as --dtype bf16 reads them."""
    shutil.copytree(folder, out)
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        vit = {name: tensor.bfloat16().float() for name, tensor in tensors.items() if name.startswith("vision_model.")}
        save_file(tensors | vit, path, metadata={"format": "pt"})
    return str(out)


def test_fifty_texts_of_the_bf16_folder(world, zoo, tmp_path):
    """Its numbers, read in fp32, say what a VDG says that stands on the same numbers; LoRA is in them to the bit."""
    folder, argv = merged(world, tmp_path / "blip2", "--dtype", "bf16"), ["--dtype", "bf16", "--device", "cpu"]
    stage("vdg_tune", "--out", str(world / "vdg"), "--merge", str(tmp_path / "llama"), *argv)
    whole, llama = load_file(folder / "model.safetensors"), load_file(tmp_path / "llama/model.safetensors")
    for name, tensor in llama.items():
        assert torch.equal(whole[f"language_model.{name}"], tensor) and tensor.dtype == torch.bfloat16

    adapter = load_file(world / "vdg/adapter_model.safetensors")
    tensors = {"adapter_model.safetensors": {name: tensor * ("lora_A" in name) for name, tensor in adapter.items()}}
    tensors["projection.safetensors"] = load_file(world / "vdg/projection.safetensors")
    config = read_json(world / "vdg/config.json")
    config |= {"llm": str(tmp_path / "llama"), "vision": rounded(zoo / "instructblip", tmp_path / "instructblip")}
    texts = {"adapter_config.json": vdg_tune.adapter_config(config["lora"], config["llm"]), "config.json": config}
    save_folder(tmp_path / "vdg", tensors, texts)
    wanted = ours(tmp_path / "vdg", world, tmp_path / "fp32", "fp32")
    assert len(set(wanted)) > 10
    texts, modules, dtype, _ = said_by_the_card(folder, world, "torch.float32")
    assert plain(texts) == wanted and modules == [] and dtype == "torch.float32"

    # computed in bf16, where transformers rounds Q-Former, projection and norms too, most texts are the same
    texts, _, dtype, of_qformer = said_by_the_card(folder, world)
    assert (dtype, of_qformer) == ("torch.bfloat16", "torch.bfloat16")
    there = ours(world / "vdg", world, tmp_path / "bf16", "bf16")
    assert sum(a == b for a, b in zip(plain(texts), there, strict=True)) >= 25


def test_shards_hold_what_one_file_holds(world, tmp_path, monkeypatch):
    whole = load_file(merged(world, tmp_path / "one", "--dtype", "fp32") / "model.safetensors")
    monkeypatch.setattr(blip2, "SHARD", 100_000)
    folder = merged(world, tmp_path / "many", "--dtype", "fp32")
    index = read_json(folder / "model.safetensors.index.json")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 5 and set(index["weight_map"].values()) == set(files)
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    how = {"output_loading_info": True, "dtype": torch.float32}
    model, info = transformers.Blip2ForConditionalGeneration.from_pretrained(folder, **how)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    assert state.keys() == whole.keys() and all(torch.equal(state[name], whole[name]) for name in state)


def test_no_more_than_a_shard_is_held(tmp_path):
    alive, most = [], 0

    def tensors():
        nonlocal most
        for i in range(40):
            tensor = torch.full((1000,), float(i))
            alive.append(weakref.ref(tensor))
            yield f"t{i}", tensor
            del tensor
            most = max(most, sum(found() is not None for found in alive))

    blip2.write_shards(str(tmp_path), tensors(), 5 * 4000)
    assert most <= 6 and len(list(tmp_path.glob("model-*.safetensors"))) == 8
    assert load_file(tmp_path / "model-00008-of-00008.safetensors")["t39"].eq(39).all()


# ---- what Blip-2 cannot say ----
def projector(zoo, dtype=torch.float32) -> vdg_align.VisionProjector:
    return vdg_align.VisionProjector(str(zoo / "instructblip"), 64, "cpu", dtype)


def test_another_qformer_is_refused(zoo, monkeypatch):
    vision = projector(zoo)
    vision.qformer.config.text_gate = 0.5
    with pytest.raises(UserError, match="Blip-2 has no text_gate; --format llama works"):
        blip2.blip2_vision(vision)
    vision = projector(zoo)
    vision.qformer.register_parameter("gate", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(UserError, match="weights are not Blip-2's .*gate"):
        blip2.blip2_vision(vision)
    vision = projector(zoo)
    layer, was = vision.qformer.encoder, vision.qformer.encoder.forward
    monkeypatch.setattr(layer, "forward", lambda x, *given, **how: was(x * 1.01, *given, **how))
    with pytest.raises(UserError, match="Q-Former differs from this one by"):
        blip2.blip2_vision(vision)


def test_other_pixels_are_refused(zoo):
    assert blip2.plain_pictures(projector(zoo).preprocess)["size"] == {"height": 28, "width": 28}
    for other in (Preprocess.from_folder(zoo / "clip"), projector(zoo).preprocess.with_pad(1.25)):
        with pytest.raises(UserError, match="BlipImageProcessor makes other pixels"):
            blip2.plain_pictures(other)


def test_the_spare_id_is_not_in_the_prompt(zoo):
    tokenizer = load_tokenizer(str(zoo / "llama"))
    assert blip2.spare_id(tokenizer, [1, 5]) == tokenizer.unk_token_id == 0
    assert blip2.spare_id(tokenizer, [0, 1, 2, 5]) == 3


def test_a_wrong_format_and_an_existing_folder_stop(world, tmp_path):
    with pytest.raises(UserError, match="exists; name a new folder"):
        merged(world, tmp_path)
    with pytest.raises(UserError, match="--format blip: wanted llama or blip2"):
        stage("vdg_tune", "--out", str(world / "vdg"), "--merge", str(tmp_path / "a"), "--format", "blip")
