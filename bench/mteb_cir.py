"""A checkpoint of train_cir.py as a model of MTEB: nDCG@10 of its tasks of composed image retrieval.

    pip install mteb                      # 2.26 was tried; torch and transformers stay as they are
    python bench/mteb_cir.py --checkpoint out/cir --root data/cirr                        # a task made of CIRR's layout
    python bench/mteb_cir.py --checkpoint out/cir --tasks CIRRIT2IRetrieval,FashionIQIT2IRetrieval          # of the hub

Without --tasks the annotations under ROOT become a task of MTEB's own class: each query a picture with its text, the
gallery as corpus, the reference in it, as in M-BEIR. MTEB encodes, ranks and scores; the same number comes from our own
ranking, and the run stops if the two differ. Of the tasks of the hub MTEB's number alone is printed.
"""

import sys

import measure  # noqa: F401  first: it puts the repository on the path

from common.console import UserError, run, say

NAME = "local/vdg-cir"  # MTEB wants owner/name
DIGITS = 1e-5  # MTEB rounds to five places
ENCODING = {"batch_size": 32}


class CirEncoder:
    """What MTEB calls an encoder: pictures of the corpus -> targets, pictures with texts -> composed queries."""

    def __init__(self, model, compute):
        self.model, self.compute = model.eval(), compute

    def encode(self, inputs, *, prompt_type=None, **ignored):
        """inputs: batches {"image": [picture], "text": [str]}, texts for queries alone -> float32 (N, d) on the CPU."""
        import torch

        rows = []
        for batch in inputs:
            pixels = torch.stack([self.model.preprocess(picture.convert("RGB")) for picture in batch["image"]])
            with torch.no_grad(), self.compute.autocast():
                tokens, found = self.model.image(pixels.to(self.compute.device))
                if getattr(prompt_type, "value", prompt_type) == "query":
                    found = self.model.compose(tokens, list(batch["text"]))
            rows.append(found.float().cpu())
        return torch.cat(rows)

    def similarity(self, queries, images):
        """Cosines: both are of length 1."""
        import torch

        return torch.as_tensor(queries).float() @ torch.as_tensor(images).float().T

    def similarity_pairwise(self, queries, images):
        import torch

        return (torch.as_tensor(queries).float() * torch.as_tensor(images).float()).sum(-1)

    @property
    def mteb_model_meta(self):
        from mteb.models.model_meta import ModelMeta

        return ModelMeta.create_empty({"name": NAME, "revision": "local", "modalities": ["image", "text"]})


def stand_in(benchmark):
    """A task of MTEB's class for composed retrieval, of a benchmark's queries, gallery and right answers."""
    from datasets import Dataset, Features, Image, Value
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.tasks import CIRRIT2IRetrieval

    def pictures(names):
        return [benchmark.images.open(name) for name in names]

    queries = {"id": [str(query.id) for query in benchmark.queries], "text": [q.delta for q in benchmark.queries]}
    queries["image"] = pictures(query.reference for query in benchmark.queries)
    corpus = {"id": list(benchmark.gallery), "image": pictures(benchmark.gallery)}
    columns = {"id": Value("string"), "image": Image()}
    split = {
        "queries": Dataset.from_dict(queries, features=Features(columns | {"text": Value("string")})),
        "corpus": Dataset.from_dict(corpus, features=Features(columns)),
        "relevant_docs": {str(query.id): {query.target: 1} for query in benchmark.queries},
        "top_ranked": None,
    }

    class StandIn(AbsTaskRetrieval):
        metadata = CIRRIT2IRetrieval.metadata.model_copy(update={"name": "CirStandIn"})

        def load_data(self, *given, **ignored) -> None:
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return StandIn()


def our_ndcg(model, benchmark, compute, k: int = 10) -> float:
    """Mean of 1 / log2(1 + rank), 0 beyond the k-th: one right answer a query; the reference stays in the gallery."""
    import torch

    from common.retrieval import embed_ways, index, rank, whole_query

    at = index(benchmark, True)
    with torch.no_grad():
        (queries,), images = embed_ways(model, benchmark, at, compute, [whole_query(model)])
    ranks = rank(queries @ images[: at.gallery].T, at.target)
    return torch.where(ranks <= k, 1 / torch.log2(1 + ranks.double()), 0.0).mean().item()


def scores_of(tasks: list, encoder: CirEncoder) -> dict[str, float]:
    """Task -> nDCG@10 as MTEB computes it, nothing read from or written to its cache."""
    import mteb

    found = mteb.evaluate(encoder, tasks, encode_kwargs=dict(ENCODING), cache=None, co2_tracker=False)
    results = {result.task_name: result.scores["test"] for result in found.task_results}
    if several := [name for name, scores in results.items() if len(scores) != 1]:
        raise UserError(f"{', '.join(several)}: several subsets, and one number is wanted; name a task of one")
    return {name: scores[0]["ndcg_at_10"] for name, scores in results.items()}


def read_task(dataset: str, root: str, images: str, split: str, category: str):
    """The one benchmark that the stand-in is made of; every query has a target in the gallery."""
    from common.annotations import read_benchmarks

    (benchmark, *more) = read_benchmarks(dataset, root, split, category, images, "split")
    if more or dataset == "circo":
        raise UserError(f"--dataset {dataset} --category {category}: wanted cirr, or one category of fashioniq")
    gallery = set(benchmark.gallery)
    if lost := [query.id for query in benchmark.queries if query.target not in gallery]:
        raise UserError(f"{benchmark.title}: {len(lost)} queries have no right answer in the gallery, first {lost[0]}")
    return benchmark


def main() -> None:
    flags = {"checkpoint": "", "backbone": "", "tasks": "", "dataset": "cirr", "root": "", "images": "", "split": "val"}
    given = measure.arguments(__doc__, **flags, category="dress", batch=32, dtype="auto")
    try:
        import mteb
    except ImportError as fault:
        raise UserError(f"this wants MTEB ({fault}): pip install mteb") from None
    import torch

    from common.cir_model import one_vector
    from common.encoding import Compute
    from train_cir import load_cir

    if not given.checkpoint or bool(given.tasks) == bool(given.root):
        raise UserError("name a --checkpoint, and either --tasks of the hub or the --root of annotations")
    ENCODING["batch_size"] = given.batch
    compute = Compute.on(torch.device(given.device), given.dtype, given.batch, 0)
    model = load_cir(given.checkpoint, given.device, given.backbone)
    one_vector(model, "bench/mteb_cir.py")
    encoder = CirEncoder(model, compute)
    if given.tasks:
        tasks = mteb.get_tasks(tasks=given.tasks.split(","))
        for name, value in scores_of(list(tasks), encoder).items():
            say(f"{name}: nDCG@10 {100 * value:.3f}")
        return
    benchmark = read_task(given.dataset, given.root, given.images, given.split, given.category)
    ours = our_ndcg(model, benchmark, compute)
    (theirs,) = scores_of([stand_in(benchmark)], encoder).values()
    counts = f"{len(benchmark.queries):,} queries, {len(benchmark.gallery):,} pictures"
    say(f"{benchmark.title}: nDCG@10 {100 * theirs:.3f} by MTEB {mteb.__version__}, {100 * ours:.3f} here; {counts}")
    if abs(theirs - ours) > DIGITS:
        raise UserError(
            f"{benchmark.title}: MTEB's nDCG@10 differs from ours by {abs(theirs - ours):.1e}: equal scores?"
        )


if __name__ == "__main__":
    sys.exit(run(main))
