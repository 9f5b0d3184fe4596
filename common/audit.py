"""Which queries does half of the question answer? Ranks by the reference alone and by the text alone.

Two kinds of halves. frozen: the features of the image, of the text and their sum, by the untrained encoders of the
checkpoint's backbone. trained: the checkpoint itself, with an empty text, or without an image as far as it can: a
BLIP text encoder that attends to none, a CLIP whose image feature is zero."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.retrieval import Ranks, Way, mean_recalls, recalls

AUDIT_KS = (1, 5, 10)  # a query is answered by half of it where the right image is among so many
# What is counted as one half, by the name of its way; "frozen sum" is shown beside them and is no half
HALVES = ("frozen image", "frozen text", "trained image", "trained text")
RULE = (
    "answered by one modality at K: the image alone or the text alone, frozen or trained, ranks a right image among "
    "the first K of the protocol's own gallery"
)


class Audited(NamedTuple):
    """One benchmark, audited."""

    name: str  # of its category; empty where there is but one
    ranks: Ranks  # of the system, given the whole query
    alone: dict[str, torch.Tensor]  # way -> (N,) rank of the best ranked right image


def ways_alone(model: torch.nn.Module | None, plain: torch.nn.Module) -> dict[str, Way]:
    """The ways to ask with half of the query, and the sum of the frozen halves.

    model: the trained one, None for a plain system; plain: its backbone before training, with target() and text()."""

    def image(tokens: torch.Tensor, deltas: list[str]) -> torch.Tensor:
        return plain.target(tokens)

    def text(tokens: torch.Tensor, deltas: list[str]) -> torch.Tensor:
        return F.normalize(plain.text(deltas, tokens.device).float(), dim=1)

    def both(tokens: torch.Tensor, deltas: list[str]) -> torch.Tensor:
        return F.normalize(image(tokens, deltas) + text(tokens, deltas), dim=1)

    def trained_image(tokens: torch.Tensor, deltas: list[str]) -> torch.Tensor:
        return model.compose(tokens, [""] * len(deltas))

    def trained_text(tokens: torch.Tensor, deltas: list[str]) -> torch.Tensor:
        if hasattr(model, "ground"):  # blip_tdm: without an image it has a text encoder of its own to ask
            return F.normalize(model.text(deltas, tokens.device).float(), dim=1)
        return model.compose(torch.zeros_like(tokens), deltas)

    ways = {"frozen image": image, "frozen text": text, "frozen sum": both}
    return ways | ({"trained image": trained_image, "trained text": trained_text} if model is not None else {})


def answered(alone: dict[str, torch.Tensor], k: int, kinds: tuple[str, ...] = HALVES) -> torch.Tensor:
    """(N,) bool: one of the halves ranks a right image among the first k."""
    hits = [ranks <= k for name, ranks in alone.items() if name in kinds]
    return torch.stack(hits).any(0)


def audit(parts: list[Audited], dataset: str) -> dict:
    """For metrics.json: {"rule", "share": {K: {way: percent}}, "rest": {K: {"queries", "metrics"}}}.

    share: of the queries of all parts together. rest: the system over the queries that no half answers; metrics are
    empty where a category has none left, as their mean would be another."""
    record = {"rule": RULE, "share": {}, "rest": {}}
    for k in AUDIT_KS:
        one, rest = [answered(part.alone, k) for part in parts], []
        share = {}
        for way in parts[0].alone:
            share[way] = _percent([part.alone[way] <= k for part in parts])
        for kind in ("frozen", "trained"):
            halves = tuple(half for half in HALVES if half.startswith(kind) and half in parts[0].alone)
            if halves:
                share[f"{kind} image or text"] = _percent([answered(part.alone, k, halves) for part in parts])
        record["share"][str(k)] = share | {"one modality": _percent(one)}
        for part, hit in zip(parts, one, strict=True):
            if not hit.all():
                rest.append(recalls(part.ranks.of(~hit), dataset))
        metrics = mean_recalls(rest, dataset) if len(rest) == len(parts) else {}
        record["rest"][str(k)] = {"queries": int(sum((~hit).sum() for hit in one)), "metrics": metrics}
    return record


def _percent(hits: list[torch.Tensor]) -> float:
    return 100.0 * torch.cat(hits).double().mean().item()


def audit_tables(record: dict, metrics: dict[str, float]) -> list[tuple[str, list, list]]:
    """(title, headers, rows) of the shares and of the metrics over the rest; metrics: those over all queries."""
    ways = list(next(iter(record["share"].values())))
    shares = [[way, *(share[way] for share in record["share"].values())] for way in ways]
    table = ("percent of the queries that half of the question answers", ["", *(f"K={k}" for k in AUDIT_KS)], shares)
    rest = []
    for k, part in record["rest"].items():
        rest.append([f"K={k}", *(part["metrics"].get(key, "") for key in metrics), part["queries"]])
    return [table, ("over the queries that one modality does not answer", ["", *metrics, "queries"], rest)]
