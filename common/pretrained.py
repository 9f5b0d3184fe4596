"""Model folders and hub ids of others: configuration and weights, read strictly, and nothing of them ever run.

One reader for all: transformers is given a checked configuration and the tensors, never the folder or the hub id. So no
file of a folder is executed (auto_map), none outside it is opened, and nothing is asked of a conversion service."""

import os
import pickle
import struct
import warnings
from collections.abc import Callable, Iterator

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CONFIG_MAPPING

from common.console import UserError, reason_of
from common.files import read_json
from common.hub import checkpoint_file, has_file, named

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # whole, or in shards beside NAME.index.json; the first wins
_MOST_LAYERS, _LARGEST_SIZE = 1000, 2**20  # of any model read here: Llama 3 has 126 layers, 128,256 words
_HARMLESS = 2**22  # weights that may be built for nothing
_FOREIGN = frozenset(  # entries of config.json that choose code or files, now or in a later transformers
    "auto_map attn_implementation _attn_implementation experts_implementation _experts_implementation custom_pipelines "
    "fusion_config kernel_config transformers_weights name_or_path _name_or_path _commit_hash".split()
)
_SIZES = frozenset(
    "hidden_size intermediate_size vocab_size embedding_size projection_dim image_text_hidden_size head_dim image_size "
    "patch_size encoder_hidden_size num_attention_heads num_key_value_heads num_query_tokens num_channels hidden_sizes "
    "num_hidden_layers depths".split()
)
# what transformers raises, depending on the entry, where a configuration makes no sense
_SENSELESS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


# no report, no bar and no advice from transformers: what matters is said in a line of ours
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# ---- weights ----
def weight_files(source: str, prefixes: tuple[str, ...] = ("",), flag: str = "") -> list[str]:
    """Names of the files that hold the tensors under the prefixes; UserError where it is not clear which these are."""
    name = named(source, flag)
    for whole in _WEIGHTS:
        index = f"{whole}.index.json"
        if has_file(source, whole, flag) and has_file(source, index, flag):
            raise UserError(f"{name} holds {whole} and {index}: which of them is the model? remove the other")
        if has_file(source, whole, flag):
            return [whole]
        if has_file(source, index, flag):
            return _shards(checkpoint_file(source, index, flag), name, prefixes)
    wanted = " or ".join(_WEIGHTS)
    raise UserError(f"{name}: {_WEIGHTS[0]} is missing; wanted {wanted}, whole or in shards: download it again")


def _shards(index: str, source: str, prefixes: tuple[str, ...]) -> list[str]:
    """The shards of an index that hold a tensor under the prefixes."""
    record = read_json(index)
    weight_map = record.get("weight_map") if isinstance(record, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f'{index}: no "weight_map" of tensor names and files; download the checkpoint again')
    for shard in weight_map.values():
        if os.path.basename(shard) != shard or os.path.splitext(shard)[1] not in (".safetensors", ".bin"):
            raise UserError(f"{index}: names a file outside its folder, or none of weights: {shard!r}")
    shards = sorted({shard for tensor, shard in weight_map.items() if tensor.startswith(prefixes)})
    if not shards:
        wanted = ", ".join(filter(None, prefixes)) or "any name"
        raise UserError(f"{source}: {os.path.basename(index)} has no tensor under {wanted}: another model's index?")
    return shards


def read_tensors(source: str, prefixes: tuple[str, ...] = ("",), flag: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) under the prefixes; shards that hold none of them are neither opened nor downloaded."""
    seen: dict[str, str] = {}
    for file in weight_files(source, prefixes, flag):
        path = checkpoint_file(source, file, flag)
        if path is None:
            raise UserError(f"{named(source, flag)}: {file} is missing, which its index names; download it again")
        for name, tensor in (_read_bin if file.endswith(".bin") else _read_safetensors)(path, prefixes):
            if name in seen:
                raise UserError(f"{named(source, flag)}: {seen[name]} and {file} both hold {name}; download it again")
            seen[name] = file
            yield name, tensor


def _read_safetensors(path: str, prefixes: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefixes)]
        for name in names:
            with safe_open(path, "pt") as file:  # anew: pages once read stay resident while a file is open
                yield name, file.get_tensor(name)
    except SafetensorError as fault:
        raise UserError(f"{path}: damaged ({fault}); download or copy it again") from None


@torch.no_grad()
def copy_weights(own: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copies tensors into `own`, in place: the same names and shapes on both sides, or UserError naming the first."""
    for name in own | tensors:  # in the model's order
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


