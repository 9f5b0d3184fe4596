"""The 58 faults that the promises of docs/promises.md are held against, by number, and the tests that try each.

A test is named as below tests/: "test_files.py::test_lock". tests/faults/test_faults.py asks that each is there."""

from typing import NamedTuple


class Case(NamedTuple):
    """A fault, and who tries it."""

    fault: str
    tests: tuple[str, ...]


FILES, IMAGES, REAL, EVAL = "test_files.py", "test_images.py", "test_real_pictures.py", "test_eval_cir.py"
ALIGN, TUNE, MINE, GEN, CIR = (
    f"test_{stage}.py" for stage in "vdg_align vdg_tune mine_pairs gen_deltas train_cir".split()
)
HERE, KILLS, MACHINES = "faults/test_faults.py", "faults/test_kills.py", "test_machines.py"

DATA = {
    1: Case(
        "a missing image",
        (
            f"{CIR}::test_missing_images_stop_and_check_reports",
            f"{ALIGN}::test_data_is_checked_at_the_start",
            f"{EVAL}::test_a_missing_gallery_image_stops",
        ),
    ),
    2: Case(
        "an image of no bytes", (f"{EVAL}::test_a_damaged_gallery_image_stops", f"{HERE}::test_what_is_no_picture")
    ),
    3: Case("a picture cut at 1, 30 or 95 %", (f"{IMAGES}::test_every_format_decodes_and_is_refused_when_cut",)),
    4: Case("400 megapixels in a PNG of 65 bytes", (f"{IMAGES}::test_bombs_and_ribbons_are_refused_by_their_header",)),
    5: Case(
        "90 megapixels",
        (
            f"{IMAGES}::test_bombs_and_ribbons_are_refused_by_their_header",
            f"{REAL}::test_108_megapixels_are_read_small_where_asked",
        ),
    ),
    6: Case("1 x 5000 and 5000 x 1", (f"{IMAGES}::test_bombs_and_ribbons_are_refused_by_their_header",)),
    7: Case("TIFF, PSD, EPS, SVG named .jpg", (f"{IMAGES}::test_other_formats_are_refused_whatever_they_are_called",)),
    8: Case("nine colour modes", (f"{IMAGES}::test_colour_modes", f"{REAL}::test_colours_of_the_new_formats")),
    9: Case("EXIF 6", (f"{IMAGES}::test_exif_orientation_is_applied_once",)),
    10: Case(
        "a pipe, a folder, a device named x.jpg",
        (
            f"{IMAGES}::test_only_regular_files_are_opened",
            f"{MACHINES}::test_pipes_devices_and_endless_files_do_not_hang",
            f"{HERE}::test_what_is_no_picture",
        ),
    ),
    11: Case(
        "an animation",
        (f"{IMAGES}::test_an_animation_gives_its_first_frame", f"{REAL}::test_animations_and_pages_give_the_first"),
    ),
    12: Case("names that leave the folder", (f"{IMAGES}::test_names_that_could_leave_the_root_are_refused",)),
    13: Case(
        "links: to another disk, a pipe, itself, nothing",
        (f"{IMAGES}::test_links_in_the_root_are_followed", f"{REAL}::test_links_lead_anywhere_and_names_nowhere"),
    ),
    14: Case(
        "names or ids that stand twice",
        (
            f"{EVAL}::test_odd_img_set_and_doubled_gallery_stop",
            f"{GEN}::test_mistakes_are_said_in_one_line",
            "test_annotations.py::test_bad_cirr_files_are_named_with_record_and_field",
            f"{HERE}::test_names_that_share_one_picture_are_said_or_stop",
            f"{HERE}::test_queries_repeated_under_new_ids_are_said_or_stop",
        ),
    ),
    15: Case(
        "captions: empty, long, emoji, right to left, escapes, </s>, [SEP]",
        (
            f"{HERE}::test_hostile_captions_train",
            f"{ALIGN}::test_an_end_token_written_in_a_caption_is_text",
            f"{CIR}::test_text_is_never_cut_silently_nor_ended_by_a_caption",
        ),
    ),
    16: Case(
        "JSON: cut, BOM, NaN, doubled keys, deep, of the wrong type",
        (
            f"{FILES}::test_read_json_is_strict",
            f"{MACHINES}::test_json_of_many_small_things_is_refused_before_it_fills_memory",
            "faults/test_fuzz.py::test_some_mutations_of_each_kind",
        ),
    ),
    17: Case("benchmark images in the auxiliary gallery", (f"{MINE}::test_exclusion_by_name_and_by_content",)),
}

