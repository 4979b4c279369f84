"""make_record: packed files can be restored. Whole records are tested in test_plot_lr_analysis."""

import lzma

from logs_for_tests import SEPARATOR, make_log

import make_record
from analysis.run_log import read_log


def test_embedded_files_are_kept_once_and_can_be_had_again(tmp_path):
    """Fails if every log of a record has the whole source code, or a run cannot be rebuilt from its log."""
    files = {"train_gpt.py": "import os\n\n\ndef f():\n    pass\n", "runtime/ranks.py": "x = 1\n"}
    head = "".join(f"# file: {name}, {len(text)} bytes\n{text}" for name, text in files.items())
    for number in (1, 2):
        text = make_log(f"run{number}", number)
        log = tmp_path / f"run{number}.txt"
        log.write_text(head + text[text.index(SEPARATOR) :])
        packed = make_record.pack_log(log, tmp_path / "record")
        assert read_log(packed)[0].final_val_loss == read_log(log)[0].final_val_loss
        (kept,) = (tmp_path / "record" / "sources").iterdir()
        stripped = lzma.decompress(packed.read_bytes()).decode()
        assert head not in stripped and kept.name.removesuffix(".xz") in stripped.partition("\n")[0]
        source = lzma.decompress(kept.read_bytes()).decode()
        assert source + stripped[stripped.index("\n" + SEPARATOR) :] == log.read_text()
