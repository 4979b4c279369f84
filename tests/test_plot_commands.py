"""Commands start fast and explain themselves; those that plot and report have readable errors."""

import subprocess
import sys
from pathlib import Path

import pytest
from logs_for_tests import make_log
from sweeps_for_tests import STEPS, make_sweep, spectral_arms

import diff_runs
import export_runs
import launch_lr_sweep
import make_record
import monitor_runs
import plot_loss
import plot_lr_analysis
import plot_manifold
import plot_spectral_sweep
import report_sweep

ROOT = Path(plot_loss.__file__).parent
PLOTS = (plot_loss, plot_lr_analysis, plot_manifold, plot_spectral_sweep, report_sweep)
OTHERS = (diff_runs, export_runs, launch_lr_sweep, make_record, monitor_runs)
HEAVY = {"torch", "matplotlib", "scipy", "rich"}  # too slow to import for a quick answer
LIGHT = {  # imported in this order, in one process -> modules that must not be loaded by then
    "analysis.run_log": HEAVY,
    **{command.__name__: HEAVY for command in OTHERS},
    "analysis.stats": {"torch", "scipy.stats", "matplotlib"},
    **{command.__name__: {"torch", "scipy.stats", "matplotlib"} for command in PLOTS},
}


def test_starting_is_light():
    """Commands start fast over ssh: help and errors do not wait for matplotlib, torch or scipy.stats."""
    code = "import contextlib, importlib, sys\n"
    for name, heavy in LIGHT.items():
        code += f"module = importlib.import_module({name!r})\n"
        if not name.startswith("analysis"):
            code += "with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):\n"
            code += "    module.main(['--help'])\n"
        code += f"print({name!r}, *sorted({heavy!r} & set(sys.modules)))\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == list(LIGHT)


@pytest.mark.parametrize("command", PLOTS + OTHERS, ids=lambda command: command.__name__)
def test_help_is_the_docstring(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and command.__doc__.strip() in text
    if command is plot_lr_analysis:
        assert "* too low: not good, and below the value with the lowest loss" in text


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folder with sweeps, logs and damaged files, as input for commands."""
    arms = spectral_arms(0, 0.1, baseline=False)
    make_sweep(tmp_path, "lr", arms, seeds=(1,), val_every=100)
    (tmp_path / "sweeps" / "new.toml").write_text("")
    (tmp_path / "broken.sweep.json").write_text('{"runs": [{"tag": 3}]}')
    (tmp_path / "some.txt").write_text("step:1/1 val_loss:1 train_time:1ms\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "x.txt").write_text(make_log("x", num_steps=STEPS, end=-1, end_event=""))
    (tmp_path / "nowhere").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


SWEEP_ERRORS = [
    (["sweeps/none.toml"], "no sweep file sweeps/none.toml; there: sweeps/lr.toml, sweeps/new.toml"),
    (["sweeps/new.toml"], "launch the sweep first (python launch_lr_sweep.py sweeps/new.toml)"),
    (["sweeps/lr.toml", "begun"], "give one sweep, or logs, not both"),
    (["none.txt"], "no log none.txt"),
    (["empty"], "no log in empty"),
    (["broken.sweep.json"], "is not a sweep's manifest"),
]
CONTROL_ERRORS = [
    (["sweeps/lr.toml", "--control", "nonsense"], "control 'nonsense' fits none of the arms, wanted one: "),
    (["sweeps/lr.toml", "--control", "spectral"], "control 'spectral' fits 2 of the arms"),
]
ERRORS = [(command, *case) for command in PLOTS for case in SWEEP_ERRORS]
ERRORS += [(command, *case) for command in (plot_spectral_sweep, report_sweep) for case in CONTROL_ERRORS]
ERRORS += [
    (plot_spectral_sweep, ["begun"], "none of the 1 runs has logged a step yet"),
    (plot_spectral_sweep, ["begun", "--out", "x.jpg"], "x.jpg: a plot is written as one of"),
    (plot_spectral_sweep, ["--logs", "empty"], "no log in empty"),
    (plot_spectral_sweep, ["--logs", "none"], "there is no folder none/"),
    (plot_loss, ["missing.txt"], "no log missing.txt"),
    (plot_loss, ["empty.txt"], "no step in this log yet"),
    (plot_loss, ["some.txt", "--out", "x.jpg"], "x.jpg: a plot is written as one of .png, .svg, .pdf"),
    (plot_manifold, ["some.txt", "--metrics", "rank"], "--metrics rank: there are "),
]


@pytest.mark.parametrize(
    "command, arguments, message",
    ERRORS,
    ids=[f"{command.__name__}-{'-'.join(arguments)}" for command, arguments, _ in ERRORS],
)
def test_errors_speak_to_a_person(places, capsys, command, arguments, message):
    """Fails unless the exit code is 2, one line says what is wrong and what to do, and nothing is written."""
    before = sorted(places.rglob("*"))
    assert command.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and not captured.out
    assert captured.err.count("\n") == 1
    assert sorted(places.rglob("*")) == before


def test_without_any_log(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command, message in (
        (plot_loss, "there is no log in logs/ yet: train first"),
        (plot_spectral_sweep, "there is no folder logs/: train first"),
    ):
        assert command.main([]) == 2
        assert message in capsys.readouterr().err
