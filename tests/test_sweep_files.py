"""Sweep files: runs are what the file says, and errors are reported before anything runs."""

import importlib
import json
import re
from pathlib import Path

import pytest
from launches import TWO_ARMS, planned, sweep_file, with_env

from analysis.manifest import manifest_path, read_manifest
from analysis.sweep_files import read_sweep
from analysis.trainers import TrainerInfo, env_text, read_trainer
from runtime import checking

ROOT = Path(__file__).resolve().parent.parent


def test_names_begin_with_the_tag_and_keep_the_seeds_form(place):
    """Fails if a list of truncated names shows lrmul-1-1.52 twelve times, or two runs share a name."""
    runs = planned(read_sweep(sweep_file(TWO_ARMS)))[0].runs
    assert len({run.run_id for run in runs}) == 4
    for run in runs:
        pattern = rf"{re.escape(run.tag)}-lrmul-1-1\.52-cd0\.55-\d{{8}}-\d{{6}}-seed{run.seed}-[0-9a-f]{{8}}"
        assert re.fullmatch(pattern, run.run_id), run.run_id
        assert run.log == f"logs/{run.run_id}.txt"


def test_runs_with_names_of_the_old_form_are_not_made_again(place):
    """Fails if a sweep begun before the tag came first repeats finished runs, or renames them."""
    sweep = read_sweep(sweep_file(TWO_ARMS))
    manifest = planned(sweep)[0]
    Path("logs").mkdir(exist_ok=True)
    old = [
        f"lrmul-1-1.52-cd0.55-{r.tag}-20260206-233406-seed{r.seed}-{r.settings_hash}" for r in manifest.runs
    ]
    for run, name in zip(manifest.runs, old, strict=True):
        run.run_id, run.log, run.state = name, f"logs/{name}.txt", "finished"
        Path(run.log).write_text("step:1/1 val_loss:3.0 train_time:1ms\n")
    manifest.runs[3].state = "stopped"
    manifest.save()
    after, why = planned(sweep)
    assert list(why) == [after.runs[3].run_id] and [run.run_id for run in after.runs[:3]] == old[:3]
    assert after.runs[3].run_id.startswith("spectral_lr_0.1-lrmul-")
    assert [run.run_id for run in after.earlier] == old[3:]


def test_seeds_are_interleaved_and_arms_may_have_their_own(place):
    """Fails if a machine that slows down affects one arm only."""
    text = TWO_ARMS + '[[arms]]\ntag = "more"\nseeds = [2, 7, 9]\nSPECTRAL_LR_MUL = 0.5\n'
    runs = read_sweep(sweep_file(text), None).runs()
    assert [(run.tag[:4], run.seed) for run in runs] == [
        *[("base", 1), ("spec", 1), ("more", 2)],
        *[("base", 2), ("spec", 2), ("more", 7)],
        ("more", 9),
    ]


def test_an_arm_may_have_its_own_control(place):
    """Fails if two forms at several rates can only be compared with one arm. The grid applies to controls."""
    text = TWO_ARMS.replace('"base"\n', '"base-cooldown_frac_0.5"\n', 1)
    text += 'versus = "base"\n[grid]\nCOOLDOWN_FRAC = [0.5, 0.7]\n'
    sweep = read_sweep(sweep_file(text), None)
    assert [(arm.tag, arm.versus) for arm in sweep.arms] == [
        ("base-cooldown_frac_0.5", None),
        ("base-cooldown_frac_0.7", None),
        ("spectral_lr_0.1-cooldown_frac_0.5", "base-cooldown_frac_0.5"),
        ("spectral_lr_0.1-cooldown_frac_0.7", "base-cooldown_frac_0.7"),
    ]
    planned(sweep)[0].save()
    saved = read_manifest(manifest_path("trial"))
    assert saved.versus == {arm.tag: arm.versus for arm in sweep.arms[2:]}
    assert saved.control_of("spectral_lr_0.1-cooldown_frac_0.7") == "base-cooldown_frac_0.7"
    assert saved.control_of("base-cooldown_frac_0.7") == "base-cooldown_frac_0.5"


