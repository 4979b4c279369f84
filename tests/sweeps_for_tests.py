"""Whole sweeps for the tests of plots and reports: logs, and a manifest in the launcher's format."""

from pathlib import Path

import numpy as np
from logs_for_tests import SOURCE, hash_of, make_log

from analysis.manifest import Manifest, Run, manifest_path

STEPS = 200
REASONS = {
    "crashed": "exit code 1: out of memory",
    "hung": "no new log line for 30 minutes",
    "diverged": "the loss is not a finite number",
}
SOURCES = {"train_gpt.py": SOURCE + "# the baseline\n", "train_gpt_muon_ord.py": SOURCE}


def make_sweep(
    root, name, arms, seeds=(1, 2, 3), control=None, ends=None, noise=0.0013, versus=None, **kwargs
):
    """Write a sweep's file to root/sweeps, its manifest and logs to root/logs; return the sweep file's path.

    `arms` maps a tag to (final loss, settings); a setting `script` or `source` is the arm's own. `ends` maps
    (tag, seed) to how that run ended instead: crashed, diverged, hung, stopped, running, planned, or gone
    (finished, but its log is not there). A run's final loss is the arm's, plus what all runs of its seed
    share (see `make_log`), plus `noise` of its own. `versus`: tags to their own
    controls'. `kwargs`: as for `make_log`.
    """
    logs = Path(root) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in seeds:
        for number, (tag, (final, settings)) in enumerate(arms.items()):
            settings = dict(settings)
            script = settings.pop("script", "train_gpt_muon_ord.py")
            source = settings.pop("source", SOURCES[script])
            run_id = f"lrmul-1-{tag}-20260206-233406-seed{seed}-{number:08x}"
            state = (ends or {}).get((tag, seed), "finished")
            run = Run(run_id, tag, script, seed, settings, f"{number:08x}", hash_of(source), state)
            run.log = f"logs/{run_id}.txt"
            if state == "gone":
                run.state = "finished"
            run.reason = REASONS.get(state, "")
            if state not in ("planned", "gone"):
                text = one_log(
                    run, source, final, noise * np.random.default_rng([seed, number]).normal(), **kwargs
                )
                (logs / f"{run_id}.txt").write_text(text)
            runs.append(run)
    file = Path(root) / "sweeps" / f"{name}.toml"
    file.parent.mkdir(exist_ok=True)
    file.write_text('# Does it help? Nobody knows.\n#\n# 2 hours.\nscript = "train_gpt_muon_ord.py"\n')
    manifest = Manifest(manifest_path(name, logs), file=f"sweeps/{name}.toml", control=control, runs=runs)
    manifest.versus, manifest.created = versus or {}, "2026-02-06T23:34:06+00:00"
    manifest.save()
    return file


def one_log(run, source, final, luck, **kwargs):
    """Return the log of one run, cut short unless it finished."""
    settings = {key.lower(): value for key, value in run.settings.items()}
    event = {"hung": "event:crashed reason:hung", "running": "", "diverged": "event:diverged step:101"}
    end = {} if run.state == "finished" else {"end": STEPS // 2}
    end["end_event"] = event.get(run.state, f"event:{run.state}")
    kwargs = {"val_every": 10, "spec": run.script != "train_gpt.py", **kwargs, **end}
    num_steps = kwargs.pop("num_steps", STEPS)
    text = make_log(
        run.run_id,
        run.seed,
        settings,
        num_steps,
        script=run.script,
        source=source,
        final=final + luck,
        **kwargs,
    )
    if run.script == "train_gpt.py":  # the baseline has no ORD settings
        text = text.replace('"spectral_lr_mul": 0.1, ', "")
    return text


def spectral_arms(*values, baseline=True):
    """Return arms of the first ORD sweep, with final losses like those reported."""
    loss = {0: 3.2742, 0.01: 3.2740, 0.1: 3.2705, 0.5: 3.3003, 1: 3.4067}
    arms = {"baseline_std_0": (3.2743, {"script": "train_gpt.py"})} if baseline else {}
    return {**arms, **{f"spectral_lr_{a}": (loss[a], {"SPECTRAL_LR_MUL": a}) for a in values}}
