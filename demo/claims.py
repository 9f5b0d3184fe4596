"""The papers' claims, and this repository's own, on a world of pictures: each over seeds, with an interval.

    python demo/claims.py --seeds 3                        # the drawn world: docs/claims.md, out/claims
    python demo/claims.py --only concat,bank               # these alone
    python demo/claims.py --world photos --data FOLDER --llm out/smollm2 --seeds 3 --out out/claims-photos

A claim says that one arm finds more than another. An arm is a model and how it is asked, or a set of deltas. What a
demo of that seed has made (demo.sh, demo/photos.sh; run where it is not there) is taken from its folder; what an arm
needs besides is a *part*: one command line of a stage, most of them a row of the demo with other flags. Arms of a claim
see the same seed: world, VDG, order and start. So the interval is of paired differences, Student's t, 95 %.

A part lies in a folder whose name holds a hash of its command, of the parts it stands on, and of the demo's world, VDG
and models: what is there is not made again, and a stopped run goes on. Retrieval is measured on val; the training step
is chosen on dev. No flag was chosen by a result below.
"""

import glob
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from common.console import UserError, run, say
from common.files import file_sha256, read_json, read_jsonl, write_json, write_text
from common.flags import at_least, override, read_flags
from demo import report

WORLD = "drawn"  # "drawn" (demo.sh) or "photos" (demo/photos.sh, which wants DATA and LLM)
SEEDS = 5  # seeds 0, 1, ...: each another world, other triplets, other weights; 10 at most
ONLY = ()  # names of claims; empty: all but augment-long, or on photographs the main ones
DEMOS = "out"  # folder of the demos
OUT = "out/claims"  # folder of the parts, claims.json, claims.md, claims.png, and demos.md: the demos' tables as one
PAGE = "docs/claims.md"  # page whose table of this world is written anew at the end of a whole run; empty: none
JOBS = 2  # parts made at a time, one thread each
DATA = ""  # folder of the catalogue (demo/products.py); the drawn world wants it for the claim in-domain alone
LLM = ""  # folder of a pretrained language model; the drawn world wants it for the claims named llm... alone


# ---- parts: one command line each ----
class Part(NamedTuple):
    """{name} in flags stands for the folder of a part; {demo}, {world}, {models}, {seed} for the demo's, {elsewhere}
    for a world of the other kind."""

    stage: str  # the program, with OUT and SEED added
    flags: str
    like: str = ""  # of train_cir.py: a row of the demo, whose constants hold but for flags


