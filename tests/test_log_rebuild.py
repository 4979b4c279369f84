"""Header of a log: every source file that the run used, byte for byte, from which unpack_run rebuilds it; and
the sources' hash."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forked import PATIENCE_S
from helpers import BASELINE, ORD, ROOT, base_env, copy_project, losses

import train_gpt
import unpack_run
from analysis.run_log import embedded_sources
from runtime import log_writer, supervise
from runtime.log_writer import BAR

# Run a trainer, then list the files of all modules that the process has imported.
LISTING = """
import json, sys

sys.path.insert(0, {root!r})
import train_gpt_muon_ord as trainer
from runtime import supervise

code = supervise.main(trainer, [])
files = [module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)]
with open("imported.json", "w") as file:
    json.dump(files, file)
sys.exit(code)
"""
SETTINGS = dict(NUM_SCHEDULED_ITERATIONS=3, VAL_LOSS_EVERY=2, SEED=5, SPECTRAL_LR_MUL=0.3, MANIFOLD_EVERY=1)


@pytest.fixture(scope="module")
def logged(shards, tmp_path_factory):
    """Log of a short run, and the non-empty files of the project that it imported."""
    cwd = tmp_path_factory.mktemp("logged")
    env = base_env(shards, RUN_ID="first", **SETTINGS)
    command = [sys.executable, "-c", LISTING.format(root=str(ROOT))]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    paths = map(Path, json.loads((cwd / "imported.json").read_text()))
    paths = [p.resolve() for p in paths if p.is_absolute()]  # torch.ops is "_ops.py", which is nowhere
    ours = {p for p in paths if p.is_relative_to(ROOT) and "site-packages" not in p.parts}
    imported = {p.relative_to(ROOT).as_posix() for p in ours if p.is_file() and p.stat().st_size}
    return cwd / "logs" / "first.txt", imported


def test_the_header_holds_every_file_that_the_run_imported(logged):
    """Fails if a run cannot be rebuilt from its log: a file is missing, or is not the one that ran."""
    log, imported = logged
    files = embedded_sources(log)
    assert set(files) == imported and ORD in files
    for name, code in files.items():
        assert code == (ROOT / name).read_bytes(), name


def test_a_run_in_the_projects_own_folder_has_a_header_too(monkeypatch, tmp_path):
    """Fails on modules of torch whose __file__ is a relative path that does not exist."""
    monkeypatch.chdir(ROOT)
    log = tmp_path / "log.txt"
    log.write_bytes(log_writer.sources() + f"{BAR}\n".encode())
    assert {BASELINE, "runtime/log_writer.py"} <= embedded_sources(log).keys()


def test_the_header_says_which_settings_change_no_numbers(logged):
    """Fails if a reader of logs would have to know the settings to recognize repeats."""
    affects = json.loads(re.search(r"^affects:(.*)$", logged[0].read_text(), re.M)[1])
    assert "save_every" in affects["recording"] and "compile" in affects["machine"]
    assert not {"seed", "muon_lr"} & {*affects["recording"], *affects["machine"]}


def test_an_unpacked_run_has_the_same_losses(logged, tmp_path, shards, capsys):
    """Fails if the printed command, run on the unpacked files, does not give the logged run's losses."""
    log, _ = logged
    folder = tmp_path / "rebuilt"
    assert unpack_run.main([str(log), str(folder)]) == 0
    command = re.search(r"^cd .*$", capsys.readouterr().out, re.M)[0]
    for file in folder.rglob("[a-z]*.py"):
        assert file.read_bytes() == (ROOT / file.relative_to(folder)).read_bytes()
    env = {k: v for k, v in base_env(shards).items() if k in ("PATH", "HOME", "OMP_NUM_THREADS")}
    env["RUN_ID"] = "again"
    subprocess.run(command, shell=True, env=env, check=True, capture_output=True, timeout=PATIENCE_S)
    for kind in ("val_loss", "train_loss"):
        found = losses(folder, "again", kind)
        assert found and found == losses(log.parent.parent, "first", kind)


def test_a_relative_data_path_is_found_from_another_folder(logged, tmp_path, shards, monkeypatch, capsys):
    """Fails if the printed command looks for the run's data in the folder of the unpacked files."""
    log, _ = logged
    text = log.read_text().replace(json.dumps(str(shards)), json.dumps(os.path.relpath(shards, tmp_path)))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "here.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert unpack_run.main(["logs/here.txt", "rebuilt"]) == 0
    out = capsys.readouterr().out
    found = Path(re.search(r"^cd rebuilt && .*DATA_PATH=(\S+) ", out, re.M)[1])
    assert found.is_absolute() and found.resolve() == shards.resolve()
    assert f"relative to {tmp_path}, the parent of its logs/ folder" in out


def test_a_moved_log_names_no_folder_without_data(logged, tmp_path, capsys):
    """Fails if the command for a log in a record takes the record's folder for that of the data."""
    log, _ = logged
    config = re.search('"data_path": "[^"]*"', log.read_text())[0]
    moved = tmp_path / "logs" / "moved.txt"
    moved.parent.mkdir()
    moved.write_text(log.read_text().replace(config, '"data_path": "."'))
    assert unpack_run.main([str(moved), str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "DATA_PATH=" not in out and "DATA_PATH is to be set to the folder that has " in out


@pytest.mark.parametrize("text", ["step:1/2 train_loss:3\n", ""])
def test_a_log_without_sources_is_refused(tmp_path, capsys, text):
    log = tmp_path / "old.txt"
    log.write_text(text)
    assert unpack_run.main([str(log), str(tmp_path / "out")]) == 2
    assert "older logs" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_a_cut_log_is_refused(logged, tmp_path, capsys):
    log, _ = logged
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert unpack_run.main([str(log), str(tmp_path / "full")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    cut = tmp_path / "cut.txt"
    cut.write_text(log.read_text().rpartition("\nevent:started")[0])
    assert unpack_run.main([str(cut), str(tmp_path / "new")]) == 2
    assert "has no event:started" in capsys.readouterr().err and not (tmp_path / "new").exists()


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
DECIDES_NUMBERS += ("data/documents.py",)
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
