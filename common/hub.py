"""Where the files of a model lie: a folder, or a hub id (owner/name) that is downloaded once and then read offline."""

from __future__ import annotations

import functools
import os
import re
from typing import NamedTuple

from common.console import UserError
from common.files import read_saved_json

_PATIENCE = 5.0  # seconds for the hub's first answer; after that the cache alone is asked [ours: no 32 s of retries]
_LFS = b"version https://git-lfs"  # how the text file starts that git leaves in place of a large file


class Repository(NamedTuple):
    """One state of a model on the hub, so that all files come from the same."""

    commit: str
    files: frozenset[str]


def checkpoint_file(source: str, name: str, flag: str = "") -> str | None:
    """Path of a file of a checkpoint folder or hub id (downloaded once), None when the checkpoint has no such file.

    flag: what the user gave the source with, such as "--backbone"; an error names it."""
    place = _place(source, flag)
    if isinstance(place, str):
        path = os.path.join(place, name)
        path = path if os.path.isfile(path) else None
    else:
        path = _download(source, name, place.commit, flag) if name in place.files else None
    if path is not None:
        _refuse_pointer(path, flag)
    return path


def has_file(source: str, name: str, flag: str = "") -> bool:
    """Whether the checkpoint has the file; nothing is downloaded for it."""
    place = _place(source, flag)
    return os.path.isfile(os.path.join(place, name)) if isinstance(place, str) else name in place.files


def named(source: str, flag: str) -> str:
    """The source as an error names it: with the flag that gave it."""
    return f"{flag} {source}".strip()


def _place(source: str, flag: str) -> str | Repository:
    """The folder that holds the files (a hub id's in the cache where the hub cannot be asked), or the hub's state."""
    if os.path.isdir(source):
        return source
    if os.path.exists(source):
        raise UserError(f"{named(source, flag)} is a file; the model's folder is wanted, or a hub id (owner/name)")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise UserError(f"{named(source, flag)} cannot be read: no such folder, and no hub id (owner/name) either")
    try:
        return _ask_hub(source)
    except UserError as fault:
        raise UserError(named(str(fault), flag)) from None


@functools.cache
def _ask_hub(source: str) -> str | Repository:
    """One request, once a process; without an answer the folder of the cache."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return _cached(source, "HF_HUB_OFFLINE is set")
    try:
        info = HfApi().model_info(source, timeout=_PATIENCE)
    except RepositoryNotFoundError:
        why = "no such folder here and no such model on the hub (a private one wants `hf auth login`)"
        raise UserError(f"{source}: {why}") from None
    except HFValidationError:
        raise UserError(f"{source}: no such folder, and no hub id (owner/name) either") from None
    except HfHubHTTPError as fault:
        return _cached(source, f"the hub answers {_first_line(fault)}")
    except (HTTPError, LookupError, OSError, TypeError, ValueError) as fault:  # the last: a login page answers instead
        return _cached(source, f"{constants.ENDPOINT} cannot be reached ({_first_line(fault)})")
    files = frozenset(file.rfilename for file in info.siblings or ())
    commit = info.sha
    if "config.json" in files:  # of the branch and not of the commit: then the cache notes which one the branch means
        commit = os.path.basename(os.path.dirname(_download(source, "config.json", None, "")))
    return Repository(commit, files)


def _cached(source: str, why: str) -> str:
    """The folder of the cache that holds what an earlier run downloaded of this model."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "config.json")
    if not isinstance(found, str):
        remedy = "name a folder, or run once where the hub can be reached"
        raise UserError(f"{source}: no such folder, not in the cache, and {why}; {remedy}")
    return os.path.dirname(found)


def _download(source: str, name: str, commit: str | None, flag: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HTTPError

    try:
        return hf_hub_download(source, name, revision=commit)
    except GatedRepoError:
        remedy = f"accept them at https://huggingface.co/{source}, then `hf auth login`"
        raise UserError(f"{named(source, flag)}: its owner wants terms to be accepted; {remedy}") from None
    except (HTTPError, OSError) as fault:
        why = f"{name} could not be downloaded ({_first_line(fault)})"
        raise UserError(f"{named(source, flag)}: {why}; the same command goes on with it") from None


def _first_line(fault: Exception) -> str:
    return (str(fault).strip() or type(fault).__name__).splitlines()[0]


def _refuse_pointer(path: str, flag: str) -> None:
    """A clone without git-lfs holds a small text in place of each large file."""
    with open(path, "rb") as file:
        if file.read(len(_LFS)) == _LFS:
            remedy = f"run `git lfs pull` in {os.path.dirname(path) or '.'}, or download the model anew"
            raise UserError(f"{named(path, flag)} is a git-LFS pointer and not the file itself; {remedy}")


# ---- a model's place in a checkpoint that stands on it ----
def located(source: str) -> str:
    """A checkpoint's name for config.json: the next stage may run from another folder."""
    return os.path.abspath(source) if os.path.isdir(source) else source


def near(source: str, checkpoint: str | os.PathLike) -> str:
    """A folder's path as seen from the checkpoint, kept beside located(): it holds when both move together.

    Empty for a hub id, which needs none."""
    return os.path.relpath(os.path.realpath(source), os.path.realpath(checkpoint)) if os.path.isdir(source) else ""


def locate(saved: str, checkpoint: str | os.PathLike, flag: str, override: str = "", beside: str = "") -> str:
    """Where the model is now that a checkpoint stands on: `saved` is what located() wrote, `beside` what near() wrote.

    In this order: override (the value of `flag`), saved, beside the checkpoint. UserError names the flag."""
    if override:
        return located(override)
    if not isinstance(saved, str) or not isinstance(beside, str):
        raise UserError(f"{checkpoint}/config.json does not say which model it stands on; copy the checkpoint again")
    if not os.path.isabs(saved):  # a hub id
        return saved
    moved = os.path.normpath(os.path.join(checkpoint, beside)) if beside else ""
    for folder in filter(None, (saved, moved)):
        if os.path.isdir(folder):
            return os.path.abspath(folder)
    raise UserError(f"{checkpoint} stands on the model in {saved}, which is not there; name its new place by {flag}")


def read_stage(folder: str, stage: str, llm: str = "", vision: str = "") -> dict:
    """config.json of a checkpoint of ours, which must be of that stage ("align" or "tune").

    llm, vision: where the models that it stands on lie now; empty: where they were, or moved along with it."""
    path = f"{folder}/config.json"
    if not os.path.exists(path):
        raise UserError(f"{path} not found; wanted a finished checkpoint of vdg_{stage}.py")
    config = read_saved_json(folder)
    if not isinstance(config, dict) or config.get("stage") != stage:
        raise UserError(f"{path}: not a checkpoint of vdg_{stage}.py")
    beside = config.get("near", {})
    for model, now in (("llm", llm), ("vision", vision)):
        config[model] = locate(config[model], folder, f"--{model}", now, beside.get(model, ""))
    return config


def card_name(source: str) -> str:
    """The base model as a model card may name it: a hub id; empty for a folder, which nobody else has."""
    return "" if os.path.isabs(source) or os.path.isdir(source) else source