_TUNE = "--aligned {demo}/align --dataset cirr --root {world}/cirr --split train --held_out 0 --views 2 "
_TUNE += "--dtype {dtype} "
_LONG = _TUNE + "--warmup 20 --epochs {tune_epochs} --decay_at 0.7 --batch {tune_batch} --lr {tune_lr} "
_CAPTIONS = "--vision {models}/instructblip --chat {world}/chat/chat.json --images {world}/chat/images --keep true "
_OTHER = _TUNE.replace("{demo}/align", "{align-llm}").replace("{dtype}", "{llm_dtype}")
_MORE = ("{world}/cirr", "{more}/cirr")  # replaced by: four times the human triplets, of which the first are its own
_LINEARS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
_RANK = "--lora_rank 16 --lora_targets " + _LINEARS
_OTHER_LONG = "--epochs 8 --warmup 20 --decay_at 0.7 --batch 8 --lr 1e-3 " + _RANK
_SAY = "--max_new {max_new} --dtype {dtype} "
_HELD = "--triplets cirr/val --root {world}/cirr --max_pairs 500 "
_AUX = "--images {world}/aux --subgroups {subgroups} "
_TWICE = "--images {world}/aux --subgroups {twice} "
_FAR = "--images {elsewhere}/aux --subgroups {subgroups} "
_BOTH = "--pseudo_images {world}/aux" + os.pathsep + "{world}/cirr/img_raw"
_FAR_IMAGES = "--pseudo_images {elsewhere}/aux"
_STAGE2 = "--model combiner --train_text false --start_from "  # the Combiner behind stage I's text encoder, as in [Bi]
_VDG_BACK = "--bidirectional 0.5 --reversed_text delta --same_deltas false --same_pairs {back-train}/pseudo.jsonl"
PARTS = {
    # pseudo triplets of another kind
    "mined-random": Part(
        "mine_pairs.py",
        "--images {world}/aux --encoder {models}/resnet --exclude {world}/cirr/img_raw --max_shared 3 --grouping false",
    ),
    "pseudo-random": Part("gen_deltas.py", "--vdg {demo}/vdg --pairs {mined-random}/pairs.jsonl " + _AUX + _SAY),
    "pseudo-eighth": Part("demo/part_of.py", "--of {demo}/pseudo --share 0.125"),
    "pseudo-half": Part("demo/part_of.py", "--of {demo}/pseudo --share 0.5"),
    "pseudo-double": Part("gen_deltas.py", "--vdg {demo}/vdg --pairs {demo}/mined/pairs.jsonl " + _TWICE + _SAY),
    "pseudo-fifth-shuffled": Part("demo/part_of.py", "--of {demo}/pseudo --shuffled 0.2"),
    "pseudo-shuffled": Part("demo/part_of.py", "--of {demo}/pseudo --shuffled 0.5"),
    "pseudo-most-shuffled": Part("demo/part_of.py", "--of {demo}/pseudo --shuffled 0.8"),
    "pseudo-true": Part("demo/part_of.py", "--of {demo}/pseudo --true {world} --kind {kind}"),
    "pseudo-once": Part("demo/part_of.py", "--of {demo}/pseudo --also {world}/cirr"),
    "pseudo-kept": Part(
        "eval_cir.py",
        "--checkpoint {demo}/cir/combiner-same --filter {demo}/pseudo --filter_top 2 --images {world}/aux",
    ),
    # a gallery of another kind: photographs for drawings, drawings for photographs
    "photographs": Part("demo/catalogue.py", "--data {data} --chat 1 --train 1 --dev_groups 1 --val_groups 1"),
    "drawings": Part("demo/world.py", "--chat 1 --train 1 --dev_groups 1 --val_groups 1"),
    "mined-elsewhere": Part("mine_pairs.py", "--images {elsewhere}/aux --encoder {models}/resnet --max_shared 3"),
    "pseudo-elsewhere": Part("gen_deltas.py", "--vdg {demo}/vdg --pairs {mined-elsewhere}/pairs.jsonl " + _FAR + _SAY),
    # other VDGs
    "vdg-untuned": Part("vdg_tune.py", _TUNE + "--epochs 1 --lr 1e-12"),  # LoRA starts at 0 and stays there
    "vdg-rank2": Part("vdg_tune.py", _LONG + "--lora_rank 2 --lora_targets " + _LINEARS),
    "vdg-linears": Part("vdg_tune.py", _LONG + _RANK),
    "vdg-queries": Part("vdg_tune.py", _LONG + "--lora_rank 16 --lora_targets q_proj,v_proj"),
    "align-llm": Part("vdg_align.py", _CAPTIONS + "--llm {llm} --epochs 8 --batch 8 --lr 2e-3 --dtype {llm_dtype}"),
    "vdg-llm": Part("vdg_tune.py", _OTHER + _OTHER_LONG),
    "held-llm": Part("gen_deltas.py", "--vdg {vdg-llm} --max_new 32 --dtype {llm_dtype} " + _HELD),
    "more": Part("demo/world.py", "--train 1200 --chat 1 --aux 1 --dev_groups 1 --val_groups 1"),
    "vdg-more": Part("vdg_tune.py", _LONG.replace(*_MORE).replace("{tune_epochs}", "3") + _RANK),
    "vdg-llm-more": Part("vdg_tune.py", _OTHER.replace(*_MORE) + _OTHER_LONG.replace("epochs 8", "epochs 2")),
    "held-more": Part("gen_deltas.py", "--vdg {vdg-more} " + _HELD + _SAY),
    "held-llm-more": Part("gen_deltas.py", "--vdg {vdg-llm-more} --max_new 32 --dtype {llm_dtype} " + _HELD),
    "held-untuned": Part("gen_deltas.py", "--vdg {vdg-untuned} " + _HELD + _SAY),
    "held-rank2": Part("gen_deltas.py", "--vdg {vdg-rank2} " + _HELD + _SAY),
    "held-linears": Part("gen_deltas.py", "--vdg {vdg-linears} " + _HELD + _SAY),
    "held-queries": Part("gen_deltas.py", "--vdg {vdg-queries} " + _HELD + _SAY),
    "held-hot": Part("gen_deltas.py", "--vdg {demo}/vdg --temperature 1 " + _HELD + _SAY),
    "back-train": Part("gen_deltas.py", "--vdg {demo}/vdg --triplets cirr/train --root {world}/cirr --reverse " + _SAY),
    "back-val": Part("gen_deltas.py", "--vdg {demo}/vdg --triplets cirr/val --root {world}/cirr --reverse " + _SAY),
    # Combiners, all on supervised + VDG deltas + auxiliary but for one thing
    "no-grouping": Part("train_cir.py", "--pseudo {pseudo-random}/pseudo.jsonl", "combiner-auxiliary"),
    "no-concat": Part("train_cir.py", "--concat false", "combiner-auxiliary"),
    "eighth": Part("train_cir.py", "--pseudo {pseudo-eighth}/pseudo.jsonl", "combiner-auxiliary"),
    "half": Part("train_cir.py", "--pseudo {pseudo-half}/pseudo.jsonl", "combiner-auxiliary"),
    "double": Part("train_cir.py", "--pseudo {pseudo-double}/pseudo.jsonl", "combiner-auxiliary"),
    "fifth-shuffled": Part("train_cir.py", "--pseudo {pseudo-fifth-shuffled}/pseudo.jsonl", "combiner-auxiliary"),
    "shuffled": Part("train_cir.py", "--pseudo {pseudo-shuffled}/pseudo.jsonl", "combiner-auxiliary"),
    "most-shuffled": Part("train_cir.py", "--pseudo {pseudo-most-shuffled}/pseudo.jsonl", "combiner-auxiliary"),
    "true": Part("train_cir.py", "--pseudo {pseudo-true}/pseudo.jsonl", "combiner-auxiliary"),
    "far": Part("train_cir.py", "--pseudo {pseudo-elsewhere}/pseudo.jsonl " + _FAR_IMAGES, "combiner-auxiliary"),
    "filtered": Part("train_cir.py", "--pseudo {pseudo-kept}/pseudo.jsonl", "combiner-auxiliary"),
    "no-augment": Part("train_cir.py", "--augment false", "combiner-auxiliary"),
    "no-jitter": Part("train_cir.py", "--jitter 0", "combiner-auxiliary"),
    "no-crop": Part("train_cir.py", "--crop_scale 1.0,1.0 --crop_ratio 1.0,1.0", "combiner-auxiliary"),
    "no-moves": Part("train_cir.py", "--flip 0 --translate 0 --rotate 0", "combiner-auxiliary"),
    "long": Part("train_cir.py", "--steps 240 --val_every 15", "combiner-auxiliary"),
    "long-no-augment": Part("train_cir.py", "--steps 240 --val_every 15 --augment false", "combiner-auxiliary"),
    "frozen-text": Part("train_cir.py", "--train_text false", "combiner-auxiliary"),
    "beta": Part("train_cir.py", "--beta 0.5", "combiner-auxiliary"),
    "bank": Part("train_cir.py", "--bank true", "combiner-auxiliary"),
    # BLIP with target-delta matching
    "no-tdm": Part("train_cir.py", "--tdm false", "blip_tdm-auxiliary"),
    "plain-nce": Part("train_cir.py", "--beta 0", "blip_tdm-auxiliary"),
    "published-nce": Part("demo/as_released.py hn-nce", "", "blip_tdm-auxiliary"),
    "mild-negatives": Part("demo/as_released.py negatives", "", "blip_tdm-auxiliary"),
    "cls": Part("train_cir.py", "--first_token cls", "blip_tdm-auxiliary"),
    "true-blip": Part("train_cir.py", "--pseudo {pseudo-true}/pseudo.jsonl", "blip_tdm-auxiliary"),
    "once": Part("train_cir.py", "--pseudo {pseudo-once}/pseudo.jsonl " + _BOTH, "blip_tdm-only"),
    # bi-directional training, on the human triplets alone: stage I, and the Combiner behind it
    "sum": Part("train_cir.py", "--model sum", "combiner-supervised"),
    "sum-token": Part("train_cir.py", "--model sum --bidirectional 0.5", "combiner-supervised"),
    "sum-normalised": Part("demo/as_released.py normalised", "--model sum --bidirectional 0.5", "combiner-supervised"),
    "sum-heavy": Part("train_cir.py", "--model sum --bidirectional 2", "combiner-supervised"),
    "sum-vdg": Part("train_cir.py", "--model sum " + _VDG_BACK, "combiner-supervised"),
    "sum-all": Part("train_cir.py", "--model sum", "combiner-auxiliary"),
    "stage2": Part("train_cir.py", _STAGE2 + "{sum}", "combiner-supervised"),
    "stage2-token": Part("train_cir.py", _STAGE2 + "{sum-token} --bidirectional 0.5", "combiner-supervised"),
}