def test_what_a_script_does_not_have_is_left_out_and_said(place):
    """Fails if the baseline refuses to start, or the user could believe that a setting applied to it."""
    text = TWO_ARMS.replace("[env]", "[env]\nSPECTRAL_LR_MUL = 0.3\nCOOLDOWN_FRAC = 0")
    sweep = read_sweep(sweep_file(text), None)
    base, ord_arm = sweep.arms
    assert base.settings == {"LR_MULS": [1.0, 1.52], "COOLDOWN_FRAC": 0.0}
    assert ord_arm.settings == {**base.settings, "SPECTRAL_LR_MUL": 0.1}, (
        "the arm's own value wins over [env]"
    )
    assert any(
        "base" in note and "SPECTRAL_LR_MUL" in note and "COOLDOWN" not in note for note in sweep.notes
    )


def test_grid_multiplies_the_arms_that_leave_it_open(place):
    """Fails if a control is run for every grid value and counted as that many arms."""
    text = """
script = "ord.py"
seeds = [1]
[grid]
SPECTRAL_LR_MUL = [0, 0.5]
LR_MULS = [[1, 1], [2, 1]]
[[arms]]
tag = "open"
[[arms]]
tag = "closed"
SPECTRAL_LR_MUL = 0.25
[[arms]]
tag = "base"
script = "base.py"
"""
    sweep = read_sweep(sweep_file(text), None)
    assert [arm.tag for arm in sweep.arms] == [
        "open-spectral_lr_mul_0-lr_muls_1,1",
        "open-spectral_lr_mul_0-lr_muls_2,1",
        "open-spectral_lr_mul_0.5-lr_muls_1,1",
        "open-spectral_lr_mul_0.5-lr_muls_2,1",
        "closed-lr_muls_1,1",
        "closed-lr_muls_2,1",
        "base-lr_muls_1,1",
        "base-lr_muls_2,1",
    ]
    assert sweep.arms[3].settings == {"SPECTRAL_LR_MUL": 0.5, "LR_MULS": [2.0, 1.0]}
    assert sweep.arms[5].settings == {"SPECTRAL_LR_MUL": 0.25, "LR_MULS": [2.0, 1.0]}


def test_scale_changes_what_it_says_and_nothing_else(place):
    """Fails if the tiny version is another experiment, or too long to run."""
    text = (
        TWO_ARMS.replace("[env]", "[grid]\nCOOLDOWN_FRAC = [0, 0.5, 1]\n[env]\nTARGET_LOSS = 3")
        + """
[scale.tiny]
seeds = [5]
arms = ["spectral_lr_0.1"]
TARGET_LOSS = 2
MODEL = "tiny"
[scale.tiny.grid]
COOLDOWN_FRAC = [0.25]
"""
    )
    text = text.replace('control = "base"', "")
    (arm,) = read_sweep(sweep_file(text), "tiny").arms
    assert (arm.tag, arm.seeds) == ("spectral_lr_0.1-cooldown_frac_0.25", [5])
    assert arm.settings == {
        "LR_MULS": [1.0, 1.52],
        "TARGET_LOSS": 2.0,
        "MODEL": "tiny",
        "COOLDOWN_FRAC": 0.25,
        "SPECTRAL_LR_MUL": 0.1,
    }
    assert len(read_sweep("trial.toml", None).arms) == 6


