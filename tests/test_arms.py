"""arms: a run has one name in all commands, the shortest that is unambiguous."""

import pytest
from logs_for_tests import SEPARATOR, SOURCE, make_log
from sweeps_for_tests import make_sweep

import plot_loss
from analysis import style
from analysis.arms import group_by_arm, name_arms
from analysis.read_results import read_results
from analysis.run_log import parse_log, read_runs
from monitor_runs import Monitor

LONG = {"data_path": ".", "train_files": "data/embedded/embedded_train_*.bin", "beta_warmup_steps": 10}


def names_of(*settings, scripts=None):
    """Return the names of runs with these settings and scripts."""
    scripts = scripts or ["train_gpt.py"] * len(settings)
    runs = []
    for i, (own, script) in enumerate(zip(settings, scripts, strict=True)):
        text = make_log(f"run{i}", 1, own, 20, script=script)
        text = text.replace('"spectral_lr_mul": 0.1, ', "") if "spectral_lr_mul" not in own else text
        runs += parse_log(text)
    return name_arms([[run] for run in runs], {})


@pytest.mark.parametrize(
    "settings, names",
    [
        ([{"muon_lr": 0.1}, {"muon_lr": 0.2}], ["muon_lr=0.1", "muon_lr=0.2"]),
        ([{**LONG, "muon_lr": a, "adam_lr": a / 10} for a in (0.1, 0.2)], ["muon_lr=0.1", "muon_lr=0.2"]),
        (
            [{"muon_lr": a, "warmup_steps": b} for a in (1, 2) for b in (0, 5)],
            [f"muon_lr={a} warmup_steps={b}" for a in (1, 2) for b in (0, 5)],
        ),
        ([{"muon_lr": 1, "warmup_steps": 0}, {"muon_lr": 2}], ["muon_lr=1", "muon_lr=2"]),
        (
            [{"muon_lr": lr, "warmup_steps": steps} for lr, steps in ((1, 0), (2, 0), (1, 9))],
            ["muon_lr=1 warmup_steps=0", "muon_lr=2 warmup_steps=0", "muon_lr=1 warmup_steps=9"],
        ),
        (
            [{"a": 1, "b": 1, "c": 1, "d": 1}, *({"a": 1, "b": 1, "c": 1, "d": 1, x: 2} for x in "abcd")],
            ["train_gpt", "a=2", "b=2", "c=2", "d=2"],
        ),
        ([{}], ["run0"]),
        ([{"model_facts": {"width": 1}}, {"model_facts": {"width": 2}}], ["run0", "run1"]),
    ],
    ids=["one", "tied", "grid", "missing", "one at a time", "like most", "alone", "nested"],
)
def test_the_settings_that_tell_a_run_apart(settings, names):
    """Names that are identical, or 250 characters long, are useless."""
    assert names_of(*settings) == names


def test_the_baseline_has_no_settings_of_ord_to_differ_in():
    """A setting that only one script has distinguishes its own runs; the script does the rest."""
    scripts = ["train_gpt.py", "train_gpt_muon_ord.py", "train_gpt_muon_ord.py"]
    found = names_of({}, {"spectral_lr_mul": 0.0}, {"spectral_lr_mul": 0.1}, scripts=scripts)
    assert found == ["train_gpt", "spectral_lr_mul=0", "spectral_lr_mul=0.1"]
    assert names_of({}, {"spectral_lr_mul": 0.1}, scripts=scripts[:2]) == ["train_gpt", "train_gpt_muon_ord"]
    differ = names_of({"muon_lr": 1}, {"muon_lr": 2, "spectral_lr_mul": 0.1}, scripts=scripts[:2])
    assert differ == ["muon_lr=1", "muon_lr=2"], "what else differs must not hide behind the script"
    settings = [{"muon_lr": 1}, {"muon_lr": 1, "spectral_lr_mul": 0.1}] + [
        {"muon_lr": 2},
        {"muon_lr": 2, "spectral_lr_mul": 0.1},
    ]
    found = names_of(*settings, scripts=scripts[:2] * 2)
    assert found == [f"muon_lr={a} {name}" for a in (1, 2) for name in ("train_gpt", "train_gpt_muon_ord")]