# ---- claims ----
class Arm(NamedTuple):
    """A row of the demo, a part, or "" for plain `ask`; a part of gen_deltas.py is measured by "precision"."""

    of: str
    ask: str = ""  # further flags of eval_cir.py
    metric: str = "mean"  # of R@1, R@5 and R@10; or one of eval_cir.py's; or precision, recall of deltas


class Claim(NamedTuple):
    says: str
    of: str  # where it is from
    less: Arm
    more: Arm


_ALL_C, _ALL_B = "combiner-auxiliary", "blip_tdm-auxiliary"
_BACK, _BY_VDG = "--reversed", "--reversed --reverse_text {back-val}/pseudo.jsonl"
CLAIMS = {
    "same": Claim("Combiner: VDG's deltas beside the human ones of the same pairs help", "Table 2",
                  Arm("combiner-supervised"), Arm("combiner-same")),
    "auxiliary": Claim("Combiner: pairs of unlabelled pictures help further", "Table 2",
                       Arm("combiner-same"), Arm(_ALL_C)),
    "all": Claim("Combiner: all triplets beat the human ones", "Table 2", Arm("combiner-supervised"), Arm(_ALL_C)),
    "all-subset": Claim("... among the subset as well (Rs@1)", "Table 2",
                        Arm("combiner-supervised", metric="Rs@1"), Arm(_ALL_C, metric="Rs@1")),
    "same-blip": Claim("BLIP_tdm: VDG's deltas of the same pairs help", "Table 2",
                       Arm("blip_tdm-supervised"), Arm("blip_tdm-same")),
    "auxiliary-blip": Claim("BLIP_tdm: pairs of unlabelled pictures help further", "Table 2",
                            Arm("blip_tdm-same"), Arm(_ALL_B)),
    "all-blip": Claim("BLIP_tdm: all triplets beat the human ones", "Table 2",
                      Arm("blip_tdm-supervised"), Arm(_ALL_B)),
    "zero-shot": Claim("Combiner: auxiliary triplets alone beat no training (sum of CLIP's features)", "Table 3",
                       Arm("", "--baseline sum --backbone {models}/clip"), Arm("combiner-only")),
    "sum-trained": Claim("The sum of CLIP's features, trained on all triplets, beats the same untrained", "[ours]",
                         Arm("", "--baseline sum --backbone {models}/clip"), Arm("sum-all")),
    "sum-combiner": Claim("The Combiner on all triplets beats the sum trained on them", "[ours]",
                          Arm("sum-all"), Arm(_ALL_C)),
    "human-too": Claim("BLIP_tdm: all triplets beat auxiliary ones alone", "Table 3",
                       Arm("blip_tdm-only"), Arm(_ALL_B)),
    "human-once": Claim("... drawn as often as the auxiliary ones, not as half of each step, human triplets help",
                        "[ours]", Arm("blip_tdm-only"), Arm("once")),
    "human-subset": Claim("Combiner: ... among the subset (Rs@1)", "Table 3",
                          Arm("combiner-only", metric="Rs@1"), Arm(_ALL_C, metric="Rs@1")),
    "grouping": Claim("Pairs of similar pictures beat random pairs", "Table 4", Arm("no-grouping"), Arm(_ALL_C)),
    "concat": Claim("The loss over human and auxiliary triplets together helps", "Table 4",
                    Arm("no-concat"), Arm(_ALL_C)),
    "tdm": Claim("BLIP_tdm: target-delta matching helps", "Table 4", Arm("no-tdm"), Arm(_ALL_B)),
    "tdm-subset": Claim("... among the subset (Rs@1)", "Table 4",
                        Arm("no-tdm", metric="Rs@1"), Arm(_ALL_B, metric="Rs@1")),
    "eighth-half": Claim("More auxiliary triplets: half beats an eighth", "Table 5", Arm("eighth"), Arm("half")),
    "half-all": Claim("... and all beat half", "Table 5", Arm("half"), Arm(_ALL_C)),
    "double": Claim("... and as many again beat all", "Table 8", Arm(_ALL_C), Arm("double")),
    "in-domain": Claim("Auxiliary pictures of the same kind beat foreign ones (photographs, drawings)", "Table 3",
                       Arm("far"), Arm(_ALL_C)),
    "tuning": Claim("Tuning on human triplets makes deltas more right (precision)", "S3.1",
                    Arm("held-untuned", metric="precision"), Arm("heldout", metric="precision")),
    "rank": Claim("LoRA of rank 16 beats rank 2 (precision)", "Table 7",
                  Arm("held-rank2", metric="precision"), Arm("held-linears", metric="precision")),
    "linears": Claim("LoRA on all linears beats queries and values alone (precision)", "[ours]",
                     Arm("held-queries", metric="precision"), Arm("held-linears", metric="precision")),
    "llm": Claim("A general LLM of 135 M weights beats a stand-in of 1 M that read comparisons (precision)", "Table 7",
                 Arm("heldout", metric="precision"), Arm("held-llm", metric="precision")),
    "llm-recall": Claim("... and names more (recall)", "Table 7",
                        Arm("heldout", metric="recall"), Arm("held-llm", metric="recall")),
    "more-human": Claim("Four times the human triplets, in as many steps, make deltas more right (precision)", "[ours]",
                        Arm("held-linears", metric="precision"), Arm("held-more", metric="precision")),
    "llm-more": Claim("... and those of the general LLM (precision)", "[ours]",
                      Arm("held-llm", metric="precision"), Arm("held-llm-more", metric="precision")),
    "llm-more-recall": Claim("... and name more (recall)", "[ours]",
                             Arm("held-llm", metric="recall"), Arm("held-llm-more", metric="recall")),
    "cold": Claim("Temperature 0.2 beats 1 (precision)", "S4.1",
                  Arm("held-hot", metric="precision"), Arm("heldout", metric="precision")),
    "both-ways": Claim("Bi-directional training answers reversed queries (stage I, R@10)", "[Bi] S2",
                       Arm("sum", _BACK, "R@10"), Arm("sum-token", _BACK, "R@10")),
    "forward": Claim("... and forward ones better", "[Bi] Table 1", Arm("sum"), Arm("sum-token")),
    "stage2": Claim("... behind the Combiner as well", "[Bi] Table 1", Arm("stage2"), Arm("stage2-token")),
    "alpha": Claim("A reversed loss of weight 0.5 beats one of 2", "[Bi] S1", Arm("sum-heavy"), Arm("sum-token")),
    "raw-target": Claim("Stage I composes the raw target, as [Bi] prints, not the normalised one of its release",
                        "[ours]", Arm("sum-normalised"), Arm("sum-token")),
    "combiner": Claim("The Combiner beats the sum it starts from", "[Bi] Table 1", Arm("sum"), Arm("stage2")),
    "reversed-text": Claim("VDG's text for the way back finds more than [BACKWARD] and the human text", "[ours]",
                           Arm("sum-token", _BACK), Arm("sum-vdg", _BY_VDG)),
    "hn-nce": Claim("BLIP_tdm: weighing hard negatives more (HN-NCE, beta 0.5) helps", "S6.1",
                    Arm("plain-nce"), Arm(_ALL_B)),
    "hn-nce-right": Claim("BLIP_tdm: HN-NCE as it is defined beats the published code's (beta 0.5)", "[ours]",
                          Arm("published-nce"), Arm(_ALL_B)),
    "negatives": Claim("BLIP_tdm: tdm negatives drawn by similarity / tau beat those by similarity", "[ours]",
                       Arm("mild-negatives"), Arm(_ALL_B)),
    "hn-nce-clip": Claim("Combiner: beta 0 beats 0.5", "S6.1", Arm("beta"), Arm(_ALL_C)),
    "enc": Claim("BLIP_tdm: [ENC] first, as BLIP was trained, beats [CLS]", "[ours]", Arm("cls"), Arm(_ALL_B)),
    "text": Claim("Training the text encoder helps", "S3.3", Arm("frozen-text"), Arm(_ALL_C)),
    "augment": Claim("Augmented pictures help", "S6.1", Arm("no-augment"), Arm(_ALL_C)),
    "augment-light": Claim("... of it contrast, brightness and sharpness", "[ours]", Arm("no-jitter"), Arm(_ALL_C)),
    "augment-crop": Claim("... of it the crop", "S6.1", Arm("no-crop"), Arm(_ALL_C)),
    "augment-moves": Claim("... of it flip, shift and turn", "[ours]", Arm("no-moves"), Arm(_ALL_C)),
    "augment-long": Claim("... in training three times as long they help", "[ours]",
                          Arm("long-no-augment"), Arm("long")),
    "bank": Claim("A bank of further negatives helps", "[ours]", Arm(_ALL_C), Arm("bank")),
    "rerank": Claim("BLIP_tdm: re-ranking the first 50 by the tdm head helps", "[ours]",
                    Arm(_ALL_B), Arm(_ALL_B, "--rerank 50")),
    "filter": Claim("Keeping deltas by which a model finds their target helps", "[ours]", Arm(_ALL_C), Arm("filtered")),
    "noise-fifth": Claim("A fifth of the auxiliary deltas shuffled costs recall", "[ours]",
                         Arm("fifth-shuffled"), Arm(_ALL_C)),
    "noise": Claim("Half of the auxiliary deltas shuffled cost recall", "[ours]", Arm("shuffled"), Arm(_ALL_C)),
    "noise-subset": Claim("... and recall among the subset (Rs@1)", "[ours]",
                          Arm("shuffled", metric="Rs@1"), Arm(_ALL_C, metric="Rs@1")),
    "noise-most": Claim("Four fifths of them shuffled cost recall", "[ours]", Arm("most-shuffled"), Arm(_ALL_C)),
    "true": Claim("Combiner: the world's own texts for auxiliary pairs, where it knows a change, beat VDG's",
                  "[ours]", Arm(_ALL_C), Arm("true")),
    "true-subset": Claim("... among the subset as well (Rs@1)", "[ours]",
                         Arm(_ALL_C, metric="Rs@1"), Arm("true", metric="Rs@1")),
    "true-blip": Claim("BLIP_tdm: the world's own texts for auxiliary pairs, where it knows a change, beat VDG's",
                       "[ours]", Arm(_ALL_B), Arm("true-blip")),
    "all-true": Claim("Combiner: all triplets, auxiliary ones with the world's own texts, beat the human ones",
                      "[ours]", Arm("combiner-supervised"), Arm("true")),
    "all-true-blip": Claim("BLIP_tdm: all triplets, auxiliary ones with the world's own texts, beat the human ones",
                           "[ours]", Arm("blip_tdm-supervised"), Arm("true-blip")),
}  # fmt: skip

