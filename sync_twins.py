"""Copy the shared part of train_gpt.py into its twin, train_gpt_muon_ord.py.

    python sync_twins.py

Shared is everything but the module docstring and the text between the two optimizer fences. A test compares
the two.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASELINE, TWIN = HERE / "train_gpt.py", HERE / "train_gpt_muon_ord.py"
PARTS = re.compile(r'\A(""".*?"""\n)(.*?)(^# >>> optimizer$.*?^# <<< optimizer$)(.*)\Z', re.S | re.M)


def synced() -> str:
    """The twin as it should be: its own docstring and fence, the baseline's everything else."""
    _, before, _, after = PARTS.match(BASELINE.read_text(encoding="utf-8")).groups()
    docstring, _, fenced, _ = PARTS.match(TWIN.read_text(encoding="utf-8")).groups()
    return docstring + before + fenced + after


def main() -> int:
    text = synced()
    if text == TWIN.read_text(encoding="utf-8"):
        print("the twins agree")
    else:
        TWIN.write_text(text, encoding="utf-8")
        print(f"{TWIN.name}: shared part copied from {BASELINE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
