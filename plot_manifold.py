"""Draw the manifold measurement: spectra of weights and of their updates over layers and steps.

    python plot_manifold.py sweeps/muon_vs_adamw.toml      # the runs of a sweep, by its manifest in logs/
    python plot_manifold.py logs/a.txt logs/b.txt --out pictures

Reads logs/RUN_ID.manifold.jsonl (written with MANIFOLD_EVERY=250; manifold.py says what a line holds)
beside each log, or .jsonl.xz; a run without it is left out. Runs that differ only in their seed are one arm.
Written to logs/NAME_manifold/:
    heatmap_METRIC.png      layer x step for each projection, runs side by side, one colour scale in which
                            equal steps of colour hold equally many values; what was not measured is grey
    quick_scan.png          arms x seeds, some metrics, the mean over projections
    by_projection.png, by_layer.png     means over the rest, a line a seed thin; dotted: the level of chance
    losses.png              validation loss and accuracy: means over seeds with their 95% interval
    results.md .csv         final loss and accuracy, mean and sd over seeds
    differences.md .csv     where the seeds of one arm differ most
"""

import json
import math
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from analysis import command_line, style
from analysis.curves import Axis, draw_since, panel_loss
from analysis.files import write_atomically
from analysis.read_results import read_results
from analysis.results import Results, accuracy_of
from analysis.run_log import RunLog, find_log, log_stem, read_unpacked
from analysis.stats import summarize
from analysis.sweep_pictures import what_to_draw
from analysis.tables import as_csv, format_loss, format_markdown, format_table

PROJECTIONS = ("q", "k", "v", "o", "up", "down")
METRICS = {  # what a line holds -> what a picture calls it
    "entropy": "entropy of W's spectrum, nats",
    "effective_rank": "effective rank of W",
    "stable_rank": "stable rank of W",
    "sigma_max": "largest singular value of W",
    "gap": "σ₁/σ₂ of W",
    "update_entropy": "entropy of the update's spectrum, nats",
    "update_effective_rank": "effective rank of the update",
    "update_stable_rank": "stable rank of the update",
    "update_sigma_max": "largest singular value of the update",
    "update_gap": "σ₁/σ₂ of the update",
    "weight_norm": "norm of W",
    "grad_norm": "norm of the raw gradient",
    "update_norm": "norm of the update",
    "left_alignment": "left alignment of update and W",
    "right_alignment": "right alignment of update and W",
}
SCANNED = ("effective_rank", "update_effective_rank", "left_alignment", "weight_norm")
LINED = ("effective_rank", "update_effective_rank", "stable_rank", "weight_norm", "left_alignment")
CHANCE = {"left_alignment": "left_chance", "right_alignment": "right_chance"}
NUM_DIFFERENCES = 5  # of each metric
NUM_SHADES = 32


@dataclass
class Measured:
    """A run's measurement: values[metric][projection, layer, step], NaN where there is none.

    All runs that are drawn together have the same layers and steps.
    """

    arm: str
    run: RunLog
    layers: list[int]
    steps: np.ndarray
    values: dict[str, np.ndarray]

    @property
    def seed(self) -> int | None:
        return self.run.seed


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> tuple[list[dict], int]:
    """The lines of a measurement, and how many could not be read. For a matrix and step the last counts."""
    found, unread = {}, 0
    for line in read_unpacked(path).splitlines():
        try:
            row = json.loads(line)
            found[int(row["step"]), int(row["layer"]), str(row["proj"]), row.get("expert")] = row
        except (ValueError, KeyError, TypeError):
            unread += 1  # cut short by a crash
    if not found:
        raise ValueError(f"{path} holds no measurement: the run ended before its first (MANIFOLD_EVERY)")
    return list(found.values()), unread


def find_measurement(run: RunLog) -> Path:
    """The file of a run's measurement; ValueError if it has none."""
    name = f"{log_stem(run.path)}.manifold.jsonl"
    path = find_log(run.path.parent, name)
    if path is None:
        raise ValueError(
            f"there is no {run.path.parent / name}: train with MANIFOLD_EVERY=250 (steps) to get one"
        )
    return path


def read_all(results: Results) -> list[Measured]:
    """The measurements of all runs, with notes on what cannot be read; ValueError if none has one."""
    found, lacking = [], []
    for arm in results.arms:
        for run in arm.runs:
            try:
                rows, unread = read_lines(find_measurement(run))
            except ValueError as error:
                lacking.append(str(error))
                continue
            found.append((arm.label, run, rows))
            if unread:
                results.notes.append(f"{run.path.stem}: {unread} lines of its measurement could not be read")
    if not found:
        raise ValueError(lacking[0] if lacking else "none of these runs has a log: nothing to draw")
    results.notes += [f"{reason}; left out" for reason in lacking]
    every_row = [row for _, _, rows in found for row in rows]
    layers = sorted({row["layer"] for row in every_row})
    steps = step_grid(row["step"] for row in every_row)
    return [Measured(arm, run, layers, steps, arrays_of(rows, layers, steps)) for arm, run, rows in found]