# ---- the two worlds: what their demos say of themselves besides, and the claims asked where ONLY names none ----
_WORLDS = {
    "drawn": {
        "demo": "demo", "make": "./demo.sh --seed {seed}", "models": "demo/models", "max_new": 32,
        "tune_epochs": 12, "tune_batch": 16, "tune_lr": "3e-3", "subgroups": 350,
        "twice": 700, "foreign": "photographs",
        "claims": [name for name in CLAIMS if name != "augment-long"],  # which is as dear as ten others
    },
    "photos": {
        "demo": "demo-photos", "make": "demo/photos.sh --seed {seed} --data {data} --llm {llm}",
        "models": "demo/models_photos", "max_new": 20, "tune_epochs": 8, "tune_batch": 8,
        "tune_lr": "1e-3", "subgroups": 300, "twice": 600, "foreign": "drawings",
        "claims": [
            "same", "auxiliary", "all", "all-subset", "same-blip", "auxiliary-blip", "all-blip", "zero-shot",
            "sum-trained", "sum-combiner", "human-too", "human-subset", "grouping", "tuning", "noise", "noise-subset",
            "true", "true-subset", "true-blip", "all-true", "all-true-blip",
        ],
    },
}  # fmt: skip
# Student's t, 97.5 %, by degrees of freedom
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


