"""Puts known bugs back, one at a time, and says which test sees each: a suite that lets one live is not enough.

    python tests/mutations.py                    # every variant: about a quarter of an hour on two cores
    python tests/mutations.py --only fsync       # those with this in their name
    python tests/mutations.py --list

A variant is one text replaced in one file of a copy of the tree, in a temporary folder; only the tests meant to catch
it are run there, after they passed on the copy as it is. Exit status 1 if a variant lives. tests/faults/test_faults.py
asks that each text still occurs exactly once, so that the list cannot rot.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 400  # seconds that the tests of a variant may take; a run that hangs is seen too


class Variant(NamedTuple):
    """A bug: `old`, which occurs once in `file`, becomes `new`; `tests` are the node ids below tests/ to run."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FILES, CIR, GEN, EVAL = "test_files.py", "test_train_cir.py", "test_gen_deltas.py", "test_eval_cir.py"
MINE, FAULTS, TUNE = "test_mine_pairs.py", "faults/test_faults.py", "test_vdg_tune.py"

VARIANTS = (
    # ---- saving ----
    Variant(
        "in-place save",
        "common/disk.py",
        'aside = path.with_name(path.name + ".tmp")\n    try:',
        "aside = path\n    try:",
        (f"{FILES}::test_write_text_keeps_the_old_file_when_it_fails",),
    ),
    Variant(
        "no fsync",
        "common/disk.py",
        "            os.fsync(handle)\n",
        "            pass\n",
        (f"{FILES}::test_everything_is_on_disk_before_the_rename",),
    ),
    Variant(
        "no rename of a state",
        "common/files.py",
        'with fresh(last / f"step-{step}.tmp") as aside:',
        'with fresh(last / f"step-{step}") as aside:',
        (f"{FILES}::test_state_round_trip_and_two_are_kept",),
    ),
    Variant(
        "a state written over the one before",
        "common/files.py",
        '    final = last / f"step-{step}"\n',
        '    final = last / f"step-{step}"\n    for old in _steps(out):\n        remove(old)\n',
        (f"{FILES}::test_state_round_trip_and_two_are_kept",),
    ),
    Variant(
        "in-place writes of mining",
        "mine_pairs.py",
        'with whole(path) as aside, open(aside, "wb") as file:',
        'with open(path, "wb") as file:',
        (f"{FAULTS}::test_embeddings_get_their_name_when_they_are_whole",),
    ),
    Variant(
        "mining over what another folder gave",
        "mine_pairs.py",
        'for name in ("images", "encoder_sha256"))',
        'for name in ("encoder_sha256",))',
        (f"{MINE}::test_what_another_folder_or_encoder_gave_is_not_overwritten",),
    ),
    Variant(
        "in-place writes of query files",
        "gen_deltas.py",
        'aside = path.with_suffix(".tmp")',
        "aside = path",
        (f"{FAULTS}::test_query_files_get_their_name_when_they_are_whole",),
    ),
    Variant(
        "torn tail kept",
        "common/files.py",
        "    if keep < len(data):\n",
        "    if keep < 0:\n",
        (f"{FILES}::test_appender_cuts_torn_tails_and_goes_on",),
    ),
    Variant(
        "a short write passes",
        "common/files.py",
        "if os.write(handle, data) != len(data):",
        "if os.write(handle, data) < 0:",
        (f"{FILES}::test_append_on_a_full_disk_leaves_whole_lines",),
    ),
    # ---- resuming ----
    Variant(
        "a damaged result loads",
        "common/files.py",
        "            _verify(path)\n        return load_file(path)",
        "            pass\n        return load_file(path)",
        (f"{FILES}::test_save_folder", f"{FILES}::test_a_half_replaced_folder_is_refused"),
    ),
    Variant(
        "restart from 0 where no state verifies",
        "common/files.py",
        "    if damage:\n",
        "    if damage and not folder:\n",
        (f"{FILES}::test_damaged_checkpoints",),
    ),
    Variant(
        "other constants go on",
        "common/files.py",
        "        if difference:\n            raise",
        "        if difference and not folder:\n            raise",
        (f"{FILES}::test_constants_differ",),
    ),
    Variant(
        "a pickle is run",
        "common/files.py",
        'map_location="cpu", weights_only=True)',
        'map_location="cpu", weights_only=False)',
        (f"{FILES}::test_a_pickle_is_not_executed",),
    ),
    Variant(
        "two runs on one folder",
        "common/files.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        (f"{FILES}::test_lock",),
    ),
    Variant(
        "other settings mix in a part",
        "common/files.py",
        "            if _known_then(fingerprint, found) != fingerprint:\n",
        "            if found == 0:\n",
        (f"{FILES}::test_appender_refuses_another_fingerprint",),
    ),
    Variant(
        "a resume describes all pairs again",
        "gen_deltas.py",
        'if pair["id"] not in done]',
        'if pair["id"] not in {}]',
        (f"{GEN}::test_only_new_pairs_are_generated", f"{GEN}::test_killed_and_resumed_on_other_ranks"),
    ),
    Variant(
        "an id alone makes a pair",
        "common/pairs.py",
        'return pair["id"], pair["reference"], pair["target"]',
        'return (pair["id"],)',
        (f"{GEN}::test_only_new_pairs_are_generated",),
    ),
    # ---- what is drawn ----
    Variant(
        "unseeded random of numpy",
        "common/seeds.py",
        "numpy.random.default_rng(_seed(*keys))",
        "numpy.random.default_rng()",
        ("test_ranks.py::test_seeds_are_functions_of_their_keys",),
    ),
    Variant(
        "unseeded random of torch",
        "common/seeds.py",
        'torch.manual_seed(_seed("step", seed, step, rank))',
        "torch.seed()",
        ("test_ranks.py::test_seeds_are_functions_of_their_keys",),
    ),
    Variant(
        "the same dropout on every rank",
        "common/seeds.py",
        '_seed("step", seed, step, rank)',
        '_seed("step", seed, step)',
        ("test_ranks.py::test_seeds_are_functions_of_their_keys",),
    ),
    Variant(
        "a delta is drawn by its place in the batch",
        "gen_deltas.py",
        'row_key(SEED, pair["id"], direction) for pair in batch',
        "row_key(SEED, number, direction) for number, _ in enumerate(batch)",
        (f"{GEN}::test_batch_size_and_order_change_no_byte",),
    ),
    # ---- what others take over ----
    Variant(
        "a Blip-2 without the LoRA of one linear",
        "vdg_tune.py",
        'if f"{part}A.weight" in lora:',
        'if f"{part}A.weight" in lora and "v_proj" not in part:',
        ("test_blip2.py::test_fifty_greedy_texts_equal_plain_transformers",),
    ),
    Variant(
        "places of i-CIR count pictures outside the database",
        "common/retrieval.py",
        "each = [rank(scores[:, : at.gallery], t, excluded).cpu() for t in known]",
        "each = [rank(scores, t, excluded).cpu() for t in known]",
        ("test_icir.py::test_an_evaluation_equals_brute_force",),
    ),
    Variant(
        "the mean of a picture's vectors",
        "kernels/max_similarity.py",
        ".amax(2)",
        ".mean(2)",
        ("test_qformer.py::test_gallery_features_are_hugging_faces",),
    ),
    Variant(
        "SPRC's second pass sees the reference",
        "common/qformer.py",
        "through_qformer(self.backbone.qformer, again, q, mask)",
        "through_qformer(self.backbone.qformer, again, q, mask, tokens)",
        ("test_qformer.py::test_queries_are_hugging_faces_modules_one_text_at_a_time",),
    ),
    # ---- losses ----
    Variant(
        "per-rank mean loss of stage 1",
        "vdg_align.py",
        "tokens = ranks.all_sum(sum(map(len, answers)))",
        "tokens = sum(map(len, answers)) * world.size",
        ("test_vdg_align.py::test_two_ranks_and_accumulation_equal_one_rank",),
    ),
    Variant(
        "per-rank mean loss of stage 2",
        "vdg_tune.py",
        "tokens = ranks.all_sum(sum(map(len, answers)))",
        "tokens = sum(map(len, answers)) * world.size",
        (f"{TUNE}::test_two_ranks_equal_one_rank",),
    ),
    Variant(
        "per-rank mean of L_tdm",
        "train_cir.py",
        "return losses.sum() / (len(batch.draws) + 2 * len(negatives.rows))",
        "return losses.mean() * (len(batch.own) / len(batch.draws))",
        (f"{FAULTS}::test_l_tdm_is_a_share_of_one_mean_however_the_negatives_lie",),
    ),
    Variant(
        "gradients are not summed over the ranks",
        "train_cir.py",
        "        ranks.all_reduce_gradients(model.parameters())\n",
        "",
        (f"{CIR}::test_two_ranks_equal_one",),
    ),
    Variant(
        "exp, then log",
        "kernels/contrastive_torch.py",
        "    top = s.amax(dim, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)\n",
        "    top = torch.zeros_like(s.amax(dim, keepdim=True))\n",
        ("test_contrastive.py::test_finite_at_cosine_one",),
    ),
    Variant(
        "a positive is summed with the negatives",
        "kernels/contrastive_triton.py",
        "        if (begin <= last_own and end > first_own) or (end > stop or not whole_rows):\n",
        "        if end > stop or not whole_rows:\n",
        ("test_triton_kernels.py::test_kernels_in_the_interpreter",),
    ),
    Variant(
        "a loss that is no number goes on",
        "train_cir.py",
        "        batches.stop_if_not_finite(batch.step + 1, loss.item() + norm, batch.own_draws, log, remedy)\n",
        "",
        (f"{CIR}::test_a_loss_that_is_not_finite_stops_before_the_step",),
    ),
    # ---- models ----
    Variant(
        "mining without eval()",
        "mine_pairs.py",
        "self.requires_grad_(False).to(device).eval()",
        "self.requires_grad_(False).to(device).train()",
        (f"{MINE}::test_end_to_end", f"{MINE}::test_ranks_and_blocks_change_no_byte"),
    ),
    Variant(
        "a gallery without eval()",
        "common/encoding.py",
        "    model.eval()\n",
        "",
        (f"{EVAL}::test_evaluate_on_a_drawn_cirr", "test_encoding.py"),
    ),
    Variant(
        "a CIR model loads without eval()",
        "train_cir.py",
        "    return model.eval().to(device)",
        "    return model.train().to(device)",
        (f"{CIR}::test_a_run_saves_trained_weights_only_and_reloads",),
    ),
    Variant(
        "a VDG loads without eval()",
        "vdg_tune.py",
        "return projector, model.requires_grad_(False).eval(), tokenizer, config",
        "return projector, model.requires_grad_(False).train(), tokenizer, config",
        (f"{TUNE}::test_load_vdg_gives_the_held_out_loss_of_the_run", f"{FAULTS}::test_frozen_models_are_in_eval_mode"),
    ),
    Variant(
        "the Q-Former in train mode",
        "vdg_align.py",
        "        self.eval()  # the Q-Former has dropout 0.1\n",
        "",
        (
            "test_vdg_align.py::test_vision_equals_hugging_face_exactly",
            f"{FAULTS}::test_frozen_models_are_in_eval_mode",
        ),
    ),
    Variant(
        "frozen vision in train mode",
        "common/cir_model.py",
        "        self.backbone.vision_model.eval()",
        "        self.backbone.vision_model.train(mode)",
        (f"{FAULTS}::test_frozen_vision_stays_in_eval_mode_while_the_text_trains",),
    ),
    Variant(
        "[ENC] not set",
        "train_cir.py",
        "        ids[:, 0] = self.first_token  # the",
        "        # the",
        (f"{CIR}::test_blip_equals_its_parts_called_by_hand",),
    ),
    Variant(
        "padding is read as text",
        "train_cir.py",
        "hidden[rows, ..., :length]",
        "0 * hidden[rows, ..., :length]",
        (f"{CIR}::test_blip_equals_its_parts_called_by_hand",),
    ),
    Variant(
        "a token of the prompt sees the one behind it",
        "common/decode.py",
        "torch.arange(stop, device=x.device) <= places[:, None]",
        "torch.arange(stop, device=x.device) <= places[:, None] + 1",
        (f"{GEN}::test_greedy_tokens_equal_those_of_generate",),
    ),
    Variant(
        "gradients of a row's first places alone",
        "kernels/rows.py",
        "        total += tl.sum(",
        "        total = tl.sum(",
        ("test_triton_kernels.py::test_taken_rows_in_the_interpreter",),
    ),
    # ---- mining and ranking ----
    Variant(
        "bf16 mining",
        "mine_pairs.py",
        "embeddings = load_embeddings(OUT)  # (N, D), mapped",
        "embeddings = load_embeddings(OUT).bfloat16().float()",
        (f"{MINE}::test_end_to_end",),
    ),
    Variant(
        "a stage that does not say which it is",
        "train_cir.py",
        'lock_folder(OUT, "cir")',
        "lock_folder(OUT)",
        ("test_machines.py::test_every_stage_says_which_it_is_before_it_writes",),
    ),
    Variant(
        "a pair's own block",
        "kernels/topk_blocks.py",
        "itself = torch.where((itself >= 0) & (itself < len(block)), itself, -1)",
        "itself = torch.where(itself >= 0, itself.clamp(max=len(block) - 1), -1)",
        ("test_topk_blocks.py::test_against_float64",),
    ),
    Variant(
        "bf16 ranking",
        "common/retrieval.py",
        "scores = max_scores(images.float(), queries[rows].float())",
        "scores = max_scores(images.bfloat16(), queries[rows].bfloat16()).float()",
        (f"{EVAL}::test_blocks_cover_every_query_once",),
    ),
    Variant(
        "ties count for the target",
        "common/retrieval.py",
        "ahead = (scores > own) | ((scores == own) & (column < target[:, None]))",
        "ahead = scores > own",
        (f"{EVAL}::test_recalls_equal_brute_force", f"{EVAL}::test_rank_ties_exclusion_and_absence"),
    ),
    Variant(
        "missing images dropped by eval_cir.main()",
        "eval_cir.py",
        'all_without_missing(benchmarks, MISSING, f"{OUT}/missing.txt", WORKERS)',
        'all_without_missing(benchmarks, MISSING or 1.0, f"{OUT}/missing.txt", WORKERS)',
        (f"{FAULTS}::test_evaluation_stops_at_one_missing_gallery_image_before_a_model_loads",),
    ),
    Variant(
        "missing images found only while embedding",
        "eval_cir.py",
        "        require_images(benchmark, at.names)\n",
        "",
        (f"{FAULTS}::test_evaluation_stops_at_one_missing_gallery_image_before_a_model_loads",),
    ),
    Variant(
        "indented submission",
        "common/submission.py",
        'json.dumps(record, separators=(",", ":"))',
        "json.dumps(record, indent=2)",
        (f"{FAULTS}::test_a_submission_has_no_byte_to_spare",),
    ),
    Variant(
        "pairs are known by their texts alone",
        "common/trained_on.py",
        '        yield _hash("files", *(path for path, _ in files))\n',
        "        pass\n",
        ("test_real_layouts.py::test_held_out_queries_that_training_saw_by_another_way_are_counted",),
    ),
    Variant(
        "what a checkpoint started from is forgotten",
        "common/trained_on.py",
        "keys = _of_checkpoint(start) if start else set()",
        "keys = set()",
        ("test_real_layouts.py::test_held_out_queries_that_training_saw_by_another_way_are_counted",),
    ),
    Variant(
        "copies count as pictures of their own",
        "eval_cir.py",
        "*map(note_of_copies, benchmarks), *map(note_of_t",
        "*map(note_of_t",
        (
            f"{FAULTS}::test_names_that_share_one_picture_are_said_or_stop",
            f"{FAULTS}::test_queries_repeated_under_new_ids_are_said_or_stop",
        ),
    ),
    # ---- files of others ----
    Variant(
        "an edited config.json of ours is believed",
        "common/files.py",
        "            _verify(path)\n        except UserError as fault:\n            moved",
        "            pass\n        except UserError as fault:\n            moved",
        (f"{EVAL}::test_filter_keeps_what_a_cir_model_finds",),
    ),
    Variant(
        "a backbone's config.json is not hashed",
        "common/cir_model.py",
        '(_shaping_of(model.backbone.config) if shaping else "")',
        '("x" if shaping else "")',
        ("test_tokenizer.py::test_a_checkpoint_holds_to_how_its_backbone_is_used",),
    ),
    Variant(
        "a size left out is the usual, large one",
        "common/pretrained.py",
        "    if there and described > 8",
        "    if there < 0 and described > 8",
        ("test_pretrained.py::test_sizes_that_are_left_out_are_not_filled_with_the_usual_large_ones",),
    ),
    Variant(
        "names may leave the folder",
        "common/images.py",
        """    elif ".." in re.split(r"[/\\\\]", name):""",
        """    elif ".." == name:""",
        ("test_images.py::test_names_that_could_leave_the_root_are_refused",),
    ),
    Variant(
        "EXIF is ignored",
        "common/pixels.py",
        "orientation = image.getexif().get(0x0112, 1)",
        "orientation = 1",
        ("test_images.py::test_exif_orientation_is_applied_once",),
    ),
    Variant(
        "NaN is JSON",
        "common/files.py",
        "parse_constant=refuse, ",
        "",
        (f"{FILES}::test_read_json_is_strict",),
    ),
    Variant(
        "captions are HTML",
        "common/pages.py",
        "return Html(html.escape(line, quote=True))",
        "return Html(line)",
        ("test_pages.py::test_hostile_text_stays_text",),
    ),
    Variant(
        "code of a model folder is asked for",
        "common/pretrained.py",
        '"trust_remote_code": False}',
        '"trust_remote_code": True}',
        ("test_pretrained.py::test_every_call_of_transformers_refuses_code_of_a_folder",),
    ),
)