def step_grid(measured: Iterable[int]) -> np.ndarray:
    """All measured steps; if they lie on an even grid, its missing steps too."""
    steps = np.unique(list(measured))
    if len(steps) < 2:
        return steps
    grid = np.arange(steps[0], steps[-1] + 1, np.diff(steps).min())
    return grid if np.isin(steps, grid).all() else steps


def arrays_of(rows: Sequence[dict], layers: list[int], steps: np.ndarray) -> dict[str, np.ndarray]:
    """Place each metric's values at their projection, layer and step; experts of a layer are averaged."""
    shape = len(PROJECTIONS), len(layers), len(steps)
    totals = {metric: np.zeros(shape) for metric in (*METRICS, *CHANCE.values())}
    counts = {metric: np.zeros(shape) for metric in totals}
    for row in rows:
        if row["proj"] not in PROJECTIONS:
            continue
        column = np.searchsorted(steps, row["step"])
        place = PROJECTIONS.index(row["proj"]), layers.index(row["layer"]), column
        for metric in totals:
            value = row.get(metric)
            if isinstance(value, (int, float)) and math.isfinite(value):
                totals[metric][place] += value
                counts[metric][place] += 1
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: not measured
        return {metric: total / counts[metric] for metric, total in totals.items()}


def mean_over(values: np.ndarray, axes) -> np.ndarray:
    """The mean of what is not NaN; NaN, without a warning, where there is nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis=axes)


# ------------------------------------------------------------------------------------------------
# Heatmaps
# ------------------------------------------------------------------------------------------------


def colour_scale(values: Sequence[np.ndarray]):
    """One scale for all values: equal steps of colour hold equally many, so that no run is of one colour."""
    from matplotlib.colors import BoundaryNorm

    pooled = np.concatenate([x[np.isfinite(x)] for x in values])
    edges = (
        np.unique(np.quantile(pooled, np.linspace(0, 1, NUM_SHADES + 1))) if len(pooled) else np.arange(2.0)
    )
    if len(edges) < 2:
        edges = edges[0] + np.array([-0.5, 0.5])
    return BoundaryNorm(edges, 256)


def draw_heat(ax, run: Measured, values: np.ndarray, scale):
    """Draw a run's values[layer, step]; what was not measured stays blank."""
    layers, steps = run.layers, run.steps
    half = np.diff(steps).min() / 2 if len(steps) > 1 else 0.5
    middles = (steps[1:] + steps[:-1]) / 2
    edges = np.concatenate([[steps[0] - half], middles, [steps[-1] + half]])
    rows = np.arange(len(layers) + 1) - 0.5
    cells = np.ma.masked_invalid(values)
    image = ax.pcolormesh(edges, rows, cells, cmap="viridis", norm=scale, rasterized=True)
    every = max(1, math.ceil(len(layers) / 6))
    ax.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    ax.xaxis.set_major_locator(_few_ticks())
    return image


def add_scale(fig, image, axes, **place) -> None:
    """Add the bar of colours, with a tick at every fourth edge."""
    ticks = image.norm.boundaries[::4]
    bar = fig.colorbar(image, ax=axes, spacing="uniform", **place)
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.ax.minorticks_off()


def _few_ticks():
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True)


class Cell(NamedTuple):
    """A heatmap's place in a grid, and what it shows: values[layer, step]."""

    row: int
    column: int
    run: Measured
    values: np.ndarray