# ---- one seed of a world ----
class Bench(dict):
    """Names -> folders, which are made when they are asked for; measures arms."""

    def __init__(self, world: str, seed: int):
        settings = _WORLDS[world]
        demo = f"{DEMOS}/{settings['demo']}" + f"-seed-{seed}" * bool(seed)
        if not os.path.exists(os.path.join(ROOT, demo, "metrics.json")):
            words = [word.format(seed=seed, data=DATA, llm=LLM) for word in settings["make"].split()]
            command(words, f"{OUT}/logs/{os.path.basename(demo)}.log", threads=2)
        super().__init__(settings | {"demo": demo, "world": f"{demo}/world", "seed": seed})
        self |= {"kind": world, "data": DATA, "llm": LLM, "dtype": dtype_of(world), "llm_dtype": dtype_of("photos")}
        self.attributes = read_json(f"{demo}/world/attributes.json")
        self.folder = f"{OUT}/{os.path.basename(demo)}-{self.stands_on()}"
        self.locks: dict[str, Lock] = defaultdict(Lock)
        usual = {flag.name: flag.default for flag in read_flags(f"{ROOT}/train_cir.py")}  # Python 3.11: not in threads
        self.usual = {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()}

    def stands_on(self) -> str:
        """Hash of what parts take from the demo: its world, VDG, deltas and rows, and the backbones."""
        models = (f"{self['models']}/{name}/model.safetensors" for name in ("clip", "blip", "resnet", "instructblip"))
        files = [f"{self['world']}/attributes.json", f"{self['demo']}/vdg/manifest.json", *models]
        files += [f"{self['demo']}/{name}/pseudo.jsonl" for name in ("pseudo", "heldout")]
        files += sorted(glob.glob(f"{self['demo']}/cir/*/manifest.json"))
        return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()[:8]

    def __missing__(self, name: str) -> str:
        if name == "elsewhere":
            return self[self["foreign"]]
        if name not in PARTS:
            return f"{self['demo']}/" + ("cir/" if "-" in name else "") + name
        part = PARTS[name]
        flags = [word.format_map(self) for word in part.flags.split()]
        return self.made(name, [*part.stage.split(), *self.constants(part.like), *flags])

    def constants(self, row: str) -> list[str]:
        """The flags that a row of the demo was trained with, but for OUT and SEED."""
        if not row:
            return []
        stored = read_json(f"{self['demo']}/cir/{row}/config.json")["constants"]
        usual = self.usual
        changed = {n: v for n, v in stored.items() if n in usual and n not in ("OUT", "SEED") and v != usual[n]}
        return [f"--{name.lower()}={value}" for name, value in changed.items()]

    def made(self, name: str, words: list[str]) -> str:
        """The folder that a command line has filled."""
        words = [*words, "--seed", str(self["seed"])]
        out = f"{self.folder}/{name}-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:8]}"
        with self.locks[out]:
            if not os.path.exists(f"{out}.json"):
                started = time.monotonic()
                command([sys.executable, *words, "--out", out], f"{out}.log")
                write_json(f"{out}.json", {"words": words, "seconds": round(time.monotonic() - started)})
        return out

    def value(self, arm: Arm) -> float:
        """What an arm scores, in percent."""
        if arm.metric in ("precision", "recall"):
            deltas = read_jsonl(f"{self[arm.of]}/pseudo.jsonl")
            return report.judge(deltas, self.attributes, report.JUDGES[self["kind"]])[arm.metric]
        checkpoint = ["--checkpoint", self[arm.of]] if arm.of else []
        asked = [*checkpoint, *arm.ask.format_map(self).split()]
        words = f"eval_cir.py --dataset cirr --root {self['world']}/cirr --split val --official false --show 0".split()
        metrics = read_json(f"{self.made('eval-' + (arm.of or 'plain'), [*words, *asked])}/metrics.json")["metrics"]
        return sum(metrics[f"R@{k}"] for k in (1, 5, 10)) / 3 if arm.metric == "mean" else metrics[arm.metric]


