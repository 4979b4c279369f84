"""Commands for sweeps and records start fast, from any folder, and import only analysis/."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("diff_runs", "export_runs", "launch_lr_sweep", "make_record", "monitor_runs")
HEAVY = {"torch", "matplotlib", "scipy", "rich"}  # too slow to import for a quick answer


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_at_once_and_from_anywhere(tmp_path, command):
    """Fails if --help takes seconds over ssh, or fails in another folder."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{command}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / command)!r} + '.py', run_name='__main__')\n"
        "finally:\n"
        f"    sys.exit(sorted({HEAVY} & set(sys.modules)) or 0)\n"
    )
    env = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and f"python {command}.py" in done.stdout, done.stderr


def imported_by(path):
    """Return the names of all modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("command", COMMANDS)
def test_imports_go_one_way(command):
    """Fails if a change to one command can break another."""
    scripts = {script.stem for script in ROOT.glob("*.py")}
    assert not imported_by(ROOT / f"{command}.py") & (scripts | {"torch"})
