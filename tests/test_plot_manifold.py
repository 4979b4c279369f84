"""Manifold pictures and tables from made-up measurements: what is drawn, and the message if there is none."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from logs_for_tests import make_log
from sweeps_for_tests import make_sweep

import make_record
import plot_manifold as plot
from analysis.read_results import read_results
from analysis.run_log import read_runs

LAYERS, STEPS = 3, (50, 100, 150, 200)


def make_run(folder, arm, seed, skip=(), scale=1.0):
    run_id = f"{arm}-{seed}"
    settings = {"optimizer": arm}
    log = folder / f"{run_id}.txt"
    log.write_text(make_log(run_id, seed, settings, num_steps=200, script="train_gpt.py", spec=False))
    write_measurement(log, seed, skip, scale)
    return log


def write_measurement(log, seed, skip=(), scale=1.0):
    rng, rows = np.random.default_rng(seed), []
    for step in STEPS:
        for layer in range(LAYERS):
            for proj in plot.PROJECTIONS:
                values = {m: scale * (1 + layer + 0.1 * rng.random()) for m in plot.METRICS}
                row = {
                    "step": step,
                    "tokens": 10 * step,
                    "layer": layer,
                    "proj": proj,
                    **values,
                    "left_chance": 0.1,
                    "right_chance": 0.1,
                }
                if step not in skip:
                    rows.append(json.dumps(row))
    log.with_suffix(".manifold.jsonl").write_text("\n".join(rows) + "\n")


@pytest.fixture
def logs(tmp_path):
    return [
        make_run(tmp_path, arm, seed, skip=(100,) if seed == 2 else ())
        for arm in ("muon", "adamw")
        for seed in (1, 2)
    ]


def test_everything_is_drawn_and_tabled(logs, tmp_path, capsys):
    out = tmp_path / "out"
    code = plot.main([*map(str, logs), "--out", str(out), "--metrics", "effective_rank,gap"])
    assert code == 0, capsys.readouterr().err
    names = {"heatmap_effective_rank", "heatmap_gap", "quick_scan", "losses", "by_projection", "by_layer"}
    assert {p.stem for p in out.glob("*.png")} == names
    table = (out / "results.csv").read_text().splitlines()
    assert len(table) == 3 and table[1].split(",")[1] == "2"
    finals = [float(x) for x in table[1].split(",")[-1].split()]
    assert math.isclose(float(table[1].split(",")[3]), np.mean(finals), abs_tol=2e-4)


def test_gaps_stay_gaps(logs):
    """Fails if a step that a run lacks, or all of them lack, is interpolated or left out."""
    for chosen in (logs, logs[1::2]):  # all runs, and those without step 100
        runs = plot.read_all(read_results(chosen))
        gapped = next(run for run in runs if run.seed == 2)
        drawn = gapped.values["gap"][0]
        assert gapped.steps.tolist() == list(STEPS)
        assert np.isnan(drawn[:, 1]).all() and np.isfinite(drawn[:, [0, 2, 3]]).all()
    assert plot.step_grid([100, 50, 175]).tolist() == [50, 100, 175]  # not evenly spaced: nothing is missing


def test_runs_with_other_layers_and_steps_are_drawn_on_one_grid(tmp_path):
    """Fails if a value lands at another run's layer or step, or a run has values at a layer it lacks."""
    logs = [make_run(tmp_path, "muon", seed) for seed in (1, 2)]
    path = logs[1].with_suffix(".manifold.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{**row, "layer": row["layer"] + 1, "step": row["step"] + 50} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = plot.read_all(read_results(logs))
    assert all(run.layers == [0, 1, 2, 3] and run.steps.tolist() == [50, 100, 150, 200, 250] for run in runs)
    for row in rows:
        place = plot.PROJECTIONS.index(row["proj"]), row["layer"], row["step"] // 50 - 1
        assert runs[1].values["gap"][place] == row["gap"]
    assert np.isnan(runs[1].values["gap"][:, 0]).all() and np.isnan(runs[1].values["gap"][:, :, 0]).all()
    _, table = plot.difference_table(runs)
    assert {row[2] for row in table} <= {1, 2} and {row[4] for row in table} <= {100, 150, 200}


def test_one_colour_scale_for_all_runs():
    """Small values beside a run with large ones must still have distinct shades."""
    norm = plot.colour_scale([np.linspace(0, 1, 50), np.linspace(100, 900, 50), np.array([np.nan])])
    assert len(set(norm([0.1, 0.3, 0.5, 0.7, 200, 400, 600, 800]).tolist())) == 8
    for same in (np.full(5, 3.0), np.full(5, np.nan)):
        edges = plot.colour_scale([same]).boundaries
        assert edges[0] <= np.nan_to_num(same[0]) <= edges[-1] and edges[0] < edges[-1]


def test_the_later_line_counts_and_a_torn_one_is_counted(tmp_path):
    path = tmp_path / "a.manifold.jsonl"
    row = {"step": 5, "layer": 0, "proj": "q", "gap": 1}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "gap": 2}) + '\n{"step": 10, "la')
    rows, unread = plot.read_lines(path)
    assert [r["gap"] for r in rows] == [2] and unread == 1


