"""Copy the shared part of train_gpt.py into its twin, train_gpt_muon_ord.py.

    python sync_twins.py            # repair the twin
    python sync_twins.py --check    # exit 1 and say so if they differ

Shared is everything but the module docstring and the text between the two optimizer fences.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = re.compile(r'\A(""".*?"""\n)(.*?)(^# >>> optimizer$.*?^# <<< optimizer$)(.*)\Z', re.S | re.M)


def main(argv: list[str]) -> int:
    ours, twin = HERE / "train_gpt.py", HERE / "train_gpt_muon_ord.py"
    (_, before, _, after), (docstring, _, fenced, _) = (
        PARTS.match(p.read_text()).groups() for p in (ours, twin)
    )
    wanted = docstring + before + fenced + after
    if wanted == twin.read_text():
        print("the twins agree")
        return 0
    if "--check" in argv:
        print(f"{twin.name} differs from {ours.name} outside the fences; run python sync_twins.py")
        return 1
    twin.write_text(wanted)
    print(f"{twin.name}: shared part copied from {ours.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