def heat_grid(figure, cells: Sequence[Cell], rows: Sequence[str], columns: Sequence[str], label_size=None):
    """Draw a grid of heatmaps with one colour scale, grey where nothing was measured.

    `rows` and `columns` are labels. Return the axes and an image for `add_scale`.
    """
    axes = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat:
        ax.set_facecolor("#bbbbbb")
        ax.grid(False)
    scale = colour_scale([cell.values for cell in cells])
    for cell in cells:
        image = draw_heat(axes[cell.row, cell.column], cell.run, cell.values, scale)
    for ax, label in zip(axes[0], columns, strict=True):
        ax.set_title(label, fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("step")
    for ax, label in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(f"{label}\nlayer", fontsize=label_size)
    return axes, image


def heatmap(runs: Sequence[Measured], metric: str):
    """A heatmap for each projection (down) and run (across)."""
    plt = style.load_matplotlib()
    cells = [
        Cell(row, column, run, values)
        for column, run in enumerate(runs)
        for row, values in enumerate(run.values[metric])
    ]
    titles = [f"{style.shorten(run.arm, 22)}\nseed {run.seed}" for run in runs]
    fig = plt.figure(figsize=(2.2 + 2.3 * len(runs), 1.4 * len(PROJECTIONS) + 1.2))
    axes, image = heat_grid(fig, cells, PROJECTIONS, titles)
    add_scale(fig, image, axes, fraction=0.15, aspect=40, pad=0.01)
    fig.suptitle(METRICS[metric], fontweight="bold")
    return fig


def seeds_of(runs: Sequence[Measured]) -> list:
    """The seeds in order, an unknown one last."""
    return sorted({run.seed for run in runs}, key=lambda seed: (seed is None, seed or 0))


def quick_scan(runs: Sequence[Measured]):
    """A block of arms x seeds for each metric; each cell is a heatmap of the mean over projections."""
    plt = style.load_matplotlib()
    arms, seeds = list(dict.fromkeys(run.arm for run in runs)), seeds_of(runs)
    rows, columns = [style.shorten(arm, 16) for arm in arms], [f"seed {seed}" for seed in seeds]
    size = 2 * (1.2 + 2.0 * len(seeds)), 2 * (0.9 + 1.5 * len(arms))
    fig = plt.figure(figsize=size)
    for block, metric in zip(fig.subfigures(2, 2).flat, SCANNED):
        cells = [
            Cell(arms.index(run.arm), seeds.index(run.seed), run, mean_over(run.values[metric], 0))
            for run in runs
        ]
        axes, image = heat_grid(block, cells, rows, columns, label_size=9)
        add_scale(block, image, axes, fraction=0.08)
        block.suptitle(METRICS[metric], fontsize=11, fontweight="bold")
    return fig


# ------------------------------------------------------------------------------------------------
# Lines
# ------------------------------------------------------------------------------------------------


def lines(runs: Sequence[Measured], by: str):
    """Metrics (down) of arms (across), a colour a projection or layer: thick the mean, thin each seed."""
    plt = style.load_matplotlib()
    arms, layers, steps = list(dict.fromkeys(run.arm for run in runs)), runs[0].layers, runs[0].steps
    groups = list(PROJECTIONS) if by == "projection" else layers
    fig, axes = plt.subplots(
        len(LINED),
        len(arms),
        figsize=(2 + 4.2 * len(arms), 2.3 * len(LINED)),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    cmap = plt.get_cmap("viridis")
    colours = (
        style.COLOURS
        if by == "projection"
        else [cmap(0.95 * i / max(1, len(layers) - 1)) for i in range(len(layers))]
    )
    for row, metric in enumerate(LINED):
        for column, arm in enumerate(arms):
            ax, members = axes[row, column], [run for run in runs if run.arm == arm]
            for number, colour in enumerate(colours[: len(groups)]):
                curves = np.stack([_curve(run, metric, by, number) for run in members])
                for curve in curves if len(curves) > 1 else ():
                    ax.plot(steps, curve, color=colour, linewidth=0.6, alpha=0.5)
                label = str(groups[number])
                # a mean over fewer seeds would jump: where one of them lacks a step, it has a gap
                ax.plot(steps, curves.mean(0), color=colour, label=label, marker=".", markersize=3)
                if metric in CHANCE:
                    chance = [_curve(run, CHANCE[metric], by, number) for run in members]
                    ax.plot(steps, mean_over(np.stack(chance), 0), color=colour, linewidth=1, linestyle=":")
            if row == 0:
                ax.set_title(style.shorten(arm, 34))
            if column == 0:
                ax.set_ylabel(METRICS[metric].replace(" of ", "\nof ", 1), fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(_few_ticks())
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles += [plt.Line2D([], [], color=style.GREY, linewidth=1, linestyle=look) for look in ("-", ":")]
    labels += ["a seed", "chance"]
    fig.legend(handles, labels, title=by, loc="outside right upper", fontsize=9)
    return fig


def _curve(run: Measured, metric: str, by: str, number: int) -> np.ndarray:
    """A run's mean for a projection (over layers) or a layer (over projections), by step."""
    values = run.values[metric]
    return mean_over(values[number] if by == "projection" else values[:, number], 0)


def losses(results: Results):
    """Validation loss and accuracy, means with their 95% interval, from the first validation on."""
    plt = style.load_matplotlib()
    drawn, axis = what_to_draw(results), Axis("steps", results.runs)
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6))
    panel_loss(left, drawn, axis)
    draw_since(right, drawn, "val_acc", axis)
    right.set_title(f"validation accuracy, share of {style.token_name(results.runs)}s; bands: 95% interval")
    axis.fit_losses(right)
    right.legend()
    return fig


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------


def final_table(results: Results) -> tuple[list[str], list[list]]:
    header = ["arm", "n", "seeds", "final loss", "sd", "final accuracy", "sd accuracy", "each seed's loss"]
    rows = []
    for arm in results.arms:
        done = [run for run in arm.runs if run.state == "finished" and len(run.val)]
        loss, acc = summarize(arm.values()), summarize(arm.values(accuracy_of))
        each = " ".join(f"{run.final_val_loss:.4f}" for run in done)
        seeds = " ".join(str(run.seed) for run in done)
        rows.append(
            [arm.label, loss.n, seeds, *map(format_loss, (loss.mean, loss.sd, acc.mean, acc.sd)), each]
        )
    return header, rows


def difference_table(runs: Sequence[Measured]) -> tuple[list[str], list[list]]:
    """The largest |a - b| / mean of |a|, |b| between seeds of an arm at one matrix and step, by metric."""
    header = ["arm", "metric", "layer", "projection", "step", "seeds", "value", "other", "relative"]
    rows = []
    for arm in dict.fromkeys(run.arm for run in runs):
        members = [run for run in runs if run.arm == arm]
        pairs = [(a, b) for i, a in enumerate(members) for b in members[i + 1 :] if a.seed != b.seed]
        for metric in METRICS:
            found = [item for a, b in pairs for item in _differences(a, b, metric)]
            for size, *place, one, other in sorted(found, reverse=True)[:NUM_DIFFERENCES]:
                rows.append([arm, metric, *place, f"{one:.5g}", f"{other:.5g}", f"{size:.3f}"])
    return header, rows


def _differences(a: Measured, b: Measured, metric: str) -> list[tuple]:
    """The largest differences of one pair of seeds."""
    x, y = a.values[metric], b.values[metric]
    with np.errstate(invalid="ignore"):  # 0 / 0 is no difference
        size = np.nan_to_num(np.abs(x - y) / ((np.abs(x) + np.abs(y)) / 2))
    out = []
    for place in np.argsort(-size, axis=None, kind="stable")[:NUM_DIFFERENCES]:
        at = np.unravel_index(place, size.shape)
        if size[at] > 0:
            p, l, t = at
            where = int(a.layers[l]), PROJECTIONS[p], int(a.steps[t]), f"{a.seed} {b.seed}"
            out.append((float(size[at]), *where, float(x[at]), float(y[at])))
    return out


def write_tables(results: Results, runs: Sequence[Measured], out: Path) -> list[Path]:
    paths = []
    titles = {
        "results": "Final validation loss and accuracy; sd over seeds",
        "differences": "Where the seeds of an arm differ most: |a - b| over the mean of |a| and |b|",
    }
    for name, table in (("results", final_table(results)), ("differences", difference_table(runs))):
        write_atomically(out / f"{name}.md", f"# {titles[name]}\n\n{format_markdown(*table)}\n")
        write_atomically(out / f"{name}.csv", as_csv(*table))
        paths += [out / f"{name}.md", out / f"{name}.csv"]
    return paths


def draw_measurements(options: Namespace) -> None:
    metrics = [name for name in options.metrics.split(",") if name]
    unknown = set(metrics) - set(METRICS)
    if unknown:
        raise ValueError(f"--metrics {', '.join(sorted(unknown))}: there are {', '.join(METRICS)}")
    results = read_results(options.paths, options.logs, None, options.pool_sources, options.stopped_early)
    runs = read_all(results)
    out = options.out or results.folder / f"{results.name}_manifold"
    figures = {f"heatmap_{metric}": partial(heatmap, runs, metric) for metric in metrics}
    figures |= {
        "quick_scan": partial(quick_scan, runs),
        "losses": partial(losses, results),
        "by_projection": partial(lines, runs, "projection"),
        "by_layer": partial(lines, runs, "layer"),
    }
    for name, draw in figures.items():
        style.save(draw(), out / f"{name}.png")
    tables = write_tables(results, runs, out)
    print(format_table(*final_table(results)))
    for note in results.notes:
        print(f"note: {note}")
    print("\n" + "\n".join(map(str, [*(out / f"{name}.png" for name in figures), *tables])))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.make_sweep_parser(__doc__, "folder for pictures and tables")
    parser.add_argument("--metrics", default=",".join(METRICS), help="of which to draw heatmaps")
    return command_line.run(draw_measurements, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
