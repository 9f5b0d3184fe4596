"""Model folders as people have them: every form of weights equals Hugging Face's from_pretrained, every fault is one
line, and nothing of a folder is run."""

import ast
import builtins
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
import zoo as writer
from conftest import ROOT
from safetensors.torch import load_file, save_file

import train_cir
import vdg_align
from common.console import UserError
from common.llama import load_llm
from common.pretrained import load_model, read_config, read_exactly, read_tensors, weight_files
from mine_pairs import Encoder

CPU = torch.device("cpu")
# what a stage calls, by the flag that names the folder: folder of the zoo, loader
LOADERS = {
    "--llm": ("llama", lambda folder: load_llm(str(folder), torch.float32, "cpu")[0]),
    "--vision": ("instructblip", lambda folder: vdg_align.VisionProjector(str(folder), 64)),
    "--encoder resnet": ("resnet", lambda folder: Encoder(str(folder), CPU, torch.float32).model),
    "--encoder clip": ("clip", lambda folder: Encoder(str(folder), CPU, torch.float32).model),
    "--backbone clip": ("clip", lambda folder: train_cir.build_cir("sum", str(folder)).backbone),
    "--backbone blip": ("blip", lambda folder: train_cir.build_cir("blip_tdm", str(folder)).backbone),
}
HUGGING_FACE = {
    "--llm": transformers.LlamaForCausalLM,
    "--encoder resnet": transformers.ResNetModel,
    "--encoder clip": transformers.CLIPVisionModelWithProjection,
    "--backbone clip": transformers.CLIPModel,
    "--backbone blip": transformers.BlipForImageTextRetrieval,
}
ALL = pytest.mark.parametrize("stage", LOADERS)


def copy(zoo: Path, stage: str, tmp_path: Path) -> Path:
    """A copy of the stage's model folder, its weights in one file."""
    folder = tmp_path / LOADERS[stage][0]
    shutil.copytree(zoo / folder.name, folder)
    if (folder / "model.safetensors.index.json").exists():
        tensors = whole(folder)
        for file in folder.glob("model*"):
            file.unlink()
        save_file(tensors, folder / "model.safetensors")
    return folder


def whole(folder: Path) -> dict[str, torch.Tensor]:
    files = [load_file(file) for file in folder.glob("model*.safetensors")]
    return {k: v.clone() for part in files for k, v in part.items()}  # copies: the files are written over


def edit(folder: Path, file: str = "config.json", **entries) -> None:
    record = json.loads((folder / file).read_text()) | entries
    (folder / file).write_text(json.dumps({k: v for k, v in record.items() if v is not ...}))