BAD = {  # what is wrong: what the error must say
    "seed = [1]\n" + TWO_ARMS: ("seed", "did you mean seeds"),
    TWO_ARMS.replace("[1, 2]", "[1, 1]"): ("seeds = [1, 1]", "different whole numbers"),
    TWO_ARMS.replace("[1, 2]", "3"): ("seeds is 3",),
    TWO_ARMS.replace("[1, 2]", "[-1]"): ("seeds = [-1]",),
    TWO_ARMS.replace('control = "base"', 'control = "bass"'): ("bass", "base, spectral_lr_0.1"),
    TWO_ARMS + 'versus = "bass"': ("versus = 'bass'", "another arm, of base"),
    TWO_ARMS + 'versus = "spectral_lr_0.1"': ("another arm, of base",),
    TWO_ARMS.replace('control = "base"', "") + 'versus = "base"': ("no control = ",),
    'script = "ord.py"\n[arms]\ntag = "a"\n': ("double brackets",),
    TWO_ARMS.replace("LR_MULS", "LR_MUL"): ("LR_MUL in [env]", "base.py or ord.py", "LR_MULS"),
    with_env('LR_MULS = "1;2"'): (
        "LR_MULS='1;2' in [env]",
        "wanted finite float,...",
    ),
    TWO_ARMS.replace("SPECTRAL_LR_MUL = 0.1", "SPECTRAL_LR_MULL = 0.1"): (
        "SPECTRAL_LR_MULL",
        "SPECTRAL_LR_MUL",
    ),
    TWO_ARMS.replace('"base.py"', '"base.py"\nSPECTRAL_LR_MUL = 1'): (
        "arm 'base'",
        "not a setting of base.py",
    ),
    with_env("COOLDOWN_FRAC = 1.5"): ("COOLDOWN_FRAC='1.5' in [env]",),
    with_env("NUM_SCHEDULED_ITERATIONS = 1.5"): (
        "='1.5' in [env]",
        "wanted int",
    ),
    with_env("NUM_SCHEDULED_ITERATIONS = true"): ("='true' in [env]",),
    with_env("TARGET_LOSS = nan"): ("TARGET_LOSS='nan'",),
    with_env("TARGET_LOSS = 0"): ("TARGET_LOSS='0'",),
    with_env('DEVICE = "tpu"'): ("DEVICE='tpu'",),
    with_env("DISABLE_FP8 = 2"): ("DISABLE_FP8='2'",),
    with_env('MODEL = "huge"'): ("MODEL='huge' in [env]", "auto, plain, tiny"),
    with_env("SEED = 3"): ("SEED in [env]", "seeds = [...]"),
    with_env('script = "base.py"'): (
        "script in [env]",
        "above the first [table]",
    ),
    TWO_ARMS.replace("spectral_lr_0.1", "base"): ("two arms are called 'base'",),
    TWO_ARMS.replace("spectral_lr_0.1", "a/b"): ("arm 'a/b'", "name files"),
    TWO_ARMS.replace("spectral_lr_0.1", "a" * 200): ("200 at most",),
    TWO_ARMS + '[[arms]]\ntag = "again"\n': ("'spectral_lr_0.1' and 'again' have the same settings",),
    TWO_ARMS + "[[arms]]\nSPECTRAL_LR_MUL = 3\n": ("arm 3", 'tag = "..."'),
    TWO_ARMS + '[[arms]]\ntag = "x"\nspectral_lr_mul = 3\n': ("spectral_lr_mul", "capitals"),
    TWO_ARMS.replace('"ord.py"', '"no.py"'): ("'no.py'", "neither"),
    TWO_ARMS.replace('"ord.py"', '"silent.py"'): ("silent.py --settings-json", "I am no trainer"),
    TWO_ARMS.replace('script = "ord.py"', ""): ("no script",),
    TWO_ARMS + "script = 5\n": ("script = 5 in arm 'spectral_lr_0.1'", 'wanted a trainer, as "train_gpt.py"'),
    TWO_ARMS + 'script = ["ord.py"]\n': ("script = ['ord.py'] in arm 'spectral_lr_0.1'",),
    TWO_ARMS + "[grid]\nLR_MULS = [[1]]\n": ("LR_MULS stands in [grid] and also in [env]",),
    TWO_ARMS + "[grid]\nCOOLDOWN_FRAC = 0.5\n": ("COOLDOWN_FRAC = 0.5 in [grid]", "list of values"),
    TWO_ARMS + "[grid]\nCOOLDOWN_FRAC = []\n": ("COOLDOWN_FRAC = []",),
    "script = [": ("not valid TOML",),
    TWO_ARMS.replace("[1, 1.52]", "[1, 1.52"): ("not valid TOML",),
}


