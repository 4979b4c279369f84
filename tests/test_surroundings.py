"""Users' machines, shells and files. Each test is a failure that happened once."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from helpers import BASELINE, ROOT, base_env, call, make_text, save_model, small_model, write_shard
from jobs import Job, refusal
from launches import TWO_ARMS, alive, sweep_file
from logs_for_tests import SEPARATOR, make_log

import sample
import train_gpt
from analysis.read_results import read_results
from analysis.run_environment import Slot, command_of, environment_of
from analysis.run_log import read_log
from analysis.shown import clean
from analysis.sweep_files import read_sweep
from analysis.trainers import gpu_names, read_trainer
from data import shards, tokenize_text, tokenizing
from runtime import checkpoints, ranks, supervise

TEXT = "".join(f"Line {i} of a text: {'word ' * (i % 9)}{i * i}.\n" for i in range(900))
SHORT = dict(NUM_SCHEDULED_ITERATIONS="3", VAL_LOSS_EVERY="0", DEVICE="cpu", NPROC_PER_NODE="1")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Writable copy of the project, with the environment that runs these tests."""
    folder = tmp_path_factory.mktemp("a project [1]")
    for package in ("analysis", "kernels", "runtime"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data").mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), ROOT / "requirements.txt", *ROOT.glob("data/*.py")]:
        shutil.copy(path, folder / path.relative_to(ROOT))
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def shell(project, *command, **env):
    """Run a command in the project's folder, with a nearly empty environment."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    options = dict(cwd=project, env={**kept, **env}, capture_output=True, text=True, errors="replace")
    return subprocess.run(command, **options, timeout=600)


# ---- the user's own text, and printed commands


def test_from_a_text_file_to_a_trained_model_and_a_sample(project, tmp_path):
    """Fails if ./run.sh FILE does not work for a file of one document, smaller than VAL_TOKENS."""
    (tmp_path / "my text.txt").write_text(TEXT)
    done = shell(
        project, "./run.sh", str(tmp_path / "my text.txt"), RUN_ID="own", OMP_NUM_THREADS="1", **SHORT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (log,) = read_log(project / "logs/own.txt")
    assert log.state == "finished" and log.config["model"] == "tiny"
    assert log.event("started").fields["threads"] == "1", "the user's OMP_NUM_THREADS is ignored"
    assert log.config["val_tokens"] % 128 == 0 and 1024 <= log.config["val_tokens"] < 10_000
    assert "validation takes" in log.event("warning").fields["text"]
    assert (project / "logs/own.png").exists() and (project / "logs/own/model.safetensors").exists()
    assert re.search(r"^sample \S", done.stdout, re.M), "no sample is printed"
    again = re.search(r"(\S+python sample.py \S+) --prompt", done.stdout)[1].split()
    assert shell(project, *again, "--tokens", "3").returncode == 0, "the printed command fails"


def test_a_text_trains_the_simple_trainer_too(project, tmp_path):
    """Fails if run.sh sets LONG_DOCS for a trainer that lacks it, and so refuses it."""
    (tmp_path / "mine.txt").write_text(TEXT)
    env = dict(SHORT, SCRIPT="train_gpt_simple.py", RUN_ID="simple", DATA_PATH=str(tmp_path / "own"))
    done = shell(project, "./run.sh", str(tmp_path / "mine.txt"), **env)
    assert done.returncode == 0, done.stdout + done.stderr
    (log,) = read_log(project / "logs/simple.txt")
    assert log.state == "finished" and log.config["train_files"] == "text_train_*.bin"


def tokenize(monkeypatch, *arguments) -> int:
    """Run data/tokenize_text.py in this process, for bytes."""
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments), "--bytes", "--workers", "1"])
    return shards.run_script(tokenize_text.main)


def test_a_folder_with_two_parts_is_enough(project, tmp_path, monkeypatch, capsys):
    """Fails if DATA_PATH, set as the documentation and the tokenizer say, finds no shards, or a run fails
    because its picture or its sample cannot be made."""
    out, texts = tmp_path / "mine [2] *", [tmp_path / name for name in ("notes.md", "more.rst")]
    for path in texts:
        path.write_text(TEXT[:6000] + path.name)
    assert tokenize(monkeypatch, *texts, "--out", out) == 0
    for script in ("plot_loss.py", "sample.py"):
        (project / script).write_text("raise SystemExit('broken')")
    done = shell(project, "./run.sh", DATA_PATH=str(out), RUN_ID="folder", MODEL="tiny", **SHORT)
    for script in ("plot_loss.py", "sample.py"):
        shutil.copy(ROOT / script, project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "could not be drawn" in done.stderr and "could not be sampled" in done.stderr
    config = read_log(project / "logs/folder.txt")[0].config
    assert (config["train_files"], config["val_files"]) == ("text_train_*.bin", "text_val_*.bin")
    for name in ("a_train_0.bin", "a_val_0.bin"):
        write_shard(out / name, make_text(3000))
    two = refusal(train_gpt, {"DATA_PATH": str(out), "MODEL": "tiny", "DEVICE": "cpu"}, capsys)
    assert "several corpora (a, text)" in two


@pytest.mark.parametrize("options", [(), ("--val-frac", "1e-9"), ("--val-frac", "0.9999")])
def test_the_end_of_a_text_is_for_validation_where_documents_are_too_few(tmp_path, monkeypatch, options):
    """Fails if a small text trains only by luck, or a token is lost or on both sides of the split."""
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    assert tokenize(monkeypatch, path, "--out", tmp_path, *options) == 0
    train, val = (
        shards.open_shard(tmp_path / f"text_{part}.bin").tokens for part in ("train_000001", "val_000000")
    )
    assert train[0] == val[0] == 0 and min(len(train), len(val)) >= 1025
    assert bytes([*train[1:], *val[1:]]).decode() == TEXT


SIGNALS = [(signal.SIGTERM, 1, False), (signal.SIGHUP, 1, False), (signal.SIGINT, 2, True)]


@pytest.mark.parametrize("number, ranks, to_group", SIGNALS)
def test_a_signal_to_run_sh_stops_the_run(project, tmp_path, number, ranks, to_group):
    """Fails if torchrun trains on without run.sh, or a stopped run is not saved, does not exit with 0 or ends
    in a traceback. A terminal's Ctrl-C goes to the process group."""
    name = f"{number.name}{ranks}{to_group}"
    made = [write_shard(tmp_path / f"made_{part}_0.bin", make_text(20_000)) for part in ("train", "val")]
    env = base_env(made[0].parent, RUN_ID=name, NUM_SCHEDULED_ITERATIONS=400, NPROC_PER_NODE=ranks)
    policy = {"OMP_WAIT_POLICY": "ACTIVE"} if to_group else {}
    job = Job(project, "./run.sh", env | policy, argv=["./run.sh"])
    job.wait_for(r"^step:2/")
    rank = psutil.Process(job.ranks()[0])
    # see test_threads_of_a_run_sleep_and_its_host_needs_no_address
    assert rank.environ()["OMP_WAIT_POLICY"] == ("ACTIVE" if to_group else "PASSIVE")
    assert "--local-addr=127.0.0.1" in rank.parent().cmdline()
    (os.killpg if to_group else os.kill)(job.process.pid, number)
    assert job.end() == 0, job.out.read_text()
    assert "Traceback" not in job.out.read_text() and "stopped; " in job.out.read_text()
    assert not alive(project), "torchrun or a rank is left"
    assert read_log(job.log)[-1].state == "stopped"
    assert list((project / "logs" / name).glob("step_*.pt")) and not job.log.with_suffix(".png").exists()


# ---- refusals


def test_settings_are_refused_once_and_before_torchrun(project):
    """Fails if a wrong value costs thirty lines of torchrun's traceback."""
    done = shell(project, "./run.sh", **{**SHORT, "MODEL": "tiny", "NPROC_PER_NODE": "3"})
    assert done.returncode == 2 and "3 ranks do not divide 8 slices" in done.stderr, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) <= 6 and "Traceback" not in done.stderr


def test_data_that_a_run_would_refuse_are_refused_to_run_sh(capsys):
    env = {"MODEL": "tiny", "DEVICE": "cpu", "DATA_PATH": "nowhere"}
    assert supervise.main(train_gpt, ["--check-settings"], env) == 2
    assert "matches no file" in capsys.readouterr().err


def test_a_text_that_is_not_there_is_named(project):
    done = shell(project, "./run.sh", "MODEL=tiny")
    assert done.returncode == 2 and "MODEL=tiny: no such file" in done.stderr


def test_data_of_a_run_that_has_a_log_are_not_replaced(project, tmp_path):
    """Fails if `RUN_ID=mine ./run.sh other.txt` is refused only when the other text has replaced the data,
    or if MODEL=auto asks for GPT-2's vocabulary."""
    for name, text in (("mine", TEXT), ("other", TEXT[::-1])):
        (tmp_path / f"{name}.txt").write_text(text)
    out = tmp_path / "own"

    def start(name, **env):
        env |= dict(DATA_PATH=str(out), MODEL="auto", **SHORT)
        return shell(project, "./run.sh", str(tmp_path / f"{name}.txt"), **env)

    assert start("mine", MUON_LR="abc").returncode == 2  # tokenized, but not trained
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert shards.check_shard(out / "text_train_000001.bin").vocabulary == 256
    (project / "logs").mkdir(exist_ok=True)
    (project / "logs/mine.txt").write_text(make_log("mine"))
    done = start("other", RUN_ID="mine")
    assert done.returncode == 2 and "logs/mine.txt exists already" in done.stderr, done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("name", ["sub/a.TXT", "-dash.txt"])
def test_a_text_is_found_under_any_name(project, name):
    """Fails if a name that begins with a dash, or an exported CDPATH, ends run.sh before the text is read."""
    path = project / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(" ")
    done = shell(project, "./run.sh", name, CDPATH=".")
    assert done.returncode == 2 and done.stderr.endswith("the files hold no text\n"), done.stderr


# ---- the environment


def has_requirements(folder) -> bool:
    code = "source setup_env.sh; has_requirements"
    return subprocess.run(["bash", "-c", code], cwd=folder, capture_output=True).returncode == 0


def test_an_environment_is_asked_and_not_believed(tmp_path):
    """Fails if a stamp file is trusted although the .venv lacks packages, versions or Python."""
    for name in ("setup_env.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    assert not has_requirements(tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    assert has_requirements(tmp_path)
    (tmp_path / "requirements.txt").write_text("torch==1.0  # another version\n")
    assert not has_requirements(tmp_path)
    (tmp_path / ".venv").unlink()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    shutil.copy(ROOT / "requirements.txt", tmp_path / "requirements.txt")
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv/installed-requirements.txt")
    assert not has_requirements(tmp_path), "its Python has no torch, but the stamp is trusted"
    (tmp_path / "requirements.txt").write_text("# nothing\n")
    assert has_requirements(tmp_path)
    (tmp_path / ".venv/bin/python").unlink()
    (tmp_path / ".venv/bin/python").symlink_to("/nowhere/python3")
    assert not has_requirements(tmp_path), "its Python is gone"


def claim(folder, **versions) -> str:
    """Return a PYTHONPATH on which packages claim to be installed in these versions."""
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder)


def test_the_python_on_path_will_do_where_nothing_can_be_installed(project, tmp_path):
    """Fails if VENV=0 makes an environment, accepts a torch known not to work, refuses one that works, or
    requires packages that training does not use."""
    here = tmp_path / "no environment"
    here.mkdir()
    for path in project.iterdir():
        if path.name != ".venv":
            (here / path.name).symlink_to(path)
    ours = f"{sys.prefix}/bin:{os.environ['PATH']}"
    done = shell(here, "./run.sh", PATH=ours, VENV="0", MODEL="tiny", MUON_LR="abc")
    assert done.returncode == 2 and done.stderr.startswith("train_gpt_muon_ord.py: MUON_LR='abc'"), (
        done.stderr
    )
    ask = ("bash", "-c", "source setup_env.sh; setup_env")
    for versions, lacks in (
        ({"torch": "2.11.0+cu130", "triton": "3.6.0"}, ""),
        ({"triton": "3.5.1"}, "triton-3.5.1"),
        ({"torch": "2.10.0"}, "torch-2.10.0"),
    ):
        path = claim(tmp_path / "-".join(versions.values()), **versions)
        done = shell(here, *ask, PATH=ours, PYTHONPATH=path, VENV="0")
        found = re.match(r"VENV=0: \S+/python lacks (.*)\n", done.stderr)
        assert (found[1] if found else "") == lacks, done.stderr
        refused = "training takes torch 2.11, 2.12 or 2.13" in done.stderr
        assert refused is lacks.startswith("torch") and done.returncode == (2 if refused else 0)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # no packages
    (tmp_path / "bin/python").chmod(0o755)
    done = shell(here, *ask, PATH=f"{tmp_path}/bin:{os.environ['PATH']}", VENV="0")
    assert done.returncode == 2 and f"VENV=0: {tmp_path}/bin/python lacks torch" in done.stderr
    assert not (here / ".venv").exists()


def test_another_torch_has_an_environment_of_its_own(tmp_path):
    """Fails if TORCH=2.11.0 uses or changes .venv, pins no triton, or an untested version is accepted."""
    for name in ("setup_env.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    made = shell(tmp_path, "bash", "-c", "source setup_env.sh; requirements", TORCH="2.11.0")
    assert {"torch==2.11.0", 'triton==3.6.0; sys_platform == "linux"'} <= set(made.stdout.splitlines())
    (tmp_path / ".venv-torch2.11.0").symlink_to(sys.prefix)
    code = 'source setup_env.sh; setup_env && echo "$python"'
    unable = dict(PYTHON="false")  # nothing can be installed
    assert shell(tmp_path, "bash", "-c", code, **unable).stdout == ".venv/bin/python\n"
    assert shell(tmp_path, "bash", "-c", code, TORCH="2.11.0", **unable).returncode == 2
    path = claim(tmp_path / "torch 2.11", torch="2.11.0+cpu", triton="3.6.0")
    done = shell(tmp_path, "bash", "-c", code, TORCH="2.11.0", PYTHONPATH=path, **unable)
    assert done.stdout == ".venv-torch2.11.0/bin/python\n"
    done = shell(tmp_path, "bash", "-c", code, TORCH="2.10.0", **unable)
    assert done.returncode == 2 and "TORCH=2.10.0 is none of 2.11.0" in done.stderr
    ours = f"{sys.prefix}/bin:{os.environ['PATH']}"
    done = shell(tmp_path, "bash", "-c", code, TORCH="2.11.0", VENV="0", PATH=ours)
    assert (done.returncode, done.stdout) == (2, ""), "the torch on PATH passes for that of TORCH"
    assert done.stderr.startswith("TORCH=2.11.0 with VENV=0: ") and done.stderr.count("\n") == 1


def test_every_script_starts_from_anywhere_with_a_safe_path(tmp_path):
    """Fails if a script cannot find the project under PYTHONSAFEPATH=1 or from another folder."""
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("benchmarks/*.py")]
    scripts = [str(p) for p in sorted(scripts) if 'if __name__ == "__main__"' in p.read_text()]
    assert len(scripts) > 15
    code = (
        "import runpy, sys\n"
        "before, failed = list(sys.path), []\n"
        f"for path in {scripts!r}:\n"
        "    for name in [n for n in sys.modules if n.partition('.')[0] in "
        "('analysis', 'data', 'kernels', 'runtime', 'train_gpt', 'shards', 'hub', 'tokenizing')]:\n"
        "        del sys.modules[name]\n"
        "    sys.path[:], sys.argv = before, [path, '--help']\n"
        "    try:\n"
        "        runpy.run_path(path, run_name='not main')\n"
        "    except BaseException as error:\n"
        "        failed.append(f'{path}: {error!r}')\n"
        "sys.exit('; '.join(failed) or 0)\n"
    )
    env = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_foreign_settings_of_matplotlib_do_not_matter(tmp_path):
    """Fails if a notebook's MPLBACKEND, or a matplotlibrc that wants TeX, leaves a run without its plot."""
    (tmp_path / "matplotlibrc").write_text(
        "text.usetex: True\nfont.size: 99\naxes.formatter.use_mathtext: True\n"
    )
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/a.txt").write_text(make_log("a"))
    command = (sys.executable, str(ROOT / "plot_loss.py"), "logs/a.txt", "--out", "a.png")
    done = shell(tmp_path, *command, MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.returncode == 0 and (tmp_path / "a.png").exists(), done.stderr
    plain = tmp_path / "plain"
    plain.mkdir()
    shutil.move(tmp_path / "logs", plain / "logs")
    assert shell(plain, *command).returncode == 0
    assert (tmp_path / "a.png").read_bytes() == (plain / "a.png").read_bytes()


# ---- files and folders


@pytest.mark.parametrize("name", ["a[1]", "b*", "~", "c?d {e}", "f g"])
def test_a_folder_may_have_any_name(tmp_path, monkeypatch, name):
    """Fails if glob characters in a folder's name hide its files."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name
    folder.mkdir()
    for part in ("train", "val"):
        write_shard(folder / f"x_{part}_0.bin", make_text(2000))
    for root, pattern in ((str(folder), "x_train_*.bin"), (".", f"{folder}/x_train_*.bin")):
        assert [path.name for path in shards.find_shards(root, pattern)] == ["x_train_0.bin"]
    assert shards.own_shards(str(folder)) == ("x_train_*.bin", "x_val_*.bin")
    monkeypatch.setenv("HOME", str(folder))
    assert shards.find_shards("~", "x_train_0.bin") == [folder / "x_train_0.bin"]
    assert shards.find_shards(str(tmp_path), "[a-f]*/x_*.bin") or name == "~", "no glob over folders"


# ---- the tokenizer


def test_a_million_blanks_are_tokenized(monkeypatch):
    """Fails if a text at which tiktoken panics ends hours of work, or a character is lost."""
    tiktoken = pytest.importorskip("tiktoken")
    import tiktoken_ext.openai_public as public

    ranks_of_bytes = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding(
        "bytes", pat_str=public.r50k_pat_str, mergeable_ranks=ranks_of_bytes, special_tokens={}
    )
    monkeypatch.setattr(tokenizing, "_encode", encoding.encode_ordinary)
    text = "word " * 100 + " " * 1_000_000 + "tail"
    tokens = tokenizing._encode_document(text).tokens
    assert tokens[0] == 0 and bytes(tokens[1:].astype(np.uint8)) == text.encode()


@pytest.mark.parametrize("where", ["tokenizing", "moving"])
def test_what_was_tokenized_before_an_interruption_is_kept(tmp_path, monkeypatch, capsys, where):
    """Fails if a killed tokenization starts over, its second part does not continue the first, or shards that
    were moved already are missed for ever."""
    path = tmp_path / "a.jsonl"
    documents = [{"text": f"document {i} " + "x" * (i % 50)} for i in range(500)]
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))

    def shards_in(out):
        return tokenize(monkeypatch, path, "--shard-tokens=700", "--val-frac=0.2", "--force", "--out", out)

    assert shards_in(tmp_path / "whole") == 0
    owner, name, calls, count = tokenizing, "_encode_document", 300, []
    if where == "moving":
        owner, name, calls = Path, "replace", 3
    original = getattr(owner, name)

    def stop(*args):
        if where == "tokenizing" or args[1].suffix == ".bin":
            count.append(args)
        if len(count) == calls:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        assert shards_in(tmp_path / "cut") == 130
    moved = len(list((tmp_path / "cut").glob("*.bin")))
    assert moved == (2 if where == "moving" else 0), "half a corpus passes for a whole one"
    assert shards_in(tmp_path / "cut") == 0
    assert where == "moving" or "going on after" in capsys.readouterr().out
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("whole", "cut"))
    assert one == two


