"""README.md and docs/ say what is there: every command is one that its script takes, every file and link exists."""

import csv
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from test_house import flags_of

from common.console import UserError
from common.flags import parse_flags, read_flags

PAGES = ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
OF_A_COMMIT = {"docs/measured.md"}  # its commands belong to the commits beside them


def commands(text: str) -> list[list[str]]:
    """The words behind `python` or `torchrun ...` of each command in a code block or between backticks."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    rest = re.sub(r"```.*?```", "", text, flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True) if re.match(r"(python|torchrun) ", line) else []
        while words and not words[0].endswith(".py"):
            words.pop(0)
        if words:
            found.append(words)
    return found


def bad_commands(root: Path, page: str) -> list[str]:
    faults = []
    for script, *argv in commands((root / page).read_text(encoding="utf-8")):
        if script == "STAGE.py":  # stands for each
            continue
        if not (root / script).is_file():
            faults.append(f"{page}: {script} is not there")
        elif flags_of(root / script):
            try:
                parse_flags(read_flags(root / script), [word for word in argv if word != "--help"])
            except UserError as error:
                faults.append(f"{page}: {script} {' '.join(argv)}: {error}")
    return faults


def dead_paths(root: Path, page: str) -> list[str]:
    """Links that lead nowhere, and files of this repository between backticks that are not there."""
    text = (root / page).read_text(encoding="utf-8")
    here = (root / page).parent
    links = [here / link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]  # none to other places
    named = re.findall(r"`((?:common|kernels|demo|bench|tests|docs)/[\w./-]+|\w+\.(?:py|sh))`", text)
    return [f"{page}: {path} is not there" for path in [*links, *(root / name for name in named)] if not path.exists()]


README = """# x
```bash
torchrun --nproc_per_node 8 stage.py --lr 1 --lrr 2  # why
./demo.sh
```
and `python stage.py
--lr 3`, `gone.py`, [a](docs/a.md#b), [b](https://x.org/y), [c](#d), `python nothing.py`, `common/gone.py`
"""


def test_commands_are_found_and_judged(tmp_path):
    (tmp_path / "stage.py").write_text(
        "from common.flags import override\nLR = 0.1  # learning rate, peak\noverride(globals())\n"
    )
    (tmp_path / "README.md").write_text(README)
    assert commands(README)[:2] == [["stage.py", "--lr", "1", "--lrr", "2"], ["stage.py", "--lr", "3"]]
    one, two = bad_commands(tmp_path, "README.md")
    assert "unknown flag --lrr" in one and two == "README.md: nothing.py is not there"
    gone = [f"README.md: {tmp_path / name} is not there" for name in ("docs/a.md", "gone.py", "common/gone.py")]
    assert dead_paths(tmp_path, "README.md") == gone


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_ones_the_scripts_take(page):
    assert page in OF_A_COMMIT or not bad_commands(ROOT, page)


def test_no_two_commands_of_the_readme_write_one_folder():
    """A stage refuses what another run of other flags wrote there."""
    found = [argv for argv in commands((ROOT / "README.md").read_text(encoding="utf-8")) if "--out" in argv]
    outs = [argv[argv.index("--out") + 1] for argv in found]
    assert len(outs) >= 9 and len(set(outs)) == len(outs), outs


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_exist(page):
    assert not dead_paths(ROOT, page)


def test_every_result_is_a_row_of_numbers():
    """bench/results.csv: the columns of measure.py and nothing between the rows."""
    with open(ROOT / "bench/results.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == "what sizes device torch triton commit date value unit floor percent_of_floor note".split()
    for row in rows:
        assert len(row) == len(header) and float(row[7]) > 0 and re.fullmatch(r"20\d\d-\d\d-\d\d", row[6]), row


def test_no_file_holds_an_unmerged_conflict():
    kinds = (".py", ".md", ".sh", ".csv", ".json", ".txt", ".toml", ".html", ".css", ".js")
    for path in ROOT.rglob("*"):
        ours = not {".venv", "out", ".git"} & set(path.relative_to(ROOT).parts)
        if ours and path.is_file() and path.suffix in kinds:
            assert not re.search(r"^(<<<<<<<|>>>>>>>) ", path.read_text(encoding="utf-8"), re.M), path