def everything(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights and all buffers, those that no file holds among them."""
    return {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if not n.startswith("projection.")}


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = everything(model), everything(other)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def theirs(stage: str, folder: Path) -> torch.nn.Module:
    """What Hugging Face loads; of InstructBLIP the parts that we read, out of the whole."""
    if stage in HUGGING_FACE:
        return HUGGING_FACE[stage].from_pretrained(folder, dtype=torch.float32)
    model = transformers.InstructBlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    for other in ("language_model", "language_projection"):
        delattr(model, other)
    return model


def one_line(stage: str, folder: Path, words: str) -> str:
    """Loading stops with one line that names the folder and says `words`."""
    with pytest.raises(UserError, match=words) as error:
        LOADERS[stage][1](folder)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600 and str(folder) in text, text
    return text


# ---- weights as the hub has them ----
def write_shards(folder: Path, tensors: dict, ending: str, save) -> None:
    """Two shards and their index, named as transformers names them."""
    stem, names = {"safetensors": "model", "bin": "pytorch_model"}[ending], list(tensors)
    halves = {f"{stem}-0000{i + 1}-of-00002.{ending}": names[i::2] for i in range(2)}
    for file, part in halves.items():
        save({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_pt(tensors: dict, path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def save_old(tensors: dict, path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


FORMS = {
    "safetensors in shards": lambda f, t: write_shards(f, t, "safetensors", save_pt),
    "bin": lambda f, t: torch.save(t, f / "pytorch_model.bin"),
    "bin of before torch 1.6": lambda f, t: save_old(t, f / "pytorch_model.bin"),
    "bin in shards": lambda f, t: write_shards(f, t, "bin", torch.save),
}


@ALL
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights_equals_from_pretrained(zoo, tmp_path, stage, form):
    folder = copy(zoo, stage, tmp_path)
    wanted, tensors = theirs(stage, folder), whole(folder)
    (folder / "model.safetensors").unlink()
    FORMS[form](folder, tensors)
    assert same(LOADERS[stage][1](folder), wanted)


@ALL
def test_a_folder_of_the_zoo_equals_from_pretrained(zoo, stage):
    model, wanted = LOADERS[stage][1](zoo / LOADERS[stage][0]), theirs(stage, zoo / LOADERS[stage][0])
    assert same(model, wanted)
    if stage in HUGGING_FACE:
        assert model.config._attn_implementation == wanted.config._attn_implementation
        differ = {k for k, v in wanted.config.to_dict().items() if model.config.to_dict().get(k) != v}
        assert differ <= {"_name_or_path", "transformers_version", "dtype", "architectures"}, differ


OLDER = {  # names that files on the hub hold and today's classes do not
    "--llm": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    "--vision": {"qformer.embeddings.position_ids": torch.arange(9)[None]},
    "--encoder clip": {"vision_model.embeddings.position_ids": torch.arange(5)[None]},
    "--encoder resnet": {},
    "--backbone clip": {"text_model.embeddings.position_ids": torch.arange(77)[None]},
    "--backbone blip": {"text_encoder.embeddings.position_ids": torch.arange(64)[None]},
}


@ALL
def test_names_of_older_files_are_known(zoo, tmp_path, stage):
    folder = copy(zoo, stage, tmp_path)
    save_pt(whole(folder) | OLDER[stage], folder / "model.safetensors")
    assert same(LOADERS[stage][1](folder), theirs(stage, folder))


def test_a_resnet_saved_without_its_classifier_and_a_clip_vision_tower_alone(zoo, tmp_path):
    transformers.ResNetModel.from_pretrained(zoo / "resnet").save_pretrained(tmp_path / "r")
    transformers.CLIPVisionModelWithProjection.from_pretrained(zoo / "clip").save_pretrained(tmp_path / "c")
    for kind, name in ((transformers.ResNetModel, "r"), (transformers.CLIPVisionModelWithProjection, "c")):
        source = str(tmp_path / name)
        model = load_model(kind, source, read_config(source, ("resnet", "clip_vision_model")), torch.float32)
        assert same(model, kind.from_pretrained(source))


def test_old_clip_configs_spell_their_parts_twice(zoo, tmp_path):
    """As openai/clip-vit-large-patch14 does: vision_config beside vision_config_dict."""
    folder = copy(zoo, "--backbone clip", tmp_path)
    record = json.loads((folder / "config.json").read_text())
    edit(folder, text_config_dict=record["text_config"], vision_config_dict=record["vision_config"])
    for stage in ("--encoder clip", "--backbone clip"):
        assert same(LOADERS[stage][1](folder), theirs(stage, folder))


@pytest.mark.parametrize("kind", ["attention_bias", "mlp_bias"])
def test_a_llama_with_biases_loads(zoo, tmp_path, kind):
    folder = copy(zoo, "--llm", tmp_path)
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig.from_pretrained(folder, **{kind: True}, initializer_range=0.1)
    )
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.eval().save_pretrained(folder)
    llm = load_llm(str(folder), torch.float32, "cpu")[0]
    ids = torch.tensor([[1, 5, 7, 9]])
    assert torch.equal(llm(ids).logits, model(ids).logits)
    quantised = load_llm(str(folder), torch.float32, "cpu", "nf4")[0]
    assert torch.nn.functional.cosine_similarity(quantised(ids).logits, model(ids).logits, dim=-1).min() > 0.9


def test_int8_keeps_outliers_as_hugging_face_does(zoo, tmp_path):
    """Features above 6.0 are multiplied in full precision; with bitsandbytes' own default of 0 they are not."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    folder = copy(zoo, "--llm", tmp_path)
    tensors = whole(folder)
    for name in tensors:
        if name.endswith("layernorm.weight"):
            tensors[name][3] = 40.0
    save_pt(tensors, folder / "model.safetensors")
    how = transformers.BitsAndBytesConfig(load_in_8bit=True)
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float16)
    llm = load_llm(str(folder), torch.float16, "cpu", "int8")[0]
    ids = torch.tensor([[1, 5, 7, 9, 40]])
    assert torch.equal(llm(ids).logits, reference(ids).logits)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_llm_is_small_before_its_first_product(zoo, monkeypatch, quantize):
    """Int8Params.to() quantises what comes from a CPU alone; on a GPU weights lie there before."""
    bnb = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bnb.nn.Int8Params, "to", lambda self, *_, **__: self)
    llm = load_llm(str(zoo / "llama"), torch.float32, "cpu", quantize)[0]
    linears = [m for m in llm.modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]
    assert len(linears) == 7 * llm.config.num_hidden_layers
    assert {m.weight.dtype for m in linears} == {torch.uint8 if quantize == "nf4" else torch.int8}
    llm(torch.tensor([[1, 5, 7]]))
    assert {m.weight.dtype for m in linears} == {torch.uint8 if quantize == "nf4" else torch.int8}