TRAINING = {
    18: Case("kill -9 at random times", (f"{KILLS}::test_a_kill_of_each_stage", f"{FILES}::test_kill_9_while_saving")),
    19: Case("kill of one of two ranks", (f"{KILLS}::test_torchrun_is_stopped_killed_and_goes_on",)),
    20: Case("SIGTERM to torchrun", (f"{KILLS}::test_torchrun_is_stopped_killed_and_goes_on",)),
    21: Case("Ctrl-C twice", ("test_ranks.py::test_signals",)),
    22: Case("one flipped bit in the newest checkpoint", (f"{FILES}::test_every_flipped_bit_is_seen",)),
    23: Case("a cut file, no manifest, a stray .tmp", (f"{FILES}::test_damaged_checkpoints",)),
    24: Case("all checkpoints are bad", (f"{FILES}::test_damaged_checkpoints",)),
    25: Case(
        "the disk is full while saving",
        (
            f"{MACHINES}::test_a_full_disk_loses_nothing_and_the_same_command_goes_on",
            f"{MACHINES}::test_a_failed_write_is_named_where_no_disk_can_be_mounted",
        ),
    ),
    26: Case(
        "resume with other constants",
        (
            f"{FILES}::test_constants_differ",
            f"{ALIGN}::test_resume_is_step_exact",
            f"{CIR}::test_six_steps_equal_three_and_resume_and_three",
        ),
    ),
    27: Case("resume on 2 -> 1 and 1 -> 2 ranks", (f"{HERE}::test_a_resume_on_other_ranks_stops_or_is_the_same_run",)),
    28: Case(
        "NaN on one rank",
        (f"{HERE}::test_a_loss_that_is_no_number_on_one_rank_stops_both", f"{GEN}::test_a_fault_of_one_rank_stops_all"),
    ),
    29: Case(
        "a row without supervised tokens",
        (
            f"{ALIGN}::test_only_the_caption_and_its_end_are_supervised",
            f"{ALIGN}::test_an_end_token_written_in_a_caption_is_text",
        ),
    ),
    30: Case(
        "one rank and two at the same global batch",
        (
            f"{ALIGN}::test_two_ranks_and_accumulation_equal_one_rank",
            f"{TUNE}::test_two_ranks_equal_one_rank",
            f"{CIR}::test_two_ranks_equal_one",
        ),
    ),
    31: Case(
        "a last partial batch, fewer items than ranks",
        (
            f"{HERE}::test_a_last_batch_that_leaves_a_rank_without_items",
            f"{GEN}::test_more_ranks_than_pairs",
            f"{CIR}::test_too_few_triplets_are_refused",
        ),
    ),
    32: Case("out of memory", (f"{TUNE}::test_running_out_of_memory_is_one_line_with_advice",)),
    33: Case(
        "no LLM folder, half a shard",
        (
            f"{HERE}::test_an_llm_that_is_not_whole",
            "test_pretrained.py::test_damaged_files_are_one_line",
            "test_hub.py::test_a_mistyped_folder_is_said_to_be_one",
        ),
    ),
    34: Case("tokenizer.model only", ("test_tokenizer.py::test_missing_files",)),
    35: Case("a projection of another width", (f"{TUNE}::test_a_projection_of_another_width_is_refused",)),
    36: Case(
        "PEFT's round trip, and what was changed in it",
        (f"{TUNE}::test_peft_round_trip_without_a_difference", f"{TUNE}::test_a_changed_adapter_is_refused"),
    ),
    37: Case("a pickle as state", (f"{FILES}::test_a_pickle_is_not_executed",)),
    38: Case("an output folder that is read-only, or a file", (f"{HERE}::test_an_out_that_cannot_be_written",)),
    39: Case("two runs on one output folder", (f"{FILES}::test_lock",)),
}