def _read_bin(path: str, prefixes: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """A file of torch.save that holds tensors by name; weights_only: nothing in it is executed."""
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # files of before torch 1.6 are not, and cannot be mapped
    try:
        with warnings.catch_warnings(action="ignore"):  # of what a damaged file seems to be
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        why = "damaged, or it holds more than tensors, and nothing in it is run"
        raise UserError(f"{path}: {why}; download it again, or take safetensors") from None
    except (*_SENSELESS, EOFError, OSError, struct.error) as fault:
        raise UserError(f"{path}: damaged ({reason_of(fault)}); download or copy it again") from None
    tensors = isinstance(state, dict) and all(isinstance(x, torch.Tensor) for x in state.values())
    if not tensors or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path}: wanted tensors by name; it holds something else")
    for name in list(state):
        tensor = state.pop(name)
        if name.startswith(prefixes):
            yield name, tensor


def read_exactly(
    source: str,
    shapes: dict[str, tuple[int, ...]],
    prefixes: tuple[str, ...] = ("",),
    optional: dict[str, tuple[int, ...]] | None = None,
    ignored: tuple[str, ...] = (),
    flag: str = "",
) -> Iterator[tuple[str, torch.Tensor]]:
    """read_tensors, strictly: every name in shapes once, in its shape, those in `optional` at most once, and no other
    but what ends like `ignored`.

    UserError after the last tensor if one was missing: what was filled until then is not to be used."""
    missing, name = set(shapes), named(source, flag)
    shapes = shapes | (optional or {})
    for key, tensor in read_tensors(source, prefixes, flag):
        if key not in shapes and key.endswith(ignored or "\n"):
            continue
        if key not in shapes or tuple(shapes[key]) != tuple(tensor.shape):
            here = tuple(shapes[key]) if key in shapes else "no such weight"
            raise UserError(f"{name}: {key} is {tuple(tensor.shape)} in the file, {here} by config.json")
        missing.discard(key)
        yield key, tensor
    if missing:
        raise UserError(f"{name}: {len(missing)} weights are not in the files, first {min(missing)}")


def build_empty(build: Callable, source: str, flag: str, *given, **how) -> nn.Module:
    """build(*given, **how) on the meta device: shapes alone, nothing is allocated. UserError if the config is none."""
    try:
        with torch.device("meta"):
            return build(*given, **how)
    except _SENSELESS as fault:
        raise UserError(f"{named(source, flag)}: no model can be built by config.json ({reason_of(fault)})") from None


def require_held(model: nn.Module, source: str, flag: str) -> None:
    """UserError where a model of shapes alone has far more weights than its files have bytes.

    A size that config.json leaves out is the usual, large one: of ViT-g it would take a minute to fill."""
    described = sum(weight.numel() for weight in model.parameters())
    there = _bytes_there(source) if os.path.isdir(source) else 0
    if there and described > 8 * max(there, _HARMLESS):
        raise UserError(_too_large(named(source, flag), described, there))


def _bytes_there(source: str) -> int:
    """Of all files of weights in a folder; 0 where it has none."""
    files = [entry.name for entry in os.scandir(source) if entry.name.endswith((".safetensors", ".bin"))]
    return sum(os.path.getsize(path) for path in (checkpoint_file(source, file) for file in files) if path)


def _too_large(name: str, described: int, there: int) -> str:
    return (
        f"{name}: config.json describes a model of {described:.1e} weights or more, the "
        f"files hold {there:.1e} bytes: a file is cut, or two models are mixed; download it again"
    )


