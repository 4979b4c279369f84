"""Pages of docs/ stay true: the settings page equals --help, and the worked ideas apply and train."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import BASELINE, ROOT, base_env, train_steps, trainer_on

import train_gpt
import train_gpt_muon_ord
from runtime.compiling import CACHE_HELP
from runtime.settings import SettingsError, help_text

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
def test_a_worked_idea_applies_and_trains(setting, shards, tmp_path, load):
    """Applied to a copy, an idea must change nothing while it is off, and the losses when it is on."""
    script = Path(shutil.copy(ROOT / BASELINE, tmp_path))
    subprocess.run(["git", "apply", "-C1"], cwd=tmp_path, input=IDEAS[setting], text=True, check=True)
    changed = load(script.read_text())

    def trained(trainer, **on) -> list[float]:
        return train_steps(*trainer_on(trainer, **base_env(shards, NUM_SCHEDULED_ITERATIONS=3, **on)), 0, 3)

    before = trained(train_gpt)
    assert trained(changed) == before
    assert trained(changed, **{setting: ON[setting]})[2] != before[2]
    with pytest.raises(SettingsError, match=setting):
        trained(changed, **{setting: "1,2"})