MINING = {
    40: Case(
        "duplicates, one picture many times, 0, 1 and 5 pictures",
        (f"{MINE}::test_small_and_identical_galleries", f"{MINE}::test_no_pictures"),
    ),
    41: Case("ties: input order does not matter", (f"{HERE}::test_the_order_of_files_does_not_decide_ties",)),
    42: Case("block size and ranks change no byte", (f"{MINE}::test_ranks_and_blocks_change_no_byte",)),
    43: Case("a NaN or zero embedding", (f"{MINE}::test_useless_embedding_is_named",)),
    44: Case("a stale cache of embeddings", (f"{MINE}::test_cache_is_reused_only_while_it_is_true",)),
    45: Case("a kill while embedding", (f"{MINE}::test_killed_while_embedding", f"{KILLS}::test_a_kill_of_each_stage")),
}

GENERATION = {
    46: Case(
        "kill -9, often",
        (f"{GEN}::test_killed_and_resumed_on_other_ranks", f"{KILLS}::test_a_kill_of_each_stage"),
    ),
    47: Case("a torn line, and a resume on other ranks", (f"{GEN}::test_killed_and_resumed_on_other_ranks",)),
    48: Case(
        "the disk is full within a line",
        (f"{FILES}::test_append_on_a_full_disk_leaves_whole_lines", f"{GEN}::test_a_full_disk_is_one_line"),
    ),
    49: Case(
        "batches of 1, 3 and 64, ranks 1, 2 and 3, another order",
        (
            f"{GEN}::test_batch_size_and_order_change_no_byte",
            f"{GEN}::test_two_ranks_write_the_same",
            f"{HERE}::test_three_ranks_write_the_same",
        ),
    ),
    50: Case("empty, runaway, repeated output", (f"{GEN}::test_flags", f"{GEN}::test_files")),
    51: Case("an adapter that changed between two runs", (f"{GEN}::test_other_settings_do_not_mix",)),
    52: Case("pairs added or removed", (f"{GEN}::test_only_new_pairs_are_generated",)),
}

RETRIEVAL = {
    53: Case(
        "tau 0.01 at cosine 1, doubled rows, B = 1, beta = 0",
        (
            "test_contrastive.py::test_finite_at_cosine_one",
            "test_contrastive.py::test_no_negatives",
            "test_contrastive.py::test_beta_zero_is_cross_entropy_in_both_directions",
        ),
    ),
    54: Case("pseudo triplets: none, 100 times as many, one target", (f"{HERE}::test_odd_sets_of_pseudo_triplets",)),
    55: Case(
        "metrics and a brute-force oracle",
        (f"{EVAL}::test_recalls_equal_brute_force", f"{EVAL}::test_rank_ties_exclusion_and_absence"),
    ),
    56: Case(
        "one gallery image missing",
        (f"{HERE}::test_evaluation_stops_at_one_missing_gallery_image_before_a_model_loads",),
    ),
    57: Case("the submission validator", (f"{EVAL}::test_validator_refuses",)),
    58: Case(
        "a page with hostile captions and names",
        (f"{EVAL}::test_main_writes_metrics_and_a_page", "test_pages.py::test_hostile_text_stays_text"),
    ),
}

CASES = DATA | TRAINING | MINING | GENERATION | RETRIEVAL