def test_the_largest_difference_of_seeds_is_found(tmp_path):
    logs = [make_run(tmp_path, "muon", 1), make_run(tmp_path, "muon", 2)]
    path = logs[0].with_suffix(".manifold.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    wanted = next(r for r in rows if (r["step"], r["layer"], r["proj"]) == (150, 2, "o"))
    wanted["gap"] = 1000.0
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    header, table = plot.difference_table(plot.read_all(read_results(logs)))
    top = next(row for row in table if row[1] == "gap")
    assert top[2:5] == [2, "o", 150] and "1000" in top[6:8]


def test_a_record_has_the_measurement(tmp_path, monkeypatch, capsys):
    """Fails if make_record leaves it out, or the packed file reads differently from the plain one."""
    make_sweep(tmp_path, "duel", {"muon": (3.3, {})}, seeds=(1, 2))
    monkeypatch.chdir(tmp_path)
    plain = []
    for run in read_runs("logs"):
        write_measurement(run.path, run.seed)
        plain.append(plot.read_lines(plot.find_measurement(run)))
    also = "plot_manifold.py duel.toml --out . --metrics gap"
    assert make_record.main(["records/x", "--new", "sweeps/duel.toml", "--also", also]) == 0
    assert len(list(Path("records/x/logs").glob("*.manifold.jsonl.xz"))) == len(plain) == 2
    assert [plot.read_lines(plot.find_measurement(run)) for run in read_runs("records/x/logs")] == plain
    assert [unread for _, unread in plain] == [0, 0]
    assert make_record.main(["records/x", "--check"]) == 0
    out = capsys.readouterr().out
    assert "differences.csv: the same" in out and "heatmap_gap.png: the same" in out


@pytest.mark.parametrize("content", [None, ""])
def test_a_run_without_a_measurement_is_left_out(logs, content, tmp_path, capsys):
    """Fails if one run that crashed early leaves the other runs without pictures."""
    path = logs[0].with_suffix(".manifold.jsonl")
    path.unlink() if content is None else path.write_text(content)
    out = tmp_path / "out"
    assert plot.main([*map(str, logs), "--out", str(out), "--metrics", "gap"]) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if str(path) in line]
    assert note.startswith("note: ") and note.endswith("left out")
    assert (out / "heatmap_gap.png").exists() and "muon" not in (out / "differences.csv").read_text()


@pytest.mark.parametrize("content, said", [(None, "MANIFOLD_EVERY"), ("", "holds no measurement")])
def test_no_measurement_is_said_clearly(content, said, tmp_path, capsys):
    log = make_run(tmp_path, "muon", 1)
    path = log.with_suffix(".manifold.jsonl")
    path.unlink() if content is None else path.write_text(content)
    assert plot.main([str(log), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and str(path) in error and not (tmp_path / "out").exists()
