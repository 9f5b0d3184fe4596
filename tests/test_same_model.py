"""A model folder's quick hash: the same for the same model wherever and however it lies, another for any other."""

import json
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from common.console import UserError
from common.same_model import models_sha256, require_same_models


def hashes(zoo: Path, **other: Path) -> dict[str, str]:
    models = {"llm": zoo / "llama", "vision": zoo / "instructblip"} | other
    return models_sha256({role: str(folder) for role, folder in models.items()})


def take_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder, whose files of weights are removed."""
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return tensors


def test_the_same_model_in_other_files_has_the_same_hash(zoo, tmp_path):
    """Moved, in shards as transformers cuts them, as pytorch_model.bin, and with what older files hold besides."""
    wanted = hashes(zoo)
    assert len(set(wanted.values())) == 2
    shutil.copytree(zoo / "llama", tmp_path / "moved")
    assert hashes(zoo, llm=tmp_path / "moved") == wanted

    whole = transformers.LlamaForCausalLM.from_pretrained(zoo / "llama")
    whole.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert hashes(zoo, llm=tmp_path / "shards") == wanted

    for role, folder in (("llm", "llama"), ("vision", "instructblip")):
        shutil.copytree(zoo / folder, tmp_path / role)
        tensors = take_weights(tmp_path / role)
        more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)} if role == "llm" else {}
        torch.save(dict(reversed(tensors.items())) | more, tmp_path / role / "pytorch_model.bin")
        assert hashes(zoo, **{role: tmp_path / role}) == wanted


def test_any_other_weight_or_use_is_another_model(zoo, tmp_path):
    wanted, folder = hashes(zoo), tmp_path / "other"
    for role, source in (("llm", "llama"), ("vision", "instructblip")):
        shutil.copytree(zoo / source, folder)
        tensors = take_weights(folder)
        read = [name for name in tensors if role == "llm" or not name.startswith("language_")]
        for name in read[:: max(1, len(read) // 12)]:
            changed = tensors | {name: tensors[name] + torch.randn(tensors[name].shape) * 1e-3}
            save_file(changed, folder / "model.safetensors", {"format": "pt"})
            assert hashes(zoo, **{role: folder}) != wanted, name
        if role == "vision":  # the language model inside is never read
            inside = next(name for name in tensors if name.startswith("language_model"))
            save_file(tensors | {inside: tensors[inside] + 1}, folder / "model.safetensors", {"format": "pt"})
            assert hashes(zoo, vision=folder) == wanted
        shutil.rmtree(folder)

    shutil.copytree(zoo / "llama", folder)
    config = json.loads((folder / "config.json").read_text())
    for change in ({"num_attention_heads": 8, "head_dim": 8}, {"rope_parameters": {"rope_theta": 5e5}}):
        (folder / "config.json").write_text(json.dumps(config | change))
        assert hashes(zoo, llm=folder) != wanted, change


def test_a_checkpoint_names_flag_and_folder_of_the_other_model(zoo, tmp_path):
    config = {"llm": str(zoo / "llama"), "vision": str(zoo / "instructblip")}
    found = require_same_models(config, "out/vdg")  # of before: it knows none
    assert require_same_models(config | {"models_sha256": found}, "out/vdg") == found
    with pytest.raises(UserError, match=r"^--vision .*/instructblip is not the model that out/vdg was trained on: "):
        require_same_models(config | {"models_sha256": found | {"vision": "0" * 16}}, "out/vdg")
    for damaged in ({}, [], {"llm": found["vision"]}):
        with pytest.raises(UserError, match="^--llm .*/llama is not the model"):
            require_same_models(config | {"models_sha256": damaged}, "out/vdg")


def test_eight_gigabytes_are_hashed_in_no_time(zoo, tmp_path):
    """A file with a hole of 8 GiB: to read it would take longer."""
    shutil.copytree(zoo / "llama", tmp_path / "large")
    tensors = take_weights(tmp_path / "large")
    place, header = 0, {}
    for name, tensor in {**tensors, "large": torch.empty(2**16, 2**16, dtype=torch.bfloat16, device="meta")}.items():
        kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [place, place + tensor.nbytes]}
        place += tensor.nbytes
    data = json.dumps(header).encode()
    with open(tmp_path / "large/model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + place)
    began = time.monotonic()
    assert hashes(zoo, llm=tmp_path / "large") != hashes(zoo)
    assert time.monotonic() - began < 2
