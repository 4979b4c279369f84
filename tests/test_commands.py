"""Every command in README, docs and the scripts' docstrings works as written.

A command is run in a folder with two real runs of two steps, which stand for whatever runs, sweeps and models
it names. NOT_RUN lists those that are only checked (the script is there, its options parse, the settings
before it are accepted), each with the reason.
"""

import argparse
import ast
import dataclasses
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import ROOT, base_env

import train_gpt
import train_gpt_muon_ord
import train_gpt_simple

PAGES = [
    ROOT / "README.md",
    *(ROOT / folder / "README.md" for folder in ("data", "records", "tests")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SCRIPTS = [
    *sorted(ROOT.glob("*.py")),
    *sorted((ROOT / "data").glob("*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
]
TRAINERS = {module.SCRIPT.name: module for module in (train_gpt, train_gpt_muon_ord, train_gpt_simple)}
BEGINNING = re.compile(
    r"(?:[A-Z_]+=\S* )*(?:echo .*\| )?(?:\./\w+\.sh|\S*\bpython3? |\S*\btorchrun |diff |cd )"
)
LAUNCH_SETTINGS = {"SCRIPT", "MAX_RESTARTS", "VENV", "OMP_NUM_THREADS"}  # run.sh's and torch's

NOT_RUN = {  # pattern of commands -> why they are not run here
    r"^(\./run\.sh|train_gpt\w*\.py(?! --help))": "minutes of training; test_surroundings runs run.sh",
    r"^\./test\.sh": "these tests themselves",
    r"^benchmarks/(first_hour|kernel_times)\.py": "needs a GPU; test_first_hour has what does not",
    r"^benchmarks/step_time\.py": "minutes; test_benchmarks has it",
    r"^data/(cached_\w+|fineweb)\.py": "gigabytes from the network; test_data_scripts has made-up ones",
    r"^data/tokenize_text\.py(?!.*--bytes)": "GPT-2's vocabulary, from the network; test_data_scripts has it",
    r"^launch_lr_sweep\.py (?!sweeps/smoke\.toml --scale tiny)": "hours; test_sweep_files plans all sweeps",
    r"^plot_manifold\.py": "many pictures, a quarter of a minute; test_plot_manifold draws them",
    r"^make_record\.py": "a minute each; test_plot_lr_analysis makes whole records",
    r"^sync_twins\.py": "would write a trainer; test_house compares them",
    r"^export_runs\.py .*(--follow|--to (trackio|wandb))": "no end, optional libraries; test_export_runs",
    r"^evaluate_model\.py|^-m pip install": "an optional library; test_evaluate_model runs it where it is",
}
STANDS_FOR = {  # names in the documentation -> those in the folder of the tests; the first that matches
    r"\[?(SWEEP\.toml\|)?LOGS\]?|records/logs": "logs",
    r"A|LOG|logs/(A|a|RUN_ID)\.txt": "{a}.txt",
    r"B|logs/[Bb]\.txt": "{b}.txt",
    r"SWEEP\.toml|sweeps/\w+\.toml": "sweeps/smoke.toml",
    r"MODEL|logs/\w+/model\.safetensors": "{a}/model.safetensors",
    r"spectral_lr_mul=0": "spectral_lr_0",
    r"FOLDER|DIR": "new",
    r"(notes|corpus)\.txt|books/\*\.txt|wiki\.jsonl": "notes.txt",
}
SWEEP = """
script = "train_gpt_muon_ord.py"
control = "spectral_lr_0"
seeds = [1]
[env]
MODEL = "tiny"
DEVICE = "cpu"
TRAIN_FILES = "made_train_*.bin"
VAL_FILES = "made_val_*.bin"
VAL_TOKENS = 8192
VAL_BATCH_TOKENS = 8192
NUM_SCHEDULED_ITERATIONS = 2
VAL_LOSS_EVERY = 1
SAVE_MODEL = 1
MUON_DECAY_MODE = "param"
MUON_WEIGHT_DECAY = 0.1
[[arms]]
tag = "spectral_lr_0"
SPECTRAL_LR_MUL = 0
MUON_LR = 0.02
[[arms]]
tag = "spectral_lr_0.1"
SPECTRAL_LR_MUL = 0.1
MUON_LR = 0.04
[scale.tiny]
VAL_TOKENS = 8192
"""


# ---- what is documented


class Command(NamedTuple):
    """Command: the settings before it, and its words, starting with the script's path (from ROOT)."""

    text: str
    settings: dict[str, str]
    words: tuple[str, ...]


def lines_of_page(text: str) -> list[str]:
    """Find commands in a page's code: indented lines, fenced shell, and inline code."""
    text = re.sub(r"^```(?!sh|bash).*?^```$", "", text, flags=re.S | re.M)
    lines = [line.strip() for line in re.findall(r"^(?: {4}|(?=\./|\.venv)).*$", text, re.M)]
    return lines + re.findall(r"`([^`\n]+)`", text)


def lines_of_script(path: Path) -> list[str]:
    """Find the usage lines of a script's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    title, lines = text.partition("\n")[0].partition(": ")[2], re.findall(r"^ {4}(.*)$", text, re.M)
    return [title, *lines]


def lines_of_shell(path: Path) -> list[str]:
    """Find the usage lines of a shell script's comments: command, spaces, what it does."""
    return [re.split(r"\s{2,}", line)[0] for line in re.findall(r"^# {3}(\S.*)$", path.read_text(), re.M)]


def parse(text: str) -> Command:
    """Parse a command without its launcher (python, torchrun and its options)."""
    words = shlex.split(text, comments=True)
    for sign in ("|", "&"):  # echo ... | COMMAND; COMMAND | less; COMMAND &
        parts = " ".join(map(shlex.quote, words)).split(f" {shlex.quote(sign)}")
        words = shlex.split(next(part for part in parts if not part.startswith("echo ")))
    settings = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    launcher = Path(words[0]).name
    if launcher == "torchrun":  # its own options stand before the script; without one the command is a part
        words = words[next((i for i, word in enumerate(words) if word.endswith(".py")), len(words)) :]
    elif launcher in ("python", "python3"):
        words = words[1:]
    return Command(text, settings, tuple(words))


def documented() -> list[Command]:
    """List all commands, each once."""
    lines = [line for page in PAGES for line in lines_of_page(page.read_text(encoding="utf-8"))]
    lines += [line for path in SCRIPTS for line in lines_of_script(path)]
    lines += lines_of_shell(ROOT / "run.sh")
    found = {}
    for line in lines:
        command = parse(line) if BEGINNING.match(line) else None
        if command and command.words:
            found.setdefault((*command.settings.items(), command.words), command)
    return list(found.values())


COMMANDS = documented()


def reason_not_to_run(command: Command) -> str:
    """Return the reason from NOT_RUN; empty if the command is to be run."""
    words = " ".join(command.words)
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, words)), "")


def standing_in(words: tuple[str, ...]) -> tuple[str, ...]:
    """Replace names from the documentation by files of the tests' folder."""
    found = []
    for word in words:
        match = (new for old, new in STANDS_FOR.items() if re.fullmatch(old, word))
        found.append(next(match, word))
    return tuple(found)


RUN = {standing_in(c.words): c for c in COMMANDS if not reason_not_to_run(c)}  # alike ones once
RUN = {words: c for words, c in RUN.items() if words[0] != "launch_lr_sweep.py"}  # `place` runs it
CHECKED = [command for command in COMMANDS if reason_not_to_run(command) and command.words[0] != "-m"]  # pip


# ---- commands that are run


@pytest.fixture(scope="module")
def place(shards, tmp_path_factory) -> Path:
    """Folder where a short form of the README's sweep has been run: two runs of two steps."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "sweeps").mkdir()
    (folder / "sweeps/smoke.toml").write_text(SWEEP)
    (folder / "notes.txt").write_text("A line.\n\n" * 2000)
    kept = {
        k: v for k, v in base_env(shards).items() if k in ("PATH", "HOME", "DATA_PATH", "OMP_NUM_THREADS")
    }
    argv = [sys.executable, str(ROOT / "launch_lr_sweep.py"), "sweeps/smoke.toml", "--scale", "tiny"]
    done = subprocess.run(argv, cwd=folder, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run_script(words: list[str], monkeypatch) -> int | None:
    """Run a script in this process like python does; return its exit code."""
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def main")))
    try:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as ended:
        return ended.code
    return None


@pytest.mark.parametrize("words", [words for words in RUN if words[0].endswith(".py")], ids=" ".join)
def test_a_documented_command_runs(words, place, tmp_path, monkeypatch, capsys):
    """Fails if a documented command does not work."""
    assert not RUN[words].settings
    monkeypatch.chdir(place)
    logs = sorted(path.with_suffix("") for path in Path("logs").glob("*.txt"))
    assert len(logs) == 2
    words = [word.format(a=logs[0], b=logs[1]) for word in words]
    words = [str(tmp_path / word) if word in ("new", "data/mine") else word for word in words]
    if words[0] in TRAINERS:  # supervise.leave would end this process
        code = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]]).returncode
    else:
        code = run_script(words, monkeypatch)
    assert not code, capsys.readouterr().err


@pytest.mark.parametrize("words", [words for words in RUN if not words[0].endswith(".py")], ids=" ".join)
def test_a_documented_line_of_shell_runs(words):
    text = RUN[words].text.replace("../.venv/bin/python", sys.executable)
    done = subprocess.run(["bash", "-c", text], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (words[0] == "diff"), done.stderr  # of two different files


# ---- commands that are only checked


class OptionsParsed(Exception):
    """Raised in place of the code after command-line parsing."""


@pytest.fixture
def parse_only(monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *arguments):
        parse_args(self, *arguments)
        raise OptionsParsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)


def check_settings(command: Command) -> None:
    """Fail if a setting before the command is unknown to the trainer, or refused by it."""
    script = command.settings.get("SCRIPT", command.words[0])
    trainer = TRAINERS.get(script, train_gpt_muon_ord)
    settings = {name: value for name, value in command.settings.items() if name not in LAUNCH_SETTINGS}
    known = {field.name.upper() for kind in trainer.SETTINGS for field in dataclasses.fields(kind)}
    assert settings.keys() <= known
    trainer.read_settings({"DEVICE": "cpu", **settings})


@pytest.mark.parametrize("command", CHECKED, ids=lambda command: f"{command.settings} {command.words}")
def test_a_command_that_is_not_run_could_be(command, parse_only, monkeypatch, capsys):
    """Fails if a command names a script, option, setting or file that does not exist."""
    script, *arguments = command.words
    assert (ROOT / script).is_file()
    for word in arguments:
        if re.match(r"(sweeps|records|tests)/", word) and not re.search(r"mine|NAME|2026-12", word):
            assert (ROOT / word).exists(), word
    if script == "./run.sh" or script in TRAINERS:
        check_settings(command)
    elif script not in ("./test.sh", "sync_twins.py"):  # which have no options
        with pytest.raises(OptionsParsed):
            run_script(list(command.words), monkeypatch)
        check_settings(command)


def test_pages_use_the_projects_own_python_and_every_link_leads_somewhere():
    """Fails if a command needs an activated environment, or a page was moved."""
    for page in PAGES:
        text = re.sub(r"^```text$.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        assert not re.search(r"^ {4}([A-Z_]+=\S* )*(python3?|torchrun) ", text, re.M), page
        for link in re.findall(r"\]\((?!http)([^)#\s]+)", text):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_the_commands_are_found_and_the_reasons_name_tests():
    """Fails if hardly a command of the documentation is recognized, or a test that NOT_RUN names is gone."""
    assert len(COMMANDS) > 100
    for name in re.findall(r"test_\w+", " ".join(NOT_RUN.values())):
        assert (ROOT / f"tests/{name}.py").is_file(), name
