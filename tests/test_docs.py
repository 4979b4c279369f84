"""Pages of docs/ stay true: the settings page equals --help, and the worked ideas apply and train."""

import re
import subprocess

import pytest
from helpers import BASELINE, ROOT, base_env, copy_project, losses, run

import train_gpt_muon_ord
from runtime.compiling import CACHE_HELP
from runtime.settings import help_text

IDEAS = dict(
    zip(
        ("MLP_GATE", "LAYER_LR_MULS"),
        re.findall(r"^```diff\n(.*?)^```$", (ROOT / "docs/ideas.md").read_text(), re.S | re.M),
    )
)
ON = {"MLP_GATE": "1", "LAYER_LR_MULS": "1,0.5,0.5,2"}


def test_the_settings_page_is_what_help_prints():
    trainer = train_gpt_muon_ord
    text = help_text(trainer.__doc__, trainer.SETTINGS, trainer.PRESETS, CACHE_HELP)
    (shown,) = re.findall(r"^```text\n(.*?)\n```$", (ROOT / "docs/settings.md").read_text(), re.S | re.M)
    assert shown == text, "write docs/settings.md again; it says how"


@pytest.mark.parametrize("setting", ON)
def test_a_worked_idea_applies_and_trains(setting, shards, tmp_path):
    """Applied to a copy, an idea must change nothing while it is off, and the losses when it is on."""
    copy_project(tmp_path)
    settings = dict(NUM_SCHEDULED_ITERATIONS=3, VAL_LOSS_EVERY=0, SAVE_MODEL=0)

    def trained(run_id: str, **more) -> list[float]:
        env = base_env(shards, RUN_ID=run_id, **settings, **more)
        done = run(tmp_path, str(tmp_path / BASELINE), env, ranks=0)
        assert done.returncode == 0, done.stdout + done.stderr
        return losses(tmp_path, run_id, "train_loss")

    before = trained("before")
    subprocess.run(["git", "apply", "-C1"], cwd=tmp_path, input=IDEAS[setting], text=True, check=True)
    assert trained("off") == before
    assert trained("on", **{setting: ON[setting]})[2] != before[2]