def dtype_of(world: str) -> str:
    """What the language model of a demo computes in: as demo/photos.sh chooses, or by itself."""
    with open("/proc/cpuinfo") as file:
        fast = re.search("avx512_bf16|amx_bf16", file.read())
    return "bf16" if world == "photos" and fast else "auto"


def command(words: list[str], log: str, threads: int = 1) -> None:
    """One command line; its output goes to a file, whose end is shown if it fails."""
    os.makedirs(os.path.dirname(log), exist_ok=True)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "JOBS": str(JOBS)}
    env |= {"OMP_NUM_THREADS": str(threads)}
    with open(log, "w") as file:
        done = subprocess.run(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=env)
    if done.returncode:
        with open(log, errors="replace") as file:
            raise UserError(f"{' '.join(words)} failed: {file.read()[-600:]}")


# ---- what follows ----
def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval by Student's t; infinite for one seed."""
    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return mean, float("-inf"), float("inf")
    half = _T[count - 1] * statistics.stdev(differences) / count**0.5
    return mean, mean - half, mean + half


def verdict(low: float, high: float) -> str:
    return "holds" if low > 0 else "the contrary" if high < 0 else "undecided"


def table(found: dict[str, list[tuple[float, float]]]) -> list[str]:
    """A line a claim; found: name -> (less, more) of each seed."""
    lines = ["| claim | from | less | more | difference [95 %] | | seeds |", "|---|---|---|---|---|---|---|"]
    for name, values in found.items():
        less, more = (statistics.mean(side) for side in zip(*values, strict=True))
        mean, low, high = interval([b - a for a, b in values])
        between = f" [{low:.1f}, {high:.1f}]" if len(values) > 1 else ""
        claim = CLAIMS[name]
        lines.append(
            f"| {claim.says} (`{name}`) | {claim.of} | {less:.1f} | {more:.1f} | {mean:+.1f}{between} | "
            f"{verdict(low, high)} | {len(values)} |"
        )
    return lines


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def tables_of_demos(demos: list[str]) -> list[str]:
    """The demos' own tables as means over the seeds, with the range of what is judged by."""
    told = [read_json(f"{demo}/metrics.json") for demo in demos]
    names = " | ".join(report.RECALLS)
    lines = [f"| model | trained on | {names} | mean of R@1, 5, 10 (range) |", "|---" * (3 + len(report.RECALLS)) + "|"]
    for of_seeds in zip(*(demo["rows"] for demo in told), strict=True):
        cells = (f"{statistics.mean(row[name] for row in of_seeds):.1f}" for name in report.RECALLS)
        means = spread([row["mean"] for row in of_seeds])
        lines.append(f"| {of_seeds[0]['model']} | {of_seeds[0]['name']} | {' | '.join(cells)} | {means} |")
    lines += ["", "| deltas for | precision (range) | recall (range) |", "|---|---|---|"]
    for name in told[0]["deltas"]:
        scores = (spread([demo["deltas"][name][what] for demo in told]) for what in ("precision", "recall"))
        lines.append(f"| {name} | {' | '.join(scores)} |")
    return lines


