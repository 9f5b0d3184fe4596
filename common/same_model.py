"""Whether a checkpoint still stands on the LLM and the vision side that it was trained on: a quick hash of each.

A model folder has gigabytes, and a run should start in seconds. So a few thousand bytes of every tensor are hashed,
with its name, dtype and shape, and what config.json says of its use. The hash is that of the model, not of its files:
it is the same in another folder, in other shards, as .bin and as .safetensors. Training on changes all numbers of a
matrix; a change of a few inside of one is not seen."""

import ctypes
import hashlib
import os
from collections.abc import Iterable

import torch

from common.console import UserError
from common.hub import named
from common.pretrained import read_config, read_tensors

PIECE = 8192  # bytes hashed at each end of a tensor; a norm of LLaMA-2's is shorter than both [ours]
KINDS = {"llm": ("llama",), "vision": ("instructblip", "blip-2")}  # model_type of what --llm and --vision name
PREFIXES = {"llm": ("",), "vision": ("vision_model.", "qformer.", "query_tokens")}  # of the weights that are read
STORED = {"llm": ("rotary_emb.inv_freq",), "vision": ("position_ids",)}  # in older files, and none of the weights
_USE = "hidden_act rms_norm_eps layer_norm_eps num_attention_heads num_key_value_heads image_size patch_size".split()
_ROPE = "rope_type rope_theta factor low_freq_factor high_freq_factor original_max_position_embeddings".split()


def models_sha256(models: dict) -> dict[str, str]:
    """{"llm": hash, "vision": hash} of the models whose places a stage's config.json, or `models`, names by these."""
    return {role: _model_sha256(models[role], role) for role in KINDS}


def require_same_models(config: dict, checkpoint: str) -> dict[str, str]:
    """models_sha256 of what a checkpoint's config.json (of read_stage) names; UserError where it was trained on others.

    One from before their hashes were kept passes."""
    found = models_sha256(config)
    then = config.get("models_sha256", found)
    for role in KINDS:
        if not isinstance(then, dict) or then.get(role) != found[role]:
            what = "other weights, the same in another precision, or used otherwise (heads, activation, positions)"
            flag = f"--{role}"
            raise UserError(
                f"{named(config[role], flag)} is not the model that {checkpoint} was trained on: {what}; "
                f"name that one by {flag}"
            )
    return found


def _model_sha256(source: str, role: str) -> str:
    flag = f"--{role}"
    config = read_config(source, KINDS[role], flag)
    parts = [config] if role == "llm" else [config.vision_config, config.qformer_config]
    rope = getattr(config, "rope_parameters", None) or {}
    use = [[getattr(part, name, None) for name in _USE] for part in parts], [rope.get(name) for name in _ROPE]
    left_out = STORED[role] + (("lm_head.weight",) if role == "llm" and config.tie_word_embeddings else ())
    tensors = read_tensors(source, PREFIXES[role], flag)
    return ends_sha256((item for item in tensors if not item[0].endswith(left_out)), repr(use))


def ends_sha256(tensors: Iterable[tuple[str, torch.Tensor]], more: str = "") -> str:
    """16 hex digits from (name, tensor) in any order: names, dtypes, shapes, the first and last PIECE bytes of each."""
    parts = []
    for name, tensor in tensors:
        _read_no_more(tensor)
        data = tensor.flatten().view(torch.uint8)
        digest = hashlib.sha256(data[:PIECE].numpy())
        digest.update(data[max(PIECE, len(data) - PIECE) :].numpy())
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest.hexdigest()}")
    return hashlib.sha256("\n".join([more, *sorted(parts)]).encode()).hexdigest()[:16]


def _read_no_more(tensor: torch.Tensor) -> None:
    """A tensor mapped from a file: where a page of it is touched the system reads that page, and not megabytes around
    it, as it does on some disks. A hint alone: what it answers does not matter."""
    page = os.sysconf("SC_PAGE_SIZE")
    first = tensor.data_ptr() // page * page
    length = tensor.data_ptr() + tensor.nbytes - first
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), 1)  # MADV_RANDOM