def test_a_sweeps_tags_are_the_names_in_all_commands(tmp_path, capsys):
    """plot_loss, the report on bare logs and the monitor call an arm the same."""
    arms = {f"lr_{a}": (3.2 + a, {"MUON_LR": a, "ADAM_LR": a / 10}) for a in (0.01, 0.2)}
    make_sweep(tmp_path, "lr", arms, seeds=(1, 2))
    logs = tmp_path / "logs"
    assert [arm.label for arm in group_by_arm(read_runs(logs))[0]] == list(arms)
    assert [arm.label for arm in read_results([logs]).arms] == list(arms)
    assert {row.name for row in Monitor(logs).poll()} == set(arms)
    assert plot_loss.main([str(logs), "--out", str(tmp_path / "a.png")]) == 0
    assert all(f"\n{tag} " in capsys.readouterr().out for tag in list(arms)[:1])
    for manifest in logs.glob("*.json"):
        manifest.unlink()
    wanted = ["muon_lr=0.01", "muon_lr=0.2"]
    assert [arm.label for arm in group_by_arm(read_runs(logs))[0]] == wanted
    assert [arm.label for arm in read_results([logs]).arms] == wanted
    assert {row.name for row in Monitor(logs).poll()} == set(wanted)
    single = plot_loss.separated(read_results([logs]))
    assert [arm.label for arm in single.arms] == [f"{name} seed={seed}" for name in wanted for seed in (1, 2)]


def test_two_sweeps_with_one_tag_are_told_apart(tmp_path):
    make_sweep(tmp_path, "a", {"base": (3.2, {"MUON_LR": 0.1})}, seeds=(1,))
    (tmp_path / "logs").rename(tmp_path / "first")
    make_sweep(tmp_path, "b", {"base": (3.2, {"MUON_LR": 0.2})}, seeds=(1,))
    runs = read_runs([tmp_path / "first", tmp_path / "logs"])
    assert runs[0].name == runs[1].name  # not distinct in their own names either
    assert [arm.label for arm in group_by_arm(runs)[0]] == ["muon_lr=0.1", "muon_lr=0.2"]


def public_log(source, final):
    """Return a public log: no settings, no seed."""
    lines = "".join(
        f"step:{i}/200 val_loss:{final + 2 - i / 100:.4f} train_time:{i}ms\n" for i in (0, 100, 200)
    )
    return f"{SOURCE}{source}{SEPARATOR}\nRunning\n{SEPARATOR}\n{lines}"


def test_public_logs_of_one_name_in_two_folders(tmp_path):
    """Fails if two arms have one name: the losses of one are then taken for the other's."""
    for folder, final in (("old/base", 3.28), ("old/new idea", 3.27), ("new/base", 3.2)):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            text = public_log(f"# {folder}\n", final + i / 1000)
            (tmp_path / folder / f"run{i}.txt").write_text(text)
    results = read_results([tmp_path / "old/base", tmp_path / "old/new idea"])
    names = ["base/run0", "new idea/run0"]
    assert [arm.label for arm in results.arms] == names
    assert {name: found.mean for name, found in results.verdict.summaries.items()} == pytest.approx(
        {"base/run0": 3.281, "new idea/run0": 3.271}
    )
    assert results.verdict.num_comparisons == 1
    singles = plot_loss.separated(results).arms
    assert {arm.label for arm in singles} == {f"{name[:-1]}{i}" for name in names for i in range(3)}
    found = read_results([tmp_path / "old/base", tmp_path / "new/base"]).arms
    assert [arm.label for arm in found] == ["new/base/run0", "old/base/run0"]


def test_logs_of_one_run_id_in_one_folder_are_numbered():
    """A log and an edited copy of it have all in common that could name them."""
    runs = [parse_log(make_log("a", 1, {"model_facts": {"width": i}}, 20), f"{i}.txt")[0] for i in (1, 2)]
    assert name_arms([[run] for run in runs], {}) == ["a (1)", "a (2)"]


@pytest.mark.parametrize("width", [8, 12, 20, 44])
def test_names_are_never_cut_to_the_same(width):
    """A name cut in the middle lost the one setting that differed."""
    lists = [
        [f"beta_warmup_steps=10 data_path=. muon_lr={a} train_files=data/embedded/*.bin" for a in (0.1, 0.2)],
        [f"lrmul-1-1.52-1.73-1-cd0.55-spectral_lr_{a}-20260206-233406-seed2" for a in ("0", "0.1", "1")],
        ["a", "b"],
        [],
        ["the same", "the same"],
        ["base", *(f"{40 * 'a_'}{i}{40 * '_b'}" for i in range(3))],  # they differ in the middle alone
    ]
    for texts in lists:
        found = style.shorten_apart(texts, width)
        assert len(set(found)) == len(set(texts)) and (width < 44 or max(map(len, found), default=0) <= width)
    assert style.shorten_apart(lists[2], width) == ["a", "b"]