def load_model(kind: type, source: str, config, dtype: torch.dtype, flag: str = "", **how: str) -> nn.Module:
    """What kind.from_pretrained(source) gives, from our reader: every weight in its shape, or UserError.

    kind: a class of transformers. Names that differ (a prefix, an older spelling) are mapped as transformers maps them;
    tensors that the class has no place for (the other tower, a classifier's head) are left out, as there."""
    require_held(build_empty(kind, source, flag, config), source, flag)
    name, tensors = named(source, flag), dict(read_tensors(source, flag=flag))
    how |= {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    try:
        model, info = kind.from_pretrained(None, config=config, state_dict=tensors, **how)
    except _SENSELESS as fault:
        raise UserError(f"{name}: config.json describes no {kind.__name__} ({reason_of(fault)})") from None
    if info["mismatched_keys"]:  # named without their own prefixes, with both shapes
        key, there, here = min(info["mismatched_keys"])
        raise UserError(f"{name}: {key} is {tuple(there)} in the file, {tuple(here)} by config.json")
    if missing := sorted(info["missing_keys"]):  # they would be random, with a warning
        why = "another model's files?" if len(missing) >= len(dict(model.named_parameters())) else "copy it again"
        raise UserError(f"{name}: {len(missing)} weights are missing for {kind.__name__}, first {missing[0]}; {why}")
    if info.get("error_msgs"):
        raise UserError(f"{name}: {info['error_msgs'][0]}")
    return model


# ---- configuration ----
def read_record(source: str, flag: str = "") -> dict:
    """config.json as it stands; it names a model_type."""
    path = checkpoint_file(source, "config.json", flag)
    if path is None:
        name = named(source, flag)
        raise UserError(f"{name}: no config.json; a folder written by save_pretrained, or a hub id, is wanted")
    record = read_json(path, 2**26)
    if not isinstance(record, dict) or not isinstance(record.get("model_type"), str):
        raise UserError(f'{path}: no "model_type"; a folder written by save_pretrained, or a hub id, is wanted')
    return record


def model_kind(source: str, flag: str = "") -> str:
    """The model_type of a folder or hub id, such as "clip" or "blip"."""
    return read_record(source, flag)["model_type"]


def read_config(source: str, kinds: tuple[str, ...], flag: str = ""):
    """config.json of a folder or hub id as a transformers config; its model_type must be one of kinds.

    Entries that name code or files are left out: none of them describes the model."""
    record, name = read_record(source, flag), named(source, flag)
    if record["model_type"] not in kinds:
        raise UserError(f"{name}: a {record['model_type']} model; wanted {' or '.join(kinds)}")
    if record.get("quantization_config"):
        raise UserError(f"{name}: its weights are quantised already; name the plain model (--quantize makes it small)")
    _check_sizes(record, f"{name}: config.json")
    if os.path.isdir(source):
        _check_described(record, source, flag)
    try:
        return CONFIG_MAPPING[record["model_type"]].from_dict(_clean(record))
    except _SENSELESS as fault:
        raise UserError(f"{name}: config.json is no {record['model_type']}'s ({reason_of(fault)})") from None


def _clean(record: dict) -> dict:
    return {k: _clean(v) if isinstance(v, dict) else v for k, v in record.items() if k not in _FOREIGN}


def _check_sizes(record: dict, where: str) -> None:
    """Sizes are whole numbers from 1, and sane: a model of 2 billion layers would take hours to fail."""
    for key, value in record.items():
        if isinstance(value, dict):
            _check_sizes(value, where)
        if key not in _SIZES or value is None:
            continue
        most = _MOST_LAYERS if key in ("num_hidden_layers", "depths") else _LARGEST_SIZE
        for number in value if isinstance(value, list) and value else [value]:
            if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= most:
                raise UserError(f"{where} says {key} {str(value)[:60]}; wanted whole numbers from 1 to {most:,}")


def _check_described(record: dict, source: str, flag: str) -> None:
    """A part that would hold far more weights than the files have bytes is not what they hold: stop before building."""
    there = _bytes_there(source)
    for part in (record, *(value for value in record.values() if isinstance(value, dict))):
        if there and _described(part) > 8 * max(there, _HARMLESS):
            raise UserError(_too_large(named(source, flag), _described(part), there))


def _described(part: dict) -> int:
    """Weights that a part's own entries describe, counted from below: matrices of layers, words, positions."""

    def size(key: str) -> int:
        value = part.get(key)
        return max(value) if isinstance(value, list) else value or 0

    width, mlp, layers = size("hidden_size"), size("intermediate_size"), size("num_hidden_layers")
    patches = (size("image_size") // (size("patch_size") or 1 << 30)) ** 2
    stages = zip(part.get("depths") or (), part.get("hidden_sizes") or (), strict=False)
    convolutions = sum(depth * channels**2 for depth, channels in stages) // 4
    return layers * width * (width + 2 * mlp) + width * (size("vocab_size") + patches) + convolutions