@pytest.mark.parametrize("damage", [None, "progress.npz", "text_train_000003.bin"])
def test_a_second_start_tokenizes_only_what_is_new(tmp_path, monkeypatch, capsys, damage):
    """Fails if resuming waits for a validation shard, full after a hundred others, or uses a damaged file."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"document {i} " + "x" * (i % 50)}) for i in range(5000)]
    path.write_text("\n".join(lines))
    tokenized, stop_at, original = [], 4900, tokenizing._encode_document

    def encode(text):
        if len(tokenized) == stop_at:
            raise KeyboardInterrupt
        tokenized.append(text)
        return original(text)

    monkeypatch.setattr(tokenizing, "_encode_document", encode)

    def make(out):
        tokenized.clear()
        return tokenize(monkeypatch, path, "--shard-tokens=20000", "--val-frac=0.01", "--out", out)

    assert make(tmp_path / "cut") == 130
    unfinished = tmp_path / "cut" / ".text.unfinished"
    finished = sorted(found.name for found in unfinished.glob("*.bin"))
    assert len(finished) > 5 and not any("_val_" in name for name in finished)
    if damage:
        content = (unfinished / damage).read_bytes()
        (unfinished / damage).write_bytes(content[: len(content) // 2])
    stop_at = None
    assert make(tmp_path / "cut") == 0
    said = capsys.readouterr().out
    if damage:
        assert len(tokenized) == 5000 and "starting over" in said
    else:
        shard_documents = 5000 / len(finished)
        assert 100 < len(tokenized) < 100 + 1.5 * shard_documents
        assert f"going on after {5000 - len(tokenized):,} documents" in said
    assert make(tmp_path / "whole") == 0
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("whole", "cut"))
    assert one == two


def test_choices_are_not_mixed(tmp_path, monkeypatch):
    """Fails if a start with other choices, killed at its first shard, leaves that to the first choices."""
    path, original = tmp_path / "a.jsonl", tokenizing.write_shard
    path.write_text("\n".join(json.dumps({"text": f"document {i} " + "x" * (i % 50)}) for i in range(500)))

    def make(out, val_frac):
        return tokenize(monkeypatch, path, "--shard-tokens=700", f"--val-frac={val_frac}", "--out", out)

    assert make(tmp_path / "whole", 0.2) == 0

    def interrupt(val_frac, num_shards):
        written = []

        def write_shard(*args):
            original(*args)
            written.append(args)
            if len(written) == num_shards:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(tokenizing, "write_shard", write_shard)
            assert make(tmp_path / "cut", val_frac) == 130

    interrupt(0.2, 9)
    interrupt(0.5, 1)
    assert make(tmp_path / "cut", 0.2) == 0
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("whole", "cut"))
    assert one == two


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_texts_from_windows(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_text("Zoë\r\n", encoding=encoding, newline="")
    assert list(tokenize_text.read_plain(path, None)) == ["Zoë\n"]


def test_workers_are_as_many_as_the_job_has_cores():
    """Fails if a job that may use one core of a hundred starts a hundred processes."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity on this system")
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "import argparse; from data.tokenizing import add_options\n"
    code += "p = argparse.ArgumentParser(); add_options(p); print(p.parse_args([]).workers)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


