"""Header of a log: every source file that the run used, byte for byte, and their hashes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import BASELINE, ORD, ROOT, base_env, copy_project

import train_gpt
import train_gpt_muon_ord
from runtime import log_writer, supervise
from runtime.log_writer import BAR
from runtime.settings import not_training

# Run a trainer, then list the files of all modules that the process has imported.
LISTING = """
import json, sys

sys.path.insert(0, {root!r})
import {trainer} as trainer
from runtime import supervise

code = supervise.main(trainer, [])
files = [module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)]
with open("imported.json", "w") as file:
    json.dump(files, file)
sys.exit(code)
"""


def embedded_files(log: bytes) -> tuple[dict[str, bytes], bytes]:
    """Parse a log's source files by name, and the text after them, from the stated sizes alone."""
    files, rest = {}, log
    while found := re.match(rb"# file: (.+), (\d+) bytes\n", rest):
        name, size = found[1].decode(), int(found[2])
        assert name not in files
        files[name] = rest[found.end() :][:size]
        rest = rest[found.end() + size :]
    return files, rest


@pytest.fixture(scope="module", params=["dense, measured", "experts"])
def logged(request, shards, tmp_path_factory):
    """Trainer, log and imported non-empty project files of a short run."""
    trainer, script, settings = {
        "dense, measured": (train_gpt, BASELINE, dict(MANIFOLD_EVERY=1)),
        "experts": (train_gpt_muon_ord, ORD, dict(MODEL="moe-tiny")),
    }[request.param]
    cwd = tmp_path_factory.mktemp("logged")
    code = LISTING.format(root=str(ROOT), trainer=script.removesuffix(".py"))
    env = base_env(shards, RUN_ID="short", NUM_SCHEDULED_ITERATIONS=1, VAL_LOSS_EVERY=0, **settings)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    paths = [Path(name) for name in json.loads((cwd / "imported.json").read_text())]
    paths = [
        path.resolve() for path in paths if path.is_absolute()
    ]  # torch.ops is "_ops.py", which is nowhere
    ours = {p for p in paths if p.is_relative_to(ROOT) and "site-packages" not in p.parts}
    imported = {p.relative_to(ROOT).as_posix() for p in ours if p.is_file() and p.stat().st_size}
    return trainer, (cwd / "logs" / "short.txt").read_bytes(), imported


def test_the_header_holds_every_file_that_the_run_imported(logged):
    """Fails if a run cannot be rebuilt from its log: a file is missing, or is not the one that ran."""
    trainer, log, imported = logged
    files, rest = embedded_files(log)
    assert set(files) == imported and trainer.SCRIPT.name in files
    for name, code in files.items():
        assert code == (ROOT / name).read_bytes(), name
    assert rest.startswith(f"{BAR}\nconfig:".encode())


def test_a_run_in_the_projects_own_folder_has_a_header_too(monkeypatch):
    """Fails on modules of torch whose __file__ is a relative path that does not exist."""
    monkeypatch.chdir(ROOT)
    files, rest = embedded_files(log_writer.sources())
    assert BASELINE in files and "runtime/log_writer.py" in files and rest == b""


def test_the_header_says_which_settings_change_no_numbers(logged):
    """Fails if a reader of logs would have to know the settings to recognize repeats."""
    trainer, log, _ = logged
    found = re.search(rb"^affects:(.*)$", embedded_files(log)[1], re.M)
    affects = json.loads(found[1])
    assert affects == not_training(trainer.SETTINGS)
    assert "save_every" in affects["recording"] and "compile" in affects["machine"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Copy of the project's code, which --settings-json of train_gpt then treats as its own."""
    copy_project(tmp_path)
    monkeypatch.setattr(log_writer, "ROOT", tmp_path)
    monkeypatch.setattr(train_gpt, "SCRIPT", tmp_path / BASELINE)
    return tmp_path


def printed_hash(capsys) -> str:
    """Return the source_hash that --settings-json prints."""
    capsys.readouterr()
    assert supervise.main(train_gpt, ["--settings-json"]) == 0
    return json.loads(capsys.readouterr().out)["source_hash"]


DECIDES_NUMBERS = (BASELINE, "kernels/cpu.py", "kernels/experts.py", "runtime/sharding.py", "data/shards.py")
DECIDES_NUMBERS += ("kernels/signals.py", "data/prefixes.py", "runtime/presets.py", "runtime/stream_run.py")
DECIDES_NONE = ("runtime/log_writer.py", "runtime/session.py", "data/hub.py")


@pytest.mark.parametrize("name", [*DECIDES_NUMBERS, *DECIDES_NONE])
def test_source_hash_changes_with_code_that_decides_the_numbers(name, project, capsys):
    """Fails if runs with different arithmetic count as repeats, or an edit of the log writer splits them."""
    before = printed_hash(capsys)
    assert re.fullmatch("[0-9a-f]{16}", before)
    with (project / name).open("a") as file:
        file.write("# a comment\n" if name in DECIDES_NONE else "CHANGED = 1\n")
    assert (printed_hash(capsys) != before) == (name in DECIDES_NUMBERS)


def test_source_hash_does_not_depend_on_the_folder(project, capsys):
    """Fails if the same code has another hash on another machine."""
    done = subprocess.run(
        [sys.executable, BASELINE, "--settings-json"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["source_hash"] == printed_hash(capsys)