# ---- trying them ----


def copy_tree(folder: Path) -> Path:
    """A copy of what is in the repository now, and beside it the real data if there are any."""
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", "out")
    shutil.copytree(ROOT, tree, ignore=ignored, symlinks=True)
    if (shared := ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(shared.resolve())
    return tree


def run_tests(tree: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """-> whether all passed, and otherwise the first that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb", "no", "-rfE"]
    command += [f"tests/{test}" for test in tests]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return False, f"hung for {LONGEST} s"
    if done.returncode == 0:
        return True, ""
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    return False, found[1] if found else (done.stdout + done.stderr).strip()[-300:]


def try_variant(variant: Variant) -> str:
    """The test that caught it; empty if it lives."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        file = tree / variant.file
        file.write_text(file.read_text(encoding="utf-8").replace(variant.old, variant.new), encoding="utf-8")
        return run_tests(tree, variant.tests)[1]


def faults_of_list(root: Path) -> list[str]:
    """What is wrong with the list itself: a text that is not there once, a test that is not there."""
    faults = []
    for variant in VARIANTS:
        count = (root / variant.file).read_text(encoding="utf-8").count(variant.old)
        if count != 1:
            faults.append(f"{variant.name}: its text occurs {count} times in {variant.file}, wanted once")
        if not variant.tests or variant.old == variant.new:
            faults.append(f"{variant.name}: names no test, or changes nothing")
        for test in variant.tests:
            name, _, function = test.partition("::")
            if f"def {function}" not in (root / "tests" / name).read_text(encoding="utf-8"):
                faults.append(f"{variant.name}: tests/{test} is not there")
    names = [variant.name for variant in VARIANTS]
    return faults + [f"{name} stands twice" for name in set(names) if names.count(name) > 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only the variants with this in their name")
    parser.add_argument("--jobs", type=int, default=1, help="variants tried at a time")
    parser.add_argument("--list", action="store_true", help="name the variants and stop")
    given = parser.parse_args()
    chosen = [variant for variant in VARIANTS if given.only in variant.name]
    if given.list or not chosen:
        print("\n".join(f"{variant.name}: {variant.file}" for variant in chosen or VARIANTS))
        return 0 if given.list else 2
    if faults := faults_of_list(ROOT):
        print("\n".join(faults))
        return 2

    # the tests must pass as things stand, or they would "catch" anything
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        wanted = tuple(sorted({test for variant in chosen for test in variant.tests}))
        passed, first = run_tests(copy_tree(Path(folder)), wanted)
    if not passed:
        print(f"without any bug: {first}")
        return 2

    lived = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        for variant, caught in zip(chosen, pool.map(try_variant, chosen), strict=True):
            lived += not caught
            print(f"{variant.name:45} {caught or 'LIVES'}", flush=True)
    print(f"{len(chosen) - lived} of {len(chosen)} caught in {time.monotonic() - began:.0f} s")
    return 1 if lived else 0


if __name__ == "__main__":
    sys.exit(main())
