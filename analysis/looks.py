"""Looks of a sweep's arms, colour and marker, the same in all its pictures.

from analysis.looks import looks_of, sweep_beside
sweep = sweep_beside(arms)                   # the manifest of the sweep that logs belong to, if it is there
looks_of(["base", "a_0.1"], control="base")  # label -> {"color": ..., "marker": ...}
"""

from collections.abc import Iterable, Sequence

from analysis import style
from analysis.arms import Arm
from analysis.manifest import Manifest, manifests_in

MARKERS = ["s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p"]
CONTROL = {"color": "#000000", "marker": "o"}  # no other arm has either
MAX_COLOURS = 18  # arms with distinct colour and marker; with more, the colour is the place in the plan


def looks_of(labels: Sequence[str], control: str | None = None) -> dict[str, dict]:
    """Return each arm's look, given all arms of its sweep in the order of the plan."""
    others = [label for label in labels if label != control]
    colours = style.COLOURS if len(others) <= MAX_COLOURS else _shades(len(others))
    found = {
        label: {"color": colours[number % len(colours)], "marker": MARKERS[number % len(MARKERS)]}
        for number, label in enumerate(others)
    }
    return {**found, control: CONTROL} if control in labels else found


def _shades(count: int) -> list[str]:
    """Return shades from dark to light, all darker than the paper."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.88 * number / (count - 1))) for number in range(count)]


def sweep_beside(arms: Iterable[Arm]) -> Manifest | None:
    """Return the manifest beside the logs that plans all runs of these arms under these names."""
    arms = list(arms)
    runs = [run for arm in arms for run in arm.runs]
    for folder in sorted({run.path.parent for run in runs if run.path}):
        for manifest in manifests_in(folder)[0]:
            tags = {run.run_id: run.tag for run in manifest.runs}
            if all(tags.get(run.name) == arm.label for arm in arms for run in arm.runs):
                return manifest
    return None
