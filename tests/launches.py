"""Helpers of the tests of sweep files and of the launcher."""

import os
from pathlib import Path

import psutil

from analysis.sweep_plan import open_manifest, plan

STAND_IN = (Path(__file__).with_name("stand_in.py")).read_text()
TWO_ARMS = """
script = "ord.py"
seeds = [1, 2]
control = "base"
[env]
LR_MULS = [1, 1.52]
[[arms]]
tag = "base"
script = "base.py"
[[arms]]
tag = "spectral_lr_0.1"
SPECTRAL_LR_MUL = 0.1
"""


def with_env(line):
    """Return TWO_ARMS with another line in its [env]."""
    return TWO_ARMS.replace("LR_MULS = [1, 1.52]", line)


def sweep_file(text, name="trial"):
    Path(f"{name}.toml").write_text(text)
    return f"{name}.toml"


def planned(sweep):
    """Plan the sweep: its manifest, and why each run must be made."""
    opened = open_manifest(sweep)
    return opened, plan(sweep, opened)


def alive(folder):
    """List processes that run in a folder, such as those a launcher left behind."""
    found = {process.pid for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(folder)}
    return found - {os.getpid()}
