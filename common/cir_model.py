"""What all CIR models share: a frozen CLIP or BLIP of Hugging Face, texts as ids, tau, and what of it trains."""

import os
from collections.abc import Container

import torch
from torch import Tensor, nn

from common.console import UserError, say, warn
from common.files import load_tensors, read_saved_json, tensors_sha256
from common.hub import locate, located, near
from common.images import Preprocess
from common.pretrained import copy_weights, load_model, model_kind, read_config
from common.tokenizer import read_tokenizer, tokenizer_sha256


class Directed(nn.Embedding):
    """A word embedding (V, D) with two more learned rows: id -1 is [FORWARD], id -2 is [BACKWARD] [Bi].

    Not ids V and V + 1: CLIP finds the end of a text by its largest id."""

    def __init__(self, words: nn.Embedding):
        super().__init__(*words.weight.shape, words.padding_idx, _weight=words.weight)
        self.weight = words.weight
        self.directions = nn.Parameter(torch.randn(2, self.embedding_dim) * words.weight.std().item())

    def forward(self, ids: Tensor) -> Tensor:
        direction = self.directions[(-1 - ids).clamp(min=0)]
        return torch.where(ids[..., None] < 0, direction, super().forward(ids.clamp(min=0)))


class CirModel(nn.Module):
    """A frozen model of Hugging Face; who inherits says what of it trains. Weights are fp32, the caller takes autocast.

    tokens(pixels): what a query needs of an image; target(tokens): its frozen feature (B, d) in a gallery, normalised;
    compose(tokens of references, deltas): the queries; reversed_loss: which target, changed by the reversed text, gives
    the reference? (kernels/reversed.py); tau (): temperature of the losses, a parameter where it is learned."""

    directed = False
    factorises = (
        False  # whether reversed_loss composes a text with all targets at the price of one, so without candidates
    )
    vectors = 1  # of a picture in a gallery; with more, target gives (B, vectors, d) and the best of them counts

    def set_tau(self, tau: float, learned: bool) -> None:
        if learned:
            self.tau = nn.Parameter(torch.tensor(tau))
        else:
            self.register_buffer("tau", torch.tensor(tau), persistent=False)  # it moves with the model

    @torch.no_grad()
    def clamp_tau(self) -> None:
        """Keeps a learned temperature within the bounds of the release."""
        if self.tau.requires_grad:
            self.tau.clamp_(0.001, 0.5)

    def load(self, kind: type, source: str, text_length: int, **how: str) -> None:
        """self.backbone, frozen, in fp32, with tokenizer and preprocess, from a folder or hub id.

        kind: the class of transformers; text_length: tokens of a text, 0 = all that it has positions for."""
        if (found := model_kind(source, "--backbone")) != (wanted := kind.config_class.model_type):
            raise UserError(f"--backbone {source} is a {found} model, wanted {wanted}: fix it or --model")
        config = read_config(source, (wanted,), "--backbone")
        self.source = source
        self.backbone = load_model(kind, source, config, torch.float32, "--backbone", **how).requires_grad_(False)
        text = config.qformer_config if wanted == "blip-2" else config.text_config  # Blip-2's is that of another LLM
        self.tokenizer = read_tokenizer(source, config, text.vocab_size, "--backbone")
        self.preprocess = Preprocess.from_folder(source, kind.__name__)
        positions = text.max_position_embeddings
        if text_length > positions:
            raise UserError(f"--text_length {text_length}: the text encoder has {positions} positions")
        self.length = text_length or positions

    def direct(self, embeddings: nn.Module, name: str) -> None:
        """Gives the text encoder's embedding its two directions: one leads every text from now on."""
        setattr(embeddings, name, Directed(getattr(embeddings, name)))
        self.directed, self.length = True, self.length - 1

    def tokenize(self, texts: list[str], device, backward: bool = False) -> tuple[Tensor, Tensor]:
        """-> ids (B, T), mask (B, T), right-padded to the longest; with directions, one behind the first token."""
        # split_special_tokens: a caption that spells "[SEP]" or "<|endoftext|>" must not end the text
        how = {"padding": True, "truncation": True, "max_length": self.length, "split_special_tokens": True}
        rows = self.tokenizer(texts, return_tensors="pt", **how).to(device)
        ids, mask = rows.input_ids, rows.attention_mask
        if self.directed:
            way = torch.full_like(ids[:, :1], -2 if backward else -1)
            ids = torch.cat([ids[:, :1], way, ids[:, 1:]], dim=1)
            mask = torch.cat([mask[:, :1], mask], dim=1)
        return ids, mask

    def too_long(self, texts: list[str]) -> list[str]:
        """The texts that tokenize() cuts."""
        rows = self.tokenizer(texts, split_special_tokens=True).input_ids
        return [text for text, ids in zip(texts, rows, strict=True) if len(ids) > self.length]

    def unknown(self, texts: list[str]) -> list[str]:
        """The texts that hold a token of which the vocabulary knows nothing, such as an emoji in BERT's."""
        one, ends = self.tokenizer.unk_token_id, (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id)
        if one is None or one in ends:  # CLIP's knows every byte
            return []
        rows = self.tokenizer(texts, split_special_tokens=True).input_ids
        return [text for text, ids in zip(texts, rows, strict=True) if one in ids]

    def say_losses(self, texts: list[str]) -> None:
        """A line each if texts are cut, or hold what the tokenizer does not know."""
        if cut := self.too_long(texts) if texts else []:
            say(f"{len(cut):,} of {len(texts):,} deltas lose what exceeds {self.length} tokens: {cut[0][:60]!r}")
        if strange := self.unknown(texts) if texts else []:
            what = f"{len(strange):,} of {len(texts):,} deltas hold words or signs that the text encoder does not know"
            warn(f"{what}, which all look alike to it: {strange[0][:60]!r}")

    def train(self, mode: bool = True) -> "CirModel":
        super().train(mode)
        self.backbone.vision_model.eval()  # frozen [S3.3]: its dropout, if any, stays off
        return self

    @torch.no_grad()
    def image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, S, S) -> tokens (B, ...), target (B, d) normalised."""
        tokens = self.tokens(pixels)
        return tokens, self.target(tokens)


def inner(model: nn.Module) -> CirModel:
    """The CIR model itself: eval_cir.py wraps a plain backbone, which then has no text or target of its own."""
    return getattr(model, "model", model)


def one_vector(model: nn.Module, what: str) -> None:
    """UserError where the model gives a picture several vectors, which `what` cannot use."""
    if (count := inner(model).vectors) > 1:
        raise UserError(f"{what} wants one vector a picture, --model qformer has {count}; take another checkpoint")


# ---- a checkpoint's config.json ----


def read_settings(checkpoint: str) -> dict:
    """config.json of a folder written by train_cir.py: "build" (arguments of build_cir), "tau", and more."""
    file = f"{checkpoint}/config.json"
    if not os.path.isfile(file):
        raise UserError(f"{file} not found; wanted a finished checkpoint of train_cir.py")
    config = read_saved_json(checkpoint)
    build = config.get("build") if isinstance(config, dict) else None
    if not isinstance(build, dict) or not isinstance(build.get("backbone"), str):
        raise UserError(f"{file} is not one of train_cir.py")
    if not all(isinstance(config.get(key, {}), dict) for key in ("near", "constants")):
        raise UserError(f'{file}: "near" and "constants" are objects where train_cir.py wrote them; restore the file')
    if not isinstance(config.get("tau"), float):
        raise UserError(f'{file} has no "tau", the temperature that the model was trained with; train it again')
    return config


def places_near(build: dict, checkpoint: str) -> dict[str, str]:
    """For config.json: its folders as seen from the checkpoint; they are found again when all moves together."""
    return {key: near(build[key], checkpoint) for key in ("backbone", "start") if build.get(key)}


def find_again(config: dict, checkpoint: str, backbone: str) -> dict:
    """config["build"] with the places of today; backbone: the value of --backbone, if it was given."""
    build, beside = config["build"], config.get("near", {})
    found = {"backbone": locate(build["backbone"], checkpoint, "--backbone", backbone, beside.get("backbone", ""))}
    if build.get("start"):
        found["start"] = locate(build["start"], checkpoint, "--start_from", beside=beside.get("start", ""))
    return build | found


def places_of(backbone: str, start: str, usual: str) -> dict[str, str]:
    """For build_cir: --backbone, else what START_FROM stands on, else the usual one; and START_FROM."""
    if backbone:
        model_kind(backbone, "--backbone")  # UserError before any picture is looked at
    found = find_again(read_settings(start), start, backbone)["backbone"] if start else located(backbone)
    return {"backbone": found or usual, "start": located(start)}


# ---- what of it trains ----


def trained_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def get_trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained weights, by name, on the CPU."""
    return {name: p.detach().cpu().clone() for name, p in trained_of(model).items()}


