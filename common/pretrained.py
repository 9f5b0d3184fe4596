"""Model folders and hub ids of others: configuration, tensors by name, strictly."""

import os
import re

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.utils import cached_file

from common.console import UserError
from common.files import read_json


def checkpoint_file(source: str, name: str) -> str | None:
    """Path of a file of a checkpoint folder or hub id (downloaded once), None when the checkpoint has no such file."""
    if os.path.isdir(source):
        path = os.path.join(source, name)
        return path if os.path.isfile(path) else None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(f"{source}: no such folder, and no hub id (owner/name) either")
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False)


def read_tensors(source: str, prefixes: tuple[str, ...] = ("",)):
    """Yield (name, tensor) under the prefixes; shards that hold none of them are neither opened nor downloaded."""
    index = checkpoint_file(source, "model.safetensors.index.json")
    if index:
        weight_map = read_json(index)["weight_map"]
        shards = sorted({file for name, file in weight_map.items() if name.startswith(prefixes)})
    else:
        shards = ["model.safetensors"]
    for shard in shards:
        if os.path.basename(shard) != shard:
            raise UserError(f"{index}: names a file outside its folder: {shard!r}")
        path = checkpoint_file(source, shard)
        if path is None:
            raise UserError(f"{source}: {shard} is missing; download the checkpoint again (safetensors only)")
        try:
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if name.startswith(prefixes)]
            for name in names:
                with safe_open(path, "pt") as file:  # anew: pages once read stay resident while a file is open
                    yield name, file.get_tensor(name)
        except SafetensorError as fault:
            raise UserError(f"{path}: damaged ({fault}); download or copy it again") from fault


def read_config(source: str, kinds: tuple[str, ...]):
    """config.json of a folder or hub id as a transformers config; its model_type must be one of kinds."""
    if checkpoint_file(source, "config.json") is None:
        raise UserError(f"{source}: no config.json; a folder written by save_pretrained, or a hub id, is wanted")
    config = AutoConfig.from_pretrained(source, local_files_only=os.path.isdir(source))
    if config.model_type not in kinds:
        raise UserError(f"{source}: a {config.model_type} model; wanted {' or '.join(kinds)}")
    return config


def located(source: str) -> str:
    """A checkpoint's name for config.json: the next stage may run from another folder."""
    return os.path.abspath(source) if os.path.isdir(source) else source


@torch.no_grad()
def copy_weights(own: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copies tensors into `own`, in place: the same names and shapes on both sides, or UserError naming the first."""
    for name in sorted(own.keys() | tensors.keys()):
        wanted, found = (tuple(side[name].shape) if name in side else None for side in (own, tensors))
        if wanted == found:
            continue
        what = f"{found}, want {wanted}"
        if found is None:
            what = "missing"
        if wanted is None:
            what = "one too many"
        raise UserError(f"{where}: weights do not fit the model, first {name} is {what}")
    for name, weight in own.items():
        weight.copy_(tensors[name])
