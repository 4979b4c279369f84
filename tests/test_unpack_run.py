"""unpack_run: a run can be rebuilt from its log alone."""

import re
import subprocess
import sys

import pytest
from helpers import ORD, ROOT, base_env, losses, train

import unpack_run

SETTINGS = dict(NUM_SCHEDULED_ITERATIONS=3, VAL_LOSS_EVERY=2, SEED=5, SPECTRAL_LR_MUL=0.3)


@pytest.fixture(scope="module")
def first(shards, tmp_path_factory):
    """Log of a short run, and its losses."""
    cwd = tmp_path_factory.mktemp("first")
    found = train(cwd, shards, "first", ORD, **SETTINGS)
    return cwd / "logs" / "first.txt", found


def test_an_unpacked_run_has_the_same_losses(first, shards, tmp_path, capsys):
    """Fails if the printed command, run on the unpacked files, does not give the logged run's losses."""
    log, wanted = first
    folder = tmp_path / "rebuilt"
    assert unpack_run.main([str(log), str(folder)]) == 0
    printed = capsys.readouterr().out
    command = re.search(r"^cd .*$", printed, re.M)[0]
    for file in folder.rglob("[a-z]*.py"):
        assert file.read_bytes() == (ROOT / file.relative_to(folder)).read_bytes()
    env = {k: v for k, v in base_env(shards).items() if k in ("PATH", "HOME", "OMP_NUM_THREADS")}
    env |= {"RUN_ID": "again", "PATH": f"{sys.prefix}/bin:{env['PATH']}"}
    subprocess.run(command, shell=True, env=env, check=True, capture_output=True, timeout=300)
    assert (losses(folder, "again"), losses(folder, "again", "train_loss")) == wanted


@pytest.mark.parametrize("text", ["step:1/2 train_loss:3\n", ""])
def test_a_log_without_sources_is_refused(tmp_path, capsys, text):
    log = tmp_path / "old.txt"
    log.write_text(text)
    assert unpack_run.main([str(log), str(tmp_path / "out")]) == 2
    assert "older logs" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_a_cut_log_is_refused(first, tmp_path, capsys):
    log, _ = first
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert unpack_run.main([str(log), str(tmp_path / "full")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    cut = tmp_path / "cut.txt"
    cut.write_text(log.read_text().rpartition("\nevent:started")[0])
    assert unpack_run.main([str(cut), str(tmp_path / "new")]) == 2
    assert "has no event:started" in capsys.readouterr().err and not (tmp_path / "new").exists()