TAIL = "\n[scale.tiny]\n"
BAD_SCALES = {
    TWO_ARMS: ("no [scale.tiny]; its scales: none",),
    TWO_ARMS + TAIL + "NUM_STEPS = 3": ("NUM_STEPS",),
    TWO_ARMS + TAIL + "num = 3": ("capitals",),
    TWO_ARMS + TAIL + 'arms = ["none"]': ("base, spectral_lr_0.1",),
    TWO_ARMS + TAIL + 'arms = ["spectral_lr_0.1"]': ("control",),
    TWO_ARMS + TAIL + 'arms = [["base"]]': ("arms = [['base']] in [scale.tiny]", "base, spectral_lr_0.1"),
    TWO_ARMS + TAIL + 'arms = [{ tag = "base" }, "x"]': ("arm 2 of [scale.tiny] is 'x'",),
    TWO_ARMS + TAIL + "[[scale.tiny.arms]]\nLR_MULS = [1]": ("arm 1 of [scale.tiny]: wanted tag",),
    TWO_ARMS + TAIL + "[scale.tiny.grid]\nLR_MULS = [[1]]": ("not in [grid]",),
    'script = "ord.py"\n[[arms]]\ntag = "a"\nTARGET_LOSS = 3' + TAIL + "TARGET_LOSS = 2": ("every arm",),
}


@pytest.mark.parametrize(
    "text, scale, wanted",
    [(text, [], wanted) for text, wanted in BAD.items()]
    + [(text, ["--scale", "tiny"], wanted) for text, wanted in BAD_SCALES.items()],
)
def test_a_bad_file_is_refused_before_anything_runs(place, launch, text, scale, wanted):
    """Fails if a typo costs a night, --scale does nothing, or the error does not say what to do."""
    Path("silent.py").write_text("import sys; sys.exit('I am no trainer')")
    done = launch(sweep_file(text), *scale)
    assert done.returncode == 2 and all(part in done.stderr for part in wanted), done.stderr
    assert (
        "Traceback" not in done.stderr
        and not Path("starts.jsonl").exists()
        and not list(place.glob("logs/*"))
    )


def test_a_scale_may_have_arms_of_its_own(place):
    """Fails if arms that differ in a size, such as the batch's, can only run at one scale."""
    text = TWO_ARMS + '[[scale.tiny.arms]]\ntag = "base"\nCOOLDOWN_FRAC = 0.2\n'
    text += '[[scale.tiny.arms]]\ntag = "spectral_lr_9"\nseeds = [7]\nSPECTRAL_LR_MUL = 9\n'
    assert [arm.tag for arm in read_sweep(sweep_file(text), None).arms] == ["base", "spectral_lr_0.1"]
    small = read_sweep(sweep_file(text), "tiny").arms
    assert [(arm.tag, arm.script, arm.seeds) for arm in small] == [
        ("base", "ord.py", [1, 2]),
        ("spectral_lr_9", "ord.py", [7]),
    ]
    assert small[0].settings["COOLDOWN_FRAC"] == 0.2
    seeds = text.replace("[[scale.tiny.arms]]", "[scale.tiny]\nseeds = [5]\n[[scale.tiny.arms]]", 1)
    found = read_sweep(sweep_file(seeds), "tiny").arms
    assert [arm.seeds for arm in found] == [[5], [7]], "an arm of the scale has its own seeds"


@pytest.mark.parametrize(
    "name, value, wanted",
    [
        ("COOLDOWN_FRAC", "0.3", r"COOLDOWN_FRAC='0.3' is set in the environment.*unset COOLDOWN_FRAC"),
        ("TARGET_LOSS", "3", "TARGET_LOSS='3' is set in the environment"),
        ("SEED", "3", "SEED='3'.*seeds"),
        ("DEVICE", "tpu", "DEVICE='tpu'"),
    ],
)
def test_the_environment_does_not_say_what_to_run(place, monkeypatch, name, value, wanted):
    """Fails if a variable exported days ago silently changes every run."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=wanted):
        read_sweep(sweep_file(TWO_ARMS))


@pytest.mark.parametrize("name, value", [("DEVICE", "cpu"), ("DATA_PATH", "/data"), ("COMPILE", "1")])
def test_the_environment_may_say_where_to_run(place, monkeypatch, name, value):
    """Fails if a sweep file must be edited for every machine."""
    monkeypatch.setenv(name, value)
    sweep = read_sweep(sweep_file(TWO_ARMS))
    assert all(arm.settings[name] == value for arm in sweep.arms)
    assert any(f"{name}={value}" in note for note in sweep.notes)


def hashes(env):
    text = with_env(env)
    return [arm.settings_hash for arm in read_sweep(sweep_file(text)).arms]


@pytest.mark.parametrize(
    "env",
    [
        *("COOLDOWN_FRAC = 0.55", 'COOLDOWN_FRAC = "0.55"', "BATCH_SIZES = [128]", 'BATCH_SIZES = "128"'),
        *('DATA_PATH = "/else"', "TARGET_LOSS = 3.28", "TARGET_LOSS = 3"),
    ],
)
def test_hash_is_the_same_for_the_same_training(place, env):
    """Fails if runs are repeated for a number's notation, a moved folder, or a recording setting."""
    assert hashes(env) == hashes("")