def draw(found: dict[str, list[tuple[float, float]]], file: str) -> None:
    """The differences with their intervals, one line a claim."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.27 * len(found) + 1))
    colours = {"holds": "#1a7f37", "the contrary": "#b3261e", "undecided": "#777777"}
    for place, values in enumerate(found.values()):
        mean, low, high = interval([b - a for a, b in values])
        colour = colours[verdict(low, high)]
        if len(values) > 1:
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot(mean, place, "o", color=colour, markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(found)), [f"{CLAIMS[name].says}  ({CLAIMS[name].of})" for name in found], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("points gained, 95 % interval of paired differences", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def parts_of_page() -> tuple[str, str]:
    """PAGE up to this world's table, and what comes behind it."""
    begin, end = f"<!-- {WORLD} -->\n", f"<!-- end of {WORLD} -->"
    with open(PAGE, encoding="utf-8") as file:
        before, _, rest = file.read().partition(begin)
    if end not in rest:
        raise UserError(f"--page {PAGE}: wanted the marks {begin.strip()} and {end} around the table")
    return before + begin, end + rest.partition(end)[2]


def write_results(found: dict[str, list[tuple[float, float]]], demos: list[str]) -> None:
    """claims.json, claims.md, claims.png, demos.md under OUT."""
    lines = table(found)
    write_text(f"{OUT}/demos.md", "\n".join(tables_of_demos(demos)) + "\n")
    write_json(f"{OUT}/claims.json", {"world": WORLD, "less and more of each seed": found}, indent=1)
    write_text(f"{OUT}/claims.md", "\n".join(lines) + "\n")
    draw(found, f"{OUT}/claims.png")


