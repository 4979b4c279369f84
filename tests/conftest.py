"""The scripts are plain files at the repository's root; the tests import them from there, never from
elsewhere."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