@pytest.mark.parametrize(
    "env", ["COOLDOWN_FRAC = 0.5500001", "BATCH_SIZES = [128, 128]", "DISABLE_FP8 = true"]
)
def test_hash_tells_trainings_apart(place, env):
    """Fails if runs with changed settings are skipped as done."""
    plain = hashes("")
    assert plain[0] != plain[1], "two scripts are two trainings"
    assert not set(hashes(env)) & set(plain)


def test_a_preset_counts_with_its_defaults(place, monkeypatch):
    """Fails if writing out a default makes another run, or `auto` is not the preset it stands for."""
    assert (
        hashes('MODEL = "tiny"') == hashes('MODEL = "tiny"\nCOOLDOWN_FRAC = 0.5') == hashes('MODEL = "auto"')
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    read_trainer.cache_clear()
    resolve = read_trainer("base.py").resolve
    assert resolve({"MODEL": "auto"})["MODEL"] == "plain"
    assert resolve({"MODEL": "auto", "DEVICE": "cpu"})["COOLDOWN_FRAC"] == 0.5


# ------------------------------------------------------------------------------------------------
# The sweeps of this project
# ------------------------------------------------------------------------------------------------

SWEEPS = sorted((ROOT / "sweeps").glob("*.toml"))
SCRIPTS = ("train_gpt", "train_gpt_muon_ord", "train_gpt_simple")


@pytest.fixture
def modules(monkeypatch) -> dict:
    """The project's trainers, which answer for arms in this process, unlike `--check-arms`."""
    modules = {f"{name}.py": importlib.import_module(name) for name in SCRIPTS}

    def check_here(trainer, arms):
        return json.loads(
            json.dumps(checking.answer_for(modules[trainer.path.name], {"DEVICE": "cpu"}, arms))
        )

    monkeypatch.setattr(TrainerInfo, "check", check_here)
    return modules


def test_common_settings_that_do_nothing(place, modules):
    """Fails if one that does nothing in any arm is dropped without a word, or an arm that goes without one is
    refused by a traceback."""
    text = 'script = "train_gpt.py"\n[env]\nMUON_LR = 0.1\n[[arms]]\ntag = "a"\nOPTIMIZER = "adamw"\n'
    with pytest.raises(ValueError, match="MUON_LR in .env. or .scale. does nothing in any arm"):
        read_sweep(sweep_file(text), None)
    with pytest.raises(ValueError, match="ADAM_MATRIX_LR='-1' in arm 'a'"):
        read_sweep(sweep_file(text + 'ADAM_MATRIX_LR = -1\n[[arms]]\ntag = "b"\n'), None)


def test_every_sweep_here_is_accepted_by_its_trainers(place, modules):
    """Fails if an experiment of this project fails at its first run, or has no small version."""
    assert {"smoke", "spectral_lr", "muon_decay", "residual_scale"} <= {path.stem for path in SWEEPS}
    for path in SWEEPS:
        for scale in (None, "tiny"):
            sweep = read_sweep(str(path), scale)
            for arm in sweep.arms:
                env = {name: env_text(value) for name, value in arm.settings.items()}
                modules[arm.script].read_settings({"DEVICE": "cpu", **env, "SEED": "1", "RUN_ID": "x"})
            assert len(sweep.runs()) < (150 if scale else 400), f"{path.name} at scale {scale}"
        if path.stem == "muon_vs_adamw":  # common settings that do nothing in an arm are left out, and said
            taken = [("MUON_LR" in arm.settings, "ADAM_MATRIX_LR" in arm.settings) for arm in sweep.arms]
            assert taken == [(True, False), (False, True)]
            assert any("left out for adamw" in note and "MUON_WARMUP_STEPS" in note for note in sweep.notes)
