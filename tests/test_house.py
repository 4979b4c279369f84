"""House rules: the twins agree, files and functions keep their sizes, imports go one way."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

import sync_twins

ROOT = Path(sync_twins.__file__).resolve().parent
TRAINER_LINES = {"train_gpt.py": 1600, "train_gpt_muon_ord.py": 1780, "train_gpt_simple.py": 500}
FENCE_LINES = {"train_gpt.py": 25, "train_gpt_muon_ord.py": 350}
FUNCTION_LINES = 60
PACKAGES = ("runtime", "kernels", "analysis", "data")
# What each part may import of the project and torch. The root's commands import no other command.
MAY_IMPORT = {
    "trainers": {"runtime", "kernels", "data", "torch"},
    "runtime": {"runtime", "kernels", "data", "torch"},
    "kernels": {"kernels", "torch"},
    "analysis": {"analysis", "data"},
    "data": {"data"},
    "commands": {"analysis"},
}
RUNNING = {"runtime", "torch"}
WITH_A_MODEL = {"sample.py": RUNNING, "evaluate_model.py": RUNNING}  # commands that run one


def tracked(*patterns: str) -> list[Path]:
    command = ["git", "ls-files", *patterns]
    names = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert names, "without files, every rule would hold"
    return [ROOT / name for name in names if (ROOT / name).exists()]


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_the_twins_agree_outside_the_fence():
    """Otherwise a comparison of the two would compare more than ORD with NorMuon."""
    twin = ROOT / "train_gpt_muon_ord.py"
    assert sync_twins.synced() == twin.read_text(), "run python sync_twins.py"


@pytest.mark.parametrize("name", TRAINER_LINES)
def test_a_trainer_can_be_read_in_an_hour(name):
    assert len((ROOT / name).read_text().splitlines()) <= TRAINER_LINES[name]


@pytest.mark.parametrize("name", FENCE_LINES)
def test_what_the_twins_differ_in_is_short(name):
    fence = (ROOT / name).read_text().partition("# >>> optimizer\n")[2].partition("# <<< optimizer\n")[0]
    assert 0 < len(fence.splitlines()) <= FENCE_LINES[name]


def test_the_sections_of_a_trainer_stand_in_the_order_a_reader_asks():
    text = (ROOT / "train_gpt.py").read_text()
    found = re.findall(r"^# -{99}\n# ([A-Z]\w+)", text, re.M)
    order = "Settings Presets Batches Model Loss Optimizer Schedule Evaluation Step Loop"
    assert found == order.split()


def test_no_function_is_longer_than_a_screen():
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in tracked("*.py")
        if "tests" not in path.parts
        for node in functions(path)
        if node.end_lineno - node.lineno + 1 > FUNCTION_LINES and not is_kernel(node)
    ]
    assert not long, "\n".join(long)


def is_kernel(node: ast.FunctionDef) -> bool:
    """True for a Triton kernel, which cannot be split into functions."""
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def imported(path: Path) -> set[str]:
    """Return what a file imports of the project, and torch, also inside functions."""
    ours = {p.stem for p in ROOT.glob("*.py")} | {*PACKAGES, "torch"}
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.partition(".")[0] for name in names} & ours


def test_imports_go_one_way():
    """commands -> analysis -> data; trainers -> runtime, kernels, data; nothing below imports those.

    Commands that are no trainer, analysis/ and data/ do without torch, which takes seconds to import.
    """
    wrong = []
    for path in tracked("*.py"):
        parent = path.parent.relative_to(ROOT).as_posix()
        if parent not in (".", *PACKAGES):
            continue
        kind = parent
        if parent == ".":
            kind = "trainers" if path.name in TRAINER_LINES else "commands"
        allowed = MAY_IMPORT[kind] | WITH_A_MODEL.get(path.name, set())
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in imported(path) - allowed]
    assert not wrong, "\n".join(wrong)


HOLD_NO_TEXT = {  # files to be locked, or for a child's output
    "(LOGS / f'.{sweep.name}.lock').open('w')",
    "console.open('a')",
    "log.open()",
}
OPEN_OTHERWISE = ("Image", "lzma", "os", "self", "tarfile")


def is_text_of_any_encoding(call: ast.Call) -> bool:
    """Return whether a call opens, reads or writes a file as text without stating its encoding."""
    is_method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if is_method else getattr(call.func, "id", "")
    if any(word.arg == "encoding" for word in call.keywords) or ast.unparse(call) in HOLD_NO_TEXT:
        return False
    if name != "open":
        return is_method and name in ("read_text", "write_text")
    if is_method and ast.unparse(call.func.value) in OPEN_OTHERWISE:
        return False
    modes = [word.value for word in call.keywords if word.arg == "mode"] + call.args[not is_method :]
    return "b" not in (modes[0].value if modes else "r")


def test_every_text_file_is_opened_in_a_stated_encoding():
    """Otherwise a ρ in a file is an error under an ASCII locale, or another letter on Windows."""
    unstated = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)[:70]}"
        for path in tracked("*.py")
        if "tests" not in path.parts and path.parent.name != "records"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and is_text_of_any_encoding(node)
    ]
    assert not unstated, "\n".join(unstated)