def missing(claim: str) -> str:
    """What a claim wants that the flags do not give, or nothing."""
    of_llm = claim.split("-")[0] == "llm"
    if WORLD == "photos":
        return "it is asked on the drawn world only" if of_llm or claim == "more-human" else ""
    if claim == "in-domain" and not DATA:
        return "it wants --data"
    return "it wants --llm" if of_llm and not LLM else ""


def main() -> None:
    os.chdir(ROOT)  # where the commands run
    at_least(globals(), SEEDS=1, JOBS=1)
    if SEEDS > 10:
        raise UserError(f"--seeds {SEEDS}: the table of Student's t ends with 10; take fewer")
    if WORLD not in _WORLDS:
        raise UserError(f"--world {WORLD}: wanted one of {', '.join(_WORLDS)}")
    if unknown := set(ONLY) - CLAIMS.keys():
        raise UserError(f"--only {', '.join(unknown)}: no such claim; there are {', '.join(CLAIMS)}")
    names = [name for name in CLAIMS if name in (ONLY or _WORLDS[WORLD]["claims"])]
    whole = bool(PAGE) and not ONLY
    for claim in [name for name in names if missing(name)]:
        names.remove(claim)
        say(f"{claim} is left out: {missing(claim)}")
    if not names:
        raise UserError(f"--only {', '.join(ONLY)}: nothing is left to ask")
    if whole:
        parts_of_page()  # a page without marks shows before hours of work
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    demos = []
    for seed in range(SEEDS):
        bench = Bench(WORLD, seed)
        demos.append(bench["demo"])
        arms = list(dict.fromkeys(arm for name in names for arm in (CLAIMS[name].less, CLAIMS[name].more)))
        with ThreadPoolExecutor(JOBS) as pool:
            values = dict(zip(arms, pool.map(bench.value, arms), strict=True))
        for name in names:
            found[name].append((values[CLAIMS[name].less], values[CLAIMS[name].more]))
        write_results(found, demos)
        say(f"seed {seed}: done, {OUT}/claims.md")
    lines = "\n".join(table(found))
    if whole:
        before, behind = parts_of_page()
        write_text(PAGE, f"{before}{lines}\n{behind}")
    say(lines)


if __name__ == "__main__":
    override(globals())
    run(main)