def test_tied_weights_that_differ_are_refused(zoo, tmp_path):
    """transformers unties them, and warns: the model would be another one than its config.json says."""
    folder = copy(zoo, "--llm", tmp_path)
    edit(folder, tie_word_embeddings=True)
    one_line("--llm", folder, "config.json ties lm_head to the embeddings, its files do not")
    tensors = whole(folder)
    save_pt(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert same(load_llm(str(folder), torch.float32, "cpu")[0], theirs("--llm", folder))


# ---- weights that are not what they seem ----
@ALL
def test_two_candidates_for_the_weights_are_both_named(zoo, tmp_path, stage):
    folder = copy(zoo, stage, tmp_path)
    write_shards(folder, whole(folder), "safetensors", save_pt)
    text = one_line(stage, folder, "which of them is the model")
    assert "holds model.safetensors and model.safetensors.index.json" in text


def with_index(folder: Path, index: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@ALL
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_an_index_that_cannot_be_followed(zoo, tmp_path, stage, ending):
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = copy(zoo, stage, tmp_path)
    names = list(whole(folder))
    (folder / "model.safetensors").rename(outside / "x.safetensors")
    stem = {"safetensors": "model", "bin": "pytorch_model"}[ending]
    for index, words in (
        ({"weight_map": dict.fromkeys(names, "../outside/x.safetensors")}, "outside its folder"),
        ({"weight_map": dict.fromkeys(names, str(outside / "x.safetensors"))}, "outside its folder"),
        ({"weight_map": dict.fromkeys(names, "evil.py")}, "none of weights"),
        ({"weight_map": dict.fromkeys(names, f"{stem}-00001-of-00002.{ending}")}, "is missing, which its index names"),
        ({"weight_map": dict.fromkeys(names, 3)}, "weight_map"),
        ({"weight_map": names}, "weight_map"),
        ({"weight_map": {}}, "another model's index"),
        ({}, "weight_map"),
        ([], "weight_map"),
    ):
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
        one_line(stage, folder, words)
    (folder / f"{stem}.{ending}.index.json").write_text("{")
    one_line(stage, folder, "not JSON")


@ALL
def test_weights_of_another_model(zoo, tmp_path, stage):
    """Whole, and in shards whose index names none of the tensors wanted."""
    folder = copy(zoo, stage, tmp_path)
    other = {f"encoder.block.{i}.weight": torch.ones(64, 64) for i in range(4)}
    save_pt(other, folder / "model.safetensors")
    words = "another model's files|not in the files|no such weight"
    one_line(stage, folder, words)
    (folder / "model.safetensors").unlink()
    write_shards(folder, other, "safetensors", save_pt)
    one_line(stage, folder, words + "|another model's index")


@ALL
def test_a_missing_weight_a_batch_norm_statistic_too(zoo, tmp_path, stage):
    folder = copy(zoo, stage, tmp_path)
    tensors = whole(folder)
    prefixes = ("vision", "qformer", "resnet.encoder", "model.layers", "text")
    last = [name for name in tensors if name.startswith(prefixes) and not name.endswith("num_batches_tracked")]
    last = [name for name in last if "vision" in name or "clip" not in stage or "backbone" in stage][-1]
    del tensors[last]
    save_pt(tensors, folder / "model.safetensors")
    assert last.removeprefix("resnet.") in one_line(stage, folder, "not in the files|are missing for")


def test_batch_norm_statistics_are_weights(zoo, tmp_path):
    folder = copy(zoo, "--encoder resnet", tmp_path)
    tensors = whole(folder)
    del tensors["resnet.embedder.embedder.normalization.running_mean"]
    save_pt(tensors, folder / "model.safetensors")
    one_line("--encoder resnet", folder, "running_mean")


class Payload:
    """A pickle that writes a file when it is read without weights_only."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@ALL
def test_damaged_files_are_one_line(zoo, tmp_path, stage):
    folder = copy(zoo, stage, tmp_path)
    tensors, path = whole(folder), folder / "model.safetensors"
    data = path.read_bytes()
    for part in (b"", data[:5], data[:60], data[: len(data) // 2], data[:-1], b"\xff" * 200, b"<html>" * 50):
        path.write_bytes(part)
        one_line(stage, folder, "damaged")
    path.unlink()
    path = folder / "pytorch_model.bin"
    for save in (torch.save, save_old):
        save(tensors, path)
        data = path.read_bytes()
        for part in (b"", data[:5], data[:300], data[: len(data) // 2], data[:-100], b"<html>" * 50):
            path.write_bytes(part)
            one_line(stage, folder, "damaged")
    for wrong in ({"model": tensors}, [1, 2], {"x": 3}, torch.ones(2)):
        torch.save(wrong, path)
        one_line(stage, folder, "wanted tensors by name")
    for hostile in ({"x": Payload(tmp_path / "ran")}, Payload(tmp_path / "ran")):
        torch.save(hostile, path)
        one_line(stage, folder, "nothing in it is run")
        path.write_bytes(pickle.dumps(hostile))
        one_line(stage, folder, "nothing in it is run")
    assert not (tmp_path / "ran").exists()
    path.unlink()
    one_line(stage, folder, "model.safetensors is missing; wanted model.safetensors or pytorch_model.bin")


def test_a_tensor_in_two_shards(zoo, tmp_path):
    folder = copy(zoo, "--llm", tmp_path)
    tensors = whole(folder)
    (folder / "model.safetensors").unlink()
    write_shards(folder, tensors, "safetensors", save_pt)
    save_pt(tensors, folder / "model-00002-of-00002.safetensors")
    one_line("--llm", folder, "both hold")


def test_reading_by_prefix_opens_no_other_shard(zoo, tmp_path):
    """The language model inside an InstructBLIP is 26 GB that nobody reads."""
    tensors = {"a.x": torch.ones(2), "b.x": torch.zeros(3)}
    write_shards(tmp_path, tensors, "bin", torch.save)
    (tmp_path / "pytorch_model-00002-of-00002.bin").write_bytes(b"not read")
    assert [name for name, _ in read_tensors(str(tmp_path), ("a.",))] == ["a.x"]
    assert weight_files(str(tmp_path), ("b.",)) == ["pytorch_model-00002-of-00002.bin"]
    with pytest.raises(UserError, match=r"a.x is \(2,\) in the file, \(3,\) by config.json"):
        list(read_exactly(str(tmp_path), {"a.x": (3,)}, ("a.",)))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n"


@ALL
def test_git_lfs_pointers_are_named(zoo, tmp_path, stage):
    folder = copy(zoo, stage, tmp_path)
    read = {"config.json", "model.safetensors", "preprocessor_config.json"}
    if stage != "--vision" and "encoder" not in stage:
        read |= {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer_config.json"}
    for file in sorted(read & set(os.listdir(folder))):
        data = (folder / file).read_bytes()
        (folder / file).write_text(POINTER)
        assert file in one_line(stage, folder, "git-LFS pointer.*git lfs pull")
        (folder / file).write_bytes(data)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text(POINTER)
    one_line(stage, folder, "pytorch_model.bin is a git-LFS pointer")


# ---- configurations ----
@pytest.mark.parametrize("stage, part", [("--vision", "vision_config"), ("--backbone blip", "text_config")])
def test_sizes_that_are_left_out_are_not_filled_with_the_usual_large_ones(zoo, tmp_path, stage, part):
    """Without a number of layers ViT-g's 39 would be made, and words of BERT, before any file is read."""
    folder = copy(zoo, stage, tmp_path)
    record = json.loads((folder / "config.json").read_text())
    edit(folder, **{part: {"model_type": record[part].get("model_type", "")}})
    began = time.monotonic()
    one_line(stage, folder, "config.json describes a model of .* weights or more")
    assert time.monotonic() - began < 5


@ALL
def test_configurations_that_describe_no_model(zoo, tmp_path, stage):
    folder = copy(zoo, stage, tmp_path)
    record = json.loads((folder / "config.json").read_text())
    part = "vision_config" if "vision_config" in record else None

    def changed(**entries) -> dict:
        return record | ({part: record[part] | entries} if part else entries)

    cases = [
        ({}, "model_type"),
        ([], "model_type"),
        ({"model_type": 3}, "model_type"),
        (record | {"model_type": "evil"}, "evil model.?,? wanted|evil model; wanted"),
        (record | {"model_type": "bert"}, "bert model,? ?;? ?wanted"),
        (record | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised already"),
    ]
    if stage == "--encoder resnet":
        cases += [(changed(depths=[10**9, 1, 1, 1]), "depths")]
        cases += [(changed(hidden_sizes=[8, 16, 16, 2**20]), "describes a model of")]
        cases += [(changed(layer_type="evil"), "config.json"), (changed(hidden_sizes="wide"), "hidden_sizes")]
        cases += [(changed(embedding_size=16), "in the file"), (changed(hidden_act="evil"), "config.json")]
    else:
        cases += [(changed(num_hidden_layers=10**9), "num_hidden_layers"), (changed(hidden_size=-1), "hidden_size")]
        cases += [(changed(hidden_size=2**20), "describes a model of"), (changed(hidden_size="wide"), "hidden_size")]
        cases += [(changed(num_hidden_layers=1e300), "num_hidden_layers"), (changed(hidden_size=None), "config.json")]
        cases += [(changed(num_attention_heads=5), "config.json|in the file")]
        cases += [(changed(hidden_act="evil"), "config.json")]
        cases += [(changed(intermediate_size=80), "in the file.*by config.json")]
        cases += [(changed(num_hidden_layers=3), "not in the files|are missing for")]
    for wrong, words in cases:
        (folder / "config.json").write_text(json.dumps(wrong))
        one_line(stage, folder, words)
    (folder / "config.json").write_bytes(b"\x80\x02binary")
    one_line(stage, folder, "not UTF-8")
    (folder / "config.json").write_text("[" * 100_000)
    one_line(stage, folder, "not usable JSON")
    (folder / "config.json").unlink()
    one_line(stage, folder, "no config.json")


# ---- nothing of a folder is run ----
EVIL = """import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import *
class Evil(PreTrainedConfig):
    model_type = "evil"
EvilConfig = EvilModel = EvilTokenizer = EvilTokenizerFast = EvilProcessor = EvilImageProcessor = Evil
"""
AUTO = "AutoConfig AutoModel AutoModelForCausalLM AutoModelForImageTextRetrieval AutoProcessor".split()
AUTO += ["AutoImageProcessor", "AutoFeatureExtractor"]


@ALL
@pytest.mark.parametrize("unknown", [True, False])
def test_no_file_of_a_folder_is_run(zoo, tmp_path, monkeypatch, capsys, stage, unknown):
    """Every file that can name code names some, under known and unknown types; the terminal would say yes to all."""
    folder, marker = copy(zoo, stage, tmp_path), tmp_path / "ran"
    wanted = LOADERS[stage][1](folder)
    for name in ("evil", "__init__", "configuration_evil", "modeling_evil", "tokenization_evil", "processing_evil"):
        (folder / f"{name}.py").write_text(EVIL.format(marker=str(marker)))
    code = {name: "evil.Evil" for name in AUTO} | {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizerFast"]}
    types = {"config.json": {"model_type": "evil", "tokenizer_class": "EvilTokenizer"}}
    types |= {"tokenizer_config.json": {"tokenizer_class": "EvilTokenizer"}}
    types |= {"preprocessor_config.json": {"image_processor_type": "EvilImageProcessor", "processor_class": "Evil"}}
    types |= {"processor_config.json": {"processor_class": "EvilProcessor"}, "generation_config.json": {}}
    types |= {"video_preprocessor_config.json": {}, "adapter_config.json": {"base_model_name_or_path": str(folder)}}
    for file in types:
        if not (folder / file).exists():
            (folder / file).write_text("{}")
        edit(folder, file, auto_map=code, custom_pipelines={"evil": {"impl": "evil.Evil", "pt": ["AutoModel"]}})
        if file == "config.json":
            edit(folder, file, attn_implementation="evil/kernel", _attn_implementation="evil/kernel")

    def never(*_):
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr(builtins, "input", never)
    monkeypatch.chdir(folder)
    for file in types if unknown else [None]:
        before = (folder / file).read_bytes() if file else b""
        if file:
            edit(folder, file, **types[file])
        try:
            assert same(LOADERS[stage][1](folder), wanted)
        except UserError as error:
            assert unknown and "\n" not in str(error)
        if file:
            (folder / file).write_bytes(before)
        assert not marker.exists(), file
    assert not any(name in sys.modules for name in ("evil", "configuration_evil"))
    assert "Do you wish to run" not in capsys.readouterr().out


def test_a_stage_with_yes_on_its_standard_input_runs_nothing(zoo, tmp_path):
    """The command line of the fault report: an unknown type, a file of code, and "y" typed ahead."""
    folder = copy(zoo, "--encoder clip", tmp_path)
    (folder / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "ran")))
    edit(folder, model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    writer.draw(tmp_path / "pictures", 12)
    command = [sys.executable, str(ROOT / "mine_pairs.py"), "--images", str(tmp_path / "pictures")]
    command += ["--encoder", str(folder), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, input="y\n" * 9, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 1 and not (tmp_path / "ran").exists()
    assert done.stderr.strip().splitlines()[-1] == f"error: --encoder {folder}: a evil model; wanted a ResNet or CLIP"


def test_every_call_of_transformers_refuses_code_of_a_folder():
    """In the whole repository: from_pretrained and from_config say trust_remote_code=False, or are given no folder."""
    for path in sorted({*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")} - {*ROOT.glob("tests/*.py")}):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text and '"trust_remote_code": True' not in text, path
        for call in ast.walk(tree):
            name = getattr(getattr(call, "func", None), "attr", "")
            ours = name == "from_config" and ast.unparse(call.func) in ("Preprocess.from_config", "cls.from_config")
            if name not in ("from_pretrained", "from_config") or ours:
                continue
            given = {word.arg: getattr(word.value, "value", ...) for word in call.keywords}
            assert given.get("trust_remote_code") is False or (None in given and "trust_remote_code" in text), path