def put_trained(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Overwrites exactly the trained weights; UserError naming the first difference."""
    copy_weights(trained_of(model), tensors, where)


# what of config.json shapes a feature and does not show in the weights
_SHAPING = ("hidden_act", "layer_norm_eps", "num_attention_heads", "image_size", "patch_size", "eos_token_id")


def frozen_sha256(model: CirModel, words: bool = True, held: Container[str] | None = None, shaping: bool = True) -> str:
    """sha256 of what a checkpoint stands on but does not hold: frozen weights, preprocessing of pictures, tokenizer,
    and what the backbone's config.json says of how they are used.

    held: names of the weights that it does hold, where the model does not say by what it trains. words, shaping: False
    leaves out the tokenizer and the config, as older checkpoints do."""
    named = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    if held is not None:
        named = [(name, p) for name, p in model.named_parameters() if name.startswith("backbone.") and name not in held]
    more = model.preprocess.described() + (tokenizer_sha256(model.tokenizer) if words else "")
    return tensors_sha256(sorted(named), more + (_shaping_of(model.backbone.config) if shaping else ""))


def _shaping_of(config) -> str:
    parts = [config, config.text_config, config.vision_config, *filter(None, [getattr(config, "qformer_config", None)])]
    return repr([[getattr(part, name, None) for name in _SHAPING] for part in parts])


def start_from(model: CirModel, checkpoint: str) -> None:
    """Copies the weights of a checkpoint of train_cir.py over those of the same names, frozen or not.

    First those that it started from itself. UserError where the model stands on other weights than the checkpoint."""
    config = read_settings(checkpoint)
    build, beside = config["build"], config.get("near", {})
    if build.get("start"):
        start_from(model, locate(build["start"], checkpoint, "--start_from", beside=beside.get("start", "")))
    tensors = load_tensors(checkpoint, "model.safetensors")
    if bool(build.get("directions")) != model.directed:
        has = "with" if build.get("directions") else "without"
        raise UserError(
            f"--start_from {checkpoint} was trained {has} --bidirectional: take both with it, or both without"
        )
    if not stands_on(model, config, tensors):
        remedy = "leave --backbone out, or name the one it was trained on, and --pad as there"
        raise UserError(f"--start_from {checkpoint} stands on other frozen weights than {model.source} holds: {remedy}")
    own = {name: p for name, p in model.named_parameters() if name in tensors}
    copy_weights(own, tensors, f"--start_from {checkpoint}")


def stands_on(model: CirModel, config: dict, held: Container[str] | None = None) -> bool:
    """Whether a checkpoint with this config.json was trained on the model's frozen weights; held: of frozen_sha256."""
    trained_on = config.get("constants", {}).get("FROZEN_SHA256")
    if trained_on is None:
        return True
    older = ({"shaping": False}, {"shaping": False, "words": False})  # from before these were hashed as well
    return any(trained_on == frozen_sha256(model, held=held, **how) for how in ({}, *older))


def check_frozen(model: CirModel, config: dict, folder: str) -> None:
    """UserError if the model stands on other frozen weights than the checkpoint in `folder` was trained on."""
    if not stands_on(model, config):
        on = " or ".join(filter(None, (model.source, config["build"].get("start"))))
        raise UserError(f"{folder} was trained on other frozen weights than {on} holds now; train it again")