# ---- untrusted text

HOSTILE = "\x1b[2J\x1b]0;title\x07 $x_1^{ $ \\frac{ [red]|<b>\u202e\udce9 ÿ"


def test_clean_leaves_letters_and_nothing_that_is_obeyed():
    assert clean("Zoë, ρ → ünïcödé\n\t") == "Zoë, ρ → ünïcödé\n\t"
    shown = clean(HOSTILE)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202e\ud800-\udfff]", shown) and "$x_1^{ $" in shown
    assert clean({"a\x1b": ["\x1b", 1, None]}) == {"a\ufffd": ["\ufffd", 1, None]}


@pytest.fixture
def strange_logs(tmp_path):
    """Logs whose names, settings and messages are hostile, or mistyped."""
    folder = tmp_path / "logs"
    folder.mkdir()
    settings = {"muon_lr": 0.1, "optimizer": HOSTILE.encode("utf-8", "replace").decode()}
    crash = f"event:crashed error:{json.dumps(HOSTILE)} reason:\x1b[2J"
    names = [b"a$b_{c$.txt", b"caf\xe9.txt", b"esc\x1b[2J.txt", b"plain.txt"]
    for number, name in enumerate(names):
        log = make_log(f"run{number}", number, dict(settings, muon_lr=0.1 * number), num_steps=60)
        log = log.replace("event:finished", crash) if number % 2 else log
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(log.encode("utf-8", "replace"))
    return folder


COMMANDS = {
    "monitor": ("monitor_runs", "--once"),
    "monitor json": ("monitor_runs", "--json"),
    "plot": ("plot_loss", "logs", "--out", "all.png"),
    "plot separate": ("plot_loss", "logs", "--separate", "--out", "all.svg"),
    "report": ("report_sweep", "logs", "--out", "report"),
    "rates": ("plot_lr_analysis", "logs", "--out", "rates"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("name", COMMANDS)
def test_hostile_text_is_shown_and_not_obeyed(strange_logs, name, encoding, monkeypatch):
    """Fails if a log's text reaches the terminal raw, or is interpreted as a formula, markup or HTML."""
    script, *arguments = COMMANDS[name]
    monkeypatch.chdir(strange_logs.parent)
    done = call(importlib.import_module(script).main, arguments, encoding)
    said = done.stdout + done.stderr
    assert said and done.returncode in (0, 2), said
    assert not re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", said), said
    if name == "monitor json":
        assert len(json.loads(done.stdout)) == 4
    for page in strange_logs.parent.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert "\x1b" not in text and "<b>" not in text, page


def test_a_pipe_that_closes_is_no_error(strange_logs, model):
    for command in ("monitor_runs.py --once", "plot_loss.py logs --out x.png", f"sample.py {model}"):
        script = f"{sys.executable} {ROOT}/{command} | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", script], cwd=strange_logs.parent, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), command


# ---- sample.py


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("sampled") / "model.safetensors"
    save_model(path, small_model(train_gpt, vocab_size=256), vocab_size=256)
    return path


@pytest.mark.parametrize(
    "arguments, given, encoding, code, said",
    [
        (["--prompt", b"caf\xe9"], b"", "utf-8", 2, b"not UTF-8 (found byte 0xe9 at position 3)"),
        (["--prompt", "-"], b"caf\xe9", "utf-8", 2, b"not UTF-8"),
        (["--prompt", "-"], "Zoë".encode(), "ascii", 0, b"Zo"),
        (["--prompt", "Zoë→"], b"", "latin-1", 0, b"Zo\xeb?"),
        (["--device", "cuda"], b"", "utf-8", 2, b"no CUDA device"),
        (["--device", "tpu"], b"", "utf-8", 2, b"invalid choice"),
        (["--temperature", "nan"], b"", "utf-8", 2, b"--temperature"),
        (["--temperature", "1e-300"], b"", "utf-8", 0, b""),
        (["--tokens", "0"], b"", "utf-8", 2, b"--tokens must be at least 1"),
        (["--seed", str(2**70)], b"", "utf-8", 2, b"--seed"),
    ],
)
def test_sample_on_any_console_with_any_prompt(model, arguments, given, encoding, code, said, monkeypatch):
    """Fails if a prompt, a console or an argument ends in a traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = call(sample.main, [model, "--tokens", "5", *arguments], encoding, given)
    assert done.returncode == code and said in done.stdout + done.stderr, done.stderr


def test_sample_under_an_ascii_locale(model):
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, str(ROOT / "sample.py"), str(model), "--tokens", "5", "--prompt", "Zoë"]
    done = subprocess.run(command, env=env, capture_output=True)
    assert done.returncode == 0 and b"Zo" in done.stdout, done.stderr


def test_sample_shows_no_control_characters(model, monkeypatch):
    monkeypatch.setattr(sample, "sample", lambda *args: iter(range(128)))
    shown = call(sample.main, [model]).stdout
    assert b"abc" in shown and not re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", shown), shown


def test_a_model_of_nan_is_named(tmp_path):
    broken = small_model(train_gpt, vocab_size=256)
    broken.head.data.fill_(torch.nan)
    save_model(tmp_path / "nan.safetensors", broken, vocab_size=256)
    done = call(sample.main, [tmp_path / "nan.safetensors"])
    assert done.returncode == 2 and b"not finite" in done.stderr


# ---- launches


WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
HALF = {
    "WORLD_SIZE alone": {"WORLD_SIZE": "2"},
    "RANK alone": {"RANK": "0"},
    "LOCAL_RANK alone": {"LOCAL_RANK": "1"},
    "empty": {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""},
    "no address": WHOLE,
    "beyond": dict(WHOLE, RANK="2", MASTER_ADDR="x", MASTER_PORT="1"),
    "no number": {"RANK": "a", "WORLD_SIZE": "2"},
    "srun": {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
}


@pytest.mark.parametrize("found", HALF)
def test_half_a_launch_is_refused_with_the_command_that_works(found, monkeypatch, capsys, tmp_path):
    """Fails if half a launch hangs, trains twice, or two tasks compete for one log."""
    monkeypatch.chdir(tmp_path)
    for name in (*ranks.TORCHRUN, "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in HALF[found].items():
        monkeypatch.setenv(name, value)
    assert supervise.main(train_gpt, [], {"MODEL": "tiny", "DEVICE": "cpu"}) == 2
    said = capsys.readouterr().err
    assert "torchrun" in said and "train_gpt.py" in said and "found" in said and not list(tmp_path.iterdir())


def test_threads_of_a_run_sleep_and_its_host_needs_no_address(place, monkeypatch):
    """Fails if a run's threads spin (on two busy cores a step then takes 15 s instead of 0.4), or torchrun
    looks this host up by name, which hangs for 20 minutes where the name has no address."""
    assert "--local-addr=127.0.0.1" in command_of(ROOT / BASELINE, 2)
    run = read_sweep(sweep_file(TWO_ARMS)).runs()[0]
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert environment_of(run, Slot())["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert environment_of(run, Slot())["OMP_WAIT_POLICY"] == "ACTIVE", "the user's value is ignored"


def test_launcher_and_trainer_see_the_same_gpus(trainers_here, monkeypatch):
    """Fails if CUDA_VISIBLE_DEVICES makes the launcher plan for GPUs that do not exist."""
    if torch.cuda.is_available():
        pytest.skip("needs a machine without GPUs")
    for value in ("NoDevFiles", "0,1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        read_trainer.cache_clear()
        assert read_trainer(str(ROOT / BASELINE)).gpus == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-a")
    assert gpu_names(1) == ("3",) and gpu_names(2) == ("3", "GPU-a")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpu_names(2) == ("0", "1")


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_a_model_file_heeds_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        checkpoints.save_model(tmp_path / "m/model.safetensors", torch.nn.Linear(2, 2), {})
    finally:
        os.umask(before)
    assert (tmp_path / "m/model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_plan_can_be_looked_at_on_any_machine(place, launch, trainers_here):
    """Fails if a laptop cannot print the plan for eight GPUs, or a login node cannot write the job array."""
    done = launch(sweep_file(TWO_ARMS), "--dry-run", "--parallel", "1000")
    assert done.returncode == 0 and "before it can run: 1000 runs at a time" in done.stdout
    text = 'script = "train_gpt.py"\n[env]\nDATA_PATH = "/on/the/cluster"\nDEVICE = "cuda"\nSAVE_EVERY = 7\n'
    assert launch(sweep_file(text), "--slurm").returncode == 0
    script = Path("logs/trial.slurm.sh").read_text()
    for option in ("time=", "cpus-per-task=4", "gpus-per-node=1", "requeue", "open-mode=append"):
        assert f"#SBATCH --{option}" in script
    assert "SAVE_EVERY=7" in script and "RESUME=auto" in script
    launch(sweep_file(text.replace('DEVICE = "cuda"\nSAVE_EVERY = 7', 'MODEL = "tiny"'), "small"), "--slurm")
    script = Path("logs/small.slurm.sh").read_text()
    assert "gpus" not in script and "#SBATCH --cpus-per-task=1\n" in script and "SAVE_EVERY=100" in script


def test_a_sweep_file_from_windows(place):
    Path("trial.toml").write_text("# ρ\n" + TWO_ARMS, encoding="utf-8-sig", newline="\r\n")
    assert [arm.tag for arm in read_sweep("trial.toml").arms] == ["base", "spectral_lr_0.1"]


@pytest.mark.parametrize("encoding, line", [("utf-16", 1), ("latin-1", 2)])
def test_a_sweep_file_that_is_not_utf8(place, encoding, line):
    Path("trial.toml").write_text("# one\n# Zoë\n" + TWO_ARMS, encoding=encoding)
    with pytest.raises(ValueError, match=f"trial.toml, line {line}: not UTF-8; save it as UTF-8"):
        read_sweep("trial.toml")


def test_files_are_utf8_whatever_the_locale(place):
    """Fails if a sweep file with a ρ, or its report, cannot be read under an ASCII locale."""
    Path("trial.toml").write_text("# Does ρ help?\n" + TWO_ARMS, encoding="utf-8")
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for script in ("launch_lr_sweep.py", "report_sweep.py"):
        command = [sys.executable, str(ROOT / script), "trial.toml"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_public_logs_that_stop_early_can_be_counted(tmp_path):
    """Fails if runs stopped on purpose count as missing despite --stopped-early, or count without it."""
    public = "import torch\ndef f():\n    pass\n" + SEPARATOR + "\n"
    for number in range(3):
        lines = [f"step:{i * 10}/60 val_loss:{5 - i + number / 100} train_time:{i}ms" for i in range(5)]
        trials = 2 if number == 0 else 1  # in one file
        (tmp_path / f"{number}.txt").write_text(public + trials * ("\n".join(lines) + "\n"))
    plain = read_results([tmp_path], tmp_path)
    assert plain.count("missing") == 4 and any("--stopped-early" in note for note in plain.notes)
    counted = read_results([tmp_path], tmp_path, stopped_early=True)
    assert counted.count("done") == 4 and any("as --stopped-early asked" in note for note in counted.notes)
