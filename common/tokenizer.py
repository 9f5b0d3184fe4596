"""The tokenizer of a model folder or hub id: read from its known files alone, and checked against the model."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.console import UserError
from common.files import read_json
from common.hub import checkpoint_file, named

_SPELLED = {
    "clip": ("vocab.json", "merges.txt"),
    "blip": ("vocab.txt",),
    "blip-2": ("vocab.txt",),
}  # what does in place of tokenizer.json
_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt "
    "chat_template.jinja".split()
)
_FOREIGN = ("auto_map", "init_inputs", "name_or_path")  # of tokenizer_config.json: code and places, as are *_file(s)
_LIMIT = 2**28  # bytes of a tokenizer's file; that of Llama 3 has 17 MB
_FEWEST = 0.9  # share of the model's words that its tokenizer must know: BLIP's lacks two, padded ones some hundreds
_PROBE = "make it red"  # a delta: what comes back from its ids must be the text


def read_tokenizer(source: str, config, vocab_size: int, flag: str = ""):
    """The tokenizer that AutoTokenizer gives for the folder or hub id of a model with vocab_size word embeddings.

    UserError where files are missing, halved or damaged, or do not go with the model: each makes [UNK] of words, and a
    model trained on that looks whole. config: the model's, as read_config gives it."""
    name = named(source, flag)
    spelled = _SPELLED.get(config.model_type, ())
    with _clean_folder(source, flag) as folder:
        there = set(os.listdir(folder))
        if "tokenizer.json" not in there and not (spelled and there >= set(spelled)):
            wanted = " or ".join(filter(None, ("tokenizer.json", " with ".join(spelled))))
            raise UserError(f"{name}: its tokenizer has no {wanted}; download or copy the folder again")
        if config.model_type == "siglip":  # AutoTokenizer wants sentencepiece, tokenizer.json does not
            tokenizer, said = _load(PreTrainedTokenizerFast, folder, name)
        else:
            tokenizer, said = _load(AutoTokenizer, folder, name, config=config)
        if said != _PROBE and "tokenizer.json" in there:
            # transformers 5.17 reads a LLaMA's ByteLevel tokenizer as if it wrote "▁" for a space, and loses all spaces
            tokenizer, said = _load(PreTrainedTokenizerFast, folder, name)
        if said != _PROBE:
            raise UserError(
                f'{name}: its tokenizer makes "{said}" of "{_PROBE}"; it is not the one of an English model, '
                "or its files are damaged: download them again"
            )
    _check_words(tokenizer, vocab_size, name)
    tokenizer.name_or_path = source
    return tokenizer


@contextmanager
def _clean_folder(source: str, flag: str) -> Iterator[str]:
    """A folder with the tokenizer's own files and nothing else: no file of code, no entry that names a place."""
    with tempfile.TemporaryDirectory() as folder:
        for file in _FILES:
            path = checkpoint_file(source, file, flag)
            if path is None:
                continue
            if os.path.getsize(path) > _LIMIT:
                raise UserError(f"{named(path, flag)}: {os.path.getsize(path):,} bytes are no tokenizer's")
            record = read_json(path) if file.endswith(".json") else {}
            if not isinstance(record, dict):
                raise UserError(f"{named(path, flag)}: wanted a JSON object, found {type(record).__name__}")
            if file == "tokenizer_config.json":
                record = {k: v for k, v in record.items() if k not in _FOREIGN and not k.endswith(("_file", "_files"))}
                Path(folder, file).write_text(json.dumps(record), encoding="utf-8")
            else:
                shutil.copyfile(path, Path(folder, file))
        yield folder


def _load(kind: type, folder: str, name: str, **how) -> tuple:
    """The tokenizer, and what it says after reading the probe."""
    try:
        tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **how)
        ids = tokenizer(_PROBE, add_special_tokens=False, split_special_tokens=True).input_ids
        return tokenizer, tokenizer.decode(ids).strip().lower()  # BLIP's knows no capitals
    except Exception as fault:  # the library tokenizers, written in Rust, raises nothing narrower
        why = " ".join(str(fault).split())[:200] or type(fault).__name__
        raise UserError(f"{name}: its tokenizer cannot be read ({why}); download or copy the folder again") from None


def _check_words(tokenizer, vocab_size: int, name: str) -> None:
    """Its words are nearly as many as the model's, none lies beyond them, and merges lead to those of a BPE."""
    record = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab, added = record["model"]["vocab"], record["added_tokens"]
    vocab = vocab if isinstance(vocab, dict) else {word: i for i, (word, _) in enumerate(vocab)}
    words = {*vocab, *(token["content"] for token in added)}
    if len(words) < _FEWEST * vocab_size:
        raise UserError(
            f"{name}: its tokenizer knows {len(words):,} words, its model {vocab_size:,}: the files of the "
            "tokenizer are cut, or another model's; download them again"
        )
    # a special token of the text itself is split into letters: only those that a stage puts there reach the model
    own = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    own |= set() if tokenizer.pad_token_id is None else {tokenizer.cls_token_id, tokenizer.sep_token_id}
    reach = {*vocab.values(), *(token["id"] for token in added if not token["special"] or token["id"] in own)}
    if max(reach) >= vocab_size:
        raise UserError(
            f"{name}: its tokenizer has the id {max(reach):,}, its model embeds {vocab_size:,} words: "
            "the files of two models are mixed; download them again"
        )
    if record["model"]["type"] == "BPE":
        lost = _unreachable(record["model"], {token["content"] for token in added})
        if lost > (1 - _FEWEST) * len(vocab):
            raise UserError(
                f"{name}: no merge leads to {lost:,} of its tokenizer's {len(vocab):,} words: merges.txt "
                "or tokenizer.json is cut; download it again"
            )


def _unreachable(model: dict, added: set[str]) -> int:
    """Words of a BPE of more than one character that no merge makes; bytes and special tokens need none."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    made = {"".join(pair) for pair in pairs}
    suffix = model.get("end_of_word_suffix") or ""
    several = (word for word in model["vocab"] if len(word.removesuffix(suffix)) > 1 and word not in added)
    return sum(word not in made and not (word.startswith("<0x") and word.endswith(">")) for word in several)


def tokenizer_sha256(tokenizer) -> str:
    """sha256 of all that makes ids of a text: words, merges, normaliser, added and special tokens.

    What a call leaves behind (truncation, padding) is no part of it."""
    record = json.loads(tokenizer.backend_tokenizer.to_str())
    record |= {"truncation": None, "padding": None}
    if isinstance(merges := record["model"].get("merges"), list):  # "a b" and ["a", "b"] are two spellings of one
        record["model"]["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in names}
    return hashlib.sha256(json.dumps([record, special], sort_keys=True).encode()).hexdigest()


def require_same(tokenizer, config: dict, checkpoint: str) -> None:
    """A checkpoint's tokenizer is the one that it was trained with (config.json says which since its hash is kept)."""
    if config.get("tokenizer_sha256") not in (None, tokenizer_sha256(tokenizer)):
        where = tokenizer.name_or_path
        raise UserError(f"{checkpoint} was trained with another tokenizer than {where} holds now; restore that one")
