"""run_log: reads every format correctly, never fails, and reads only logs that have changed."""

import hashlib
import json
import lzma
import math
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs_for_tests import SEPARATOR, SOURCE, header, make_log, step_lines, with_files

from analysis import run_log
from analysis.arms import arm_key, group_by_arm
from analysis.run_log import LogFollower, embedded_sources, parse_log, read_log, read_runs

MORE = int(os.environ.get("FUZZ", 1))  # FUZZ=100 pytest ...: a long search
ROOT = Path(run_log.__file__).parent.parent


def only(text, path="logs/some-name.txt"):
    runs = parse_log(text, path)
    assert len(runs) == 1
    return runs[0]


def values(run, key):
    return run.columns[key].value.tolist()


def same_curve(a, b):
    for name in ("step", "loss", "time_ms", "tokens", "acc"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def same_run(a, b):
    """Assert that two runs are equal in everything a reader can see."""
    same_curve(a.val, b.val)
    same_curve(a.train, b.train)
    assert (a.state, a.last_step, a.num_steps, a.run_id, a.seed, a.unread_lines) == (
        (b.state, b.last_step, b.num_steps, b.run_id, b.seed, b.unread_lines)
    )
    assert a.events == b.events and a.config == b.config and set(a.columns) == set(b.columns)
    for key in a.columns:
        np.testing.assert_array_equal(a.columns[key].step, b.columns[key].step)
        np.testing.assert_array_equal(a.columns[key].value, b.columns[key].value)


# ------------------------------------------------------------------------------------------------
# Our own logs
# ------------------------------------------------------------------------------------------------


def test_reads_every_value_of_our_own_log():
    """Fails if a number lands in the wrong column, unit or step."""
    line = (
        "step:50/1600 val_loss:4.12345 train_time:3100ms step_avg:62.00ms lr_mul:1.0000 beta1:0.5000 "
        "beta2:0.9500 batch_size:131072 tokens:6553600 val_acc:0.27110 spec_attn:[-0.0631,1e-3] "
        "spec_mlp:[1,nan]\n"
        "step:51/1600 train_loss:4.1 train_time:3162ms step_avg:62.00ms lr_mul:0.5 muon_momentum:0.8667\n"
    )
    run = only(header("abc", 7, {"target_loss": 3.28}) + line + "event:stopped reason:asked to, politely\n")
    assert (run.run_id, run.seed, run.script, run.num_steps, run.last_step) == (
        ("abc", 7, "train_gpt_muon_ord.py", 1600, 51)
    )
    assert run.source_hash and run.target_loss == 3.28 and run.state == "stopped"
    assert run.val.step.tolist() == [50] and run.val.loss.tolist() == [4.12345]
    assert run.val.time_ms.tolist() == [3100] and run.val.tokens.tolist() == [6553600]
    assert run.val.acc.tolist() == [0.27110]
    assert run.train.step.tolist() == [51] and run.train.loss.tolist() == [4.1]
    assert run.columns["lr_mul"].step.tolist() == [50, 51] and values(run, "lr_mul") == [1, 0.5]
    assert values(run, "muon_momentum") == [0.8667] and values(run, "spec_attn") == [[-0.0631, 0.001]]
    np.testing.assert_array_equal(run.columns["spec_mlp"].value, [[1, math.nan]])
    assert values(run, "beta1") == [0.5] and values(run, "beta2") == [0.95]
    assert run.event("stopped").fields == {"reason": "asked to, politely"}
    started = run.event("started")
    assert started.after_step == -1 and started.fields["device"] == "NVIDIA H100 80GB HBM3"
    assert run.settings["lr_muls"] == [1.0, 1.52, 1.73, 1.0] and "model_facts" not in run.settings
    assert run.unread_lines == 0


def test_keys_in_any_order_and_unknown_keys():
    """Fails if the order of keys matters, or an unknown key or a word is lost."""
    run = only("step:5/9 lr_mul:1.5 train_time:1.5s new:0.25 val_loss:3.5 backend:flex step_avg:300ms\n")
    assert run.val.loss.tolist() == [3.5] and run.val.time_ms.tolist() == [1500]
    assert values(run, "new") == [0.25] and values(run, "backend") == ["flex"]


def test_one_wrong_word_does_not_spoil_a_column():
    """One bad value among a thousand numbers must not discard the curve."""
    run = only("step:1/9 lr:0.5 spec:[1,2]\nstep:2/9 lr:oops spec:[1]\nstep:3/9 lr:0.25 spec:[3,4]\n")
    np.testing.assert_array_equal(run.columns["lr"].value, [0.5, math.nan, 0.25])
    np.testing.assert_array_equal(run.columns["spec"].value, [[1, 2], [1, math.nan], [3, 4]])


@pytest.mark.parametrize("value", ["abc", "[1,2]"])
def test_a_word_or_a_list_is_no_number(value):
    """One odd line must not end a monitor that shows a thousand logs."""
    run = only(f"step:1/9 train_loss:4 train_time:{value} tokens:7\n")
    assert run.numbers("train_time") is None and math.isnan(run.last_time_ms)
    assert run.last("tokens") == 7 and math.isnan(run.last("nothing"))


def test_source_lookalikes_are_not_read():
    """Step, event and config lines inside the embedded source are text, wherever they are."""
    run = only(make_log())
    assert run.val.loss.min() > 3 and run.state == "finished" and run.seed == 1
    assert not [event for event in run.events if event.name == "crashed"]
    assert run.val.step[0] == 0 and len(run.val) == 33 and run.train.step.tolist() == list(range(1, 1601))
    assert 7 in run.train.step and 7 not in run.val.step and run.unread_lines == 0


@pytest.mark.parametrize("cut", [50, len(SOURCE) // 2, len(SOURCE) - 5, len(SOURCE) + 40])
def test_source_alone_has_no_steps(tmp_path, cut):
    """A log first seen inside its header must show no steps from its source, once it is continued."""
    text, log = header(), tmp_path / "run.txt"
    log.write_text(text[:cut])
    follower = LogFollower(tmp_path)
    follower.poll()
    with log.open("a") as file:
        file.write(text[cut:] + "step:1/9 train_loss:5.0 train_time:9ms\n")
    follower.poll()
    (run,) = follower.logs[log].runs
    assert len(run.val) == 0 and run.train.loss.tolist() == [5.0] and run.events[0].name == "started"
    assert run.unread_lines == 0 and run.source_hash == only(text).source_hash
    assert len(only(SOURCE).val) == 0  # ends with its source
    assert only(SOURCE).unread_lines > 0


def test_half_a_last_line_waits():
    """`val_loss:3.2` of `3.2781` must not be read as 3.2, nor be lost when the rest comes."""
    text = header() + "step:50/100 val_loss:3.31234 train_time:5ms\nstep:100/100 val_loss:3.2"
    assert only(text).val.loss.tolist() == [3.31234] and only(text).unread_lines == 0
    assert only(text + "7812 train_time:10ms\n").val.loss.tolist() == [3.31234, 3.27812]


@settings(max_examples=50 * MORE, deadline=None, database=None)
@given(st.integers(0, 10_000))
def test_a_log_cut_anywhere_is_the_beginning_of_the_whole(cut):
    """Fails if a log that is still being written shows a number that it will not have in the end."""
    head, text = header(num_steps=100), make_log(num_steps=100)
    written = text[len(head) :][:cut]
    run, whole = only(head + written), only(text)
    for key, column in run.columns.items():
        end = whole.columns[key]
        np.testing.assert_array_equal(column.step, end.step[: len(column.step)])
        np.testing.assert_array_equal(column.value, end.value[: len(column.step)])
    whole_lines = [line for line in written.split("\n")[:-1] if line.startswith("step:")]
    assert len(run.val) + len(run.train) >= len(whole_lines) and run.unread_lines == 0


def test_last_line_without_newline_counts_if_surely_whole():
    """Editors strip the last newline: the final loss must survive that, but never truncated."""
    lines = (
        "step:50/100 val_loss:3.31 train_time:5ms step_avg:1.00ms\nstep:100/100 val_loss:3.28 train_time:10ms"
    )
    assert only(lines + " step_avg:1.00ms").final_val_loss == 3.28
    assert only(lines + " step_avg:1.0").final_val_loss == 3.31
    assert only(lines).final_val_loss == 3.31
    unit_less = "step:50/100 val_loss:3.31 acc:0.25\nstep:100/100 val_loss:3.28 acc:0.2"
    assert only(unit_less).final_val_loss == 3.31  # 0.2 may be a truncated 0.27


@pytest.mark.parametrize("resumed_at", [1000, 1200])
def test_resumed_steps_count_once_and_the_later_ones(resumed_at):
    """A run that crashed at 1234 resumes from its checkpoint: repeated steps replace the lost ones."""
    whole = step_lines()
    before = step_lines(final=9.0, end=1234)  # final=9: recognizably different numbers
    again = step_lines(begin=resumed_at + 1)
    resumed = f"event:resumed step:{resumed_at} from:checkpoint.pt\n"
    run = only(header() + before + resumed + again + "event:finished\n")
    reference = only(header() + whole)
    assert run.train.step.tolist() == list(range(1, 1601)) and (np.diff(run.val.step) > 0).all()
    late = run.train.step > resumed_at
    assert (run.train.loss[late] == reference.train.loss[late]).all()
    assert (run.train.loss[~late] != reference.train.loss[~late]).all()
    assert (run.columns["lr_mul"].step == reference.columns["lr_mul"].step).all()
    assert run.state == "finished" and run.event("resumed").after_step == resumed_at


def test_validation_done_again_on_resuming_counts():
    """Resuming at step 100 may validate it again: of two losses at one step, the later one counts."""
    again = "event:resumed step:100\nstep:100/1600 val_loss:3.125 train_time:1ms\n"
    run = only(header() + step_lines(end=150) + again)
    assert run.val.step.tolist() == [0, 50, 100] and run.val.loss[-1] == 3.125
    assert run.columns["val_loss"].value.tolist() == run.val.loss.tolist()


def test_resumed_after_a_torn_line():
    """A full disk tears a line, which the resumed run ends: it must be neither lost silently nor misread."""
    torn = header() + step_lines(end=100) + "step:101/1600 train_lo"
    run = only(torn + "\nevent:resumed step:90\n" + step_lines(begin=91))
    assert run.train.step.tolist() == list(range(1, 1601)) and run.unread_lines == 1
    for rest in ("step:102/1600 train_loss:1.25 train_time:9ms\n", "event:crashed error:no room\n"):
        run = only(torn + rest)
        assert run.unread_lines == 1 and run.last_step == 100 and "train_loevent" not in run.columns


def test_started_again_without_resuming_is_another_trial():
    """Two separate runs in one file must not be drawn as one curve."""
    first, second = parse_log(header(seed=1) + step_lines(end=300) + make_log(seed=2), "twice.txt")
    assert first.last_step == 300 and first.seed == 1 and first.state == "stopped"
    assert len(second.train) == 1600 and second.seed == 2 and second.state == "finished"
    assert (first.run_id, second.run_id) == ("run#1", "run#2") and first.name == second.name == "run"


@pytest.mark.parametrize(
    "end, state",
    [
        ("event:finished", "finished"),
        ("event:crashed error:CUDA out of memory: tried 5 GiB step:7", "crashed"),
        ("event:diverged step:1600", "diverged"),
        ("event:stopped", "stopped"),
        ("", "running"),
        ("event:crashed error:x\nevent:resumed step:1600", "running"),
    ],
)
def test_state_comes_from_events(end, state):
    """A crashed run reported as finished would enter the statistics as a result."""
    run = only(make_log(end_event=end))
    assert run.state == state
    if state == "crashed":
        assert run.event("crashed").fields == {"error": "CUDA out of memory: tried 5 GiB step:7"}


def test_event_fields():
    """Values may contain blanks, colons and quotes; a warning's text must be read back unchanged."""
    text = 'no "fast" path: using a:b\nand c'
    log = f"event:warning text:{json.dumps(text)} step:7\n"
    log += "event:x a: b:1 c:two words d:{} e:http://h:80/p f:\n"
    log += "event:crashed rank:3 error:ValueError: shape: (1, 2) step:x\nevent:9 bad name! x\nevent:\n"
    run = only(header() + log)
    assert run.event("warning").fields == {"text": text, "step": "7"}
    wanted = {"a": "", "b": "1", "c": "two words", "d": "{}", "e": "http://h:80/p", "f": ""}
    assert run.event("x").fields == wanted
    assert run.event("crashed").fields == {"rank": "3", "error": "ValueError: shape: (1, 2) step:x"}
    assert run.event("9").fields == {} and run.unread_lines == 1


def test_diverged_loss():
    run = only("step:1/9 val_loss:5.0 train_time:1ms\nstep:2/9 val_loss:nan train_time:2ms\n")
    assert math.isnan(run.final_val_loss) and run.best_val_loss == 5.0
    empty = only("")
    assert all(map(math.isnan, (empty.final_val_loss, empty.best_val_loss, empty.last_time_ms)))


def test_first_at_target():
    losses = enumerate((4, 3.28, 3.3, 3.2), 1)
    run = only("".join(f"step:{s}/9 val_loss:{v} train_time:{s}s\n" for s, v in losses))
    point = run.first_at(3.28)
    assert (point.step, point.loss, point.time_ms) == (2, 3.28, 2000) and math.isnan(point.tokens)
    assert run.first_at(3.0) is None


def with_affects(text, **affects):
    """Return the log with a line that says which settings affect what."""
    return text.replace("\nevent:started", f"\naffects:{json.dumps(affects)}\nevent:started", 1)


def test_the_log_says_what_does_not_change_the_training():
    """Fails if runs on two machines are different arms, or runs with different training settings are one."""
    settings = [{"kernels": "a", "new_knob": 1}, {"kernels": "b", "new_knob": 2}]
    plain = [only(make_log(f"r{i}", i, s, 100)) for i, s in enumerate(settings)]
    assert {"seed", "run_id", "kernels", "compile", "val_loss_every"} <= plain[0].not_training
    assert arm_key(plain[0]) != arm_key(plain[1])
    marks = {"recording": ["run_id", "new_knob"], "machine": ["kernels"]}
    said = [only(with_affects(make_log(f"r{i}", i, s, 100), **marks)) for i, s in enumerate(settings)]
    assert said[0].affects == marks and said[0].not_training == {"seed", "run_id", "new_knob", "kernels"}
    assert arm_key(said[0]) == arm_key(said[1]) and said[0].unread_lines == 0
    (arm,), notes = group_by_arm(said)
    assert not notes and arm.seeds == [0, 1]
    other = only(with_affects(make_log("r2", 2, settings[0], 100), recording=["run_id"], machine=["kernels"]))
    assert arm_key(other) != arm_key(said[0])


DAMAGED = ["affects:3", "affects:{", 'affects:{"machine": 3}', 'affects:{"machine": [[1]]}']


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_affects_line_is_counted(line):
    run = only(make_log(num_steps=100).replace("\nevent:started", f"\n{line}\nevent:started", 1))
    assert run.affects == run_log.AFFECTS and run.state == "finished"
    assert "affects" not in "".join(run.unread_examples)  # a bad header line is no unread step


FILES = {"train_gpt.py": SOURCE, "runtime/ranks.py": "import os\n\n\ndef f():\n    return '=' * 100\n"}
FILES |= {"data/last.py": "import os  # no newline at the end"}


def test_embedded_sources_come_back_byte_for_byte(tmp_path):
    """Fails if a run cannot be rebuilt from its log, or a step-like line in the files is read as a step."""
    log = tmp_path / "run.txt"
    log.write_text(with_files(make_log(), FILES))
    assert embedded_sources(log) == {name: source.encode() for name, source in FILES.items()}
    (run,) = read_log(log)
    same_run(run, only(make_log()))
    packed = tmp_path / "packed.txt.xz"
    packed.write_bytes(lzma.compress(log.read_bytes()))
    assert embedded_sources(packed) == embedded_sources(log)
    head, _, rest = log.read_bytes().partition(b"\n" + SEPARATOR.encode())
    name = f"sources/{hashlib.sha256(head).hexdigest()[:16]}.txt.xz"
    (tmp_path / "sources").mkdir()
    (tmp_path / name).write_bytes(lzma.compress(head))
    moved = f"The source code that stood here is in {name}, without its last line break.\n{SEPARATOR}"
    (tmp_path / "moved.txt").write_bytes(moved.encode() + rest)
    assert embedded_sources(tmp_path / "moved.txt") == embedded_sources(log)


@pytest.mark.parametrize(
    "text, message",
    [
        (make_log(num_steps=9), "does not say which source files it embeds"),
        (with_files(header(), FILES)[:300], f"ends within train_gpt.py: .* bytes, wanted {len(SOURCE)}"),
        (with_files(header(), {"../x.py": SOURCE}), "wanted a path inside the project"),
        (
            with_files(header(), FILES).replace("import os", "import os, re"),
            "the counts of bytes are wrong",
        ),
    ],
)
def test_a_log_without_whole_sources_is_refused(tmp_path, text, message):
    (tmp_path / "run.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        embedded_sources(tmp_path / "run.txt")


# ------------------------------------------------------------------------------------------------
# Other people's logs
# ------------------------------------------------------------------------------------------------

SMI = """Running pytorch 2.5.0+cu124 compiled for CUDA 12.4
nvidia-smi:
+-----------------------------------------------------------------------------------------+
|=========================================+========================+======================|
|   0  NVIDIA H100 80GB HBM3          Off |   00000000:18:00.0 Off |                    0 |
"""


@pytest.mark.parametrize("opening", ["", SEPARATOR + "\n"])
def test_public_log_of_2024(opening):
    """Times in ms that restart after ten steps, `step_avg:nanms`, source and nvidia-smi in the header."""
    text = opening + SOURCE + SEPARATOR + "\n" + SMI + SEPARATOR + "\n"
    text += "step:0/5100 val_loss:10.82584 train_time:387ms step_avg:nanms\n"
    text += "step:10/5100 train_loss:9.2419 train_time:25859ms step_avg:nanms\n"
    text += "step:11/5100 train_loss:9.1337 train_time:77ms step_avg:nanms\n"
    text += "step:5100/5100 val_loss:3.2781 train_time:264761ms step_avg:143.21ms\n"
    text += "peak memory consumption: 33000 MiB\n"
    run = only(text)
    assert run.val.step.tolist() == [0, 5100] and run.val.loss.tolist() == [10.82584, 3.2781]
    assert run.val.time_ms.tolist() == [387, 264761] and run.state == "finished" and run.num_steps == 5100
    assert run.train.step.tolist() == [10, 11] and run.unread_lines == 0 and run.run_id == "some-name"
    assert np.isnan(run.columns["step_avg"].value[:3]).all() and len(run.source_hash) == 16
    # A repeat with other timings has the same source hash; a changed source has another.
    assert only(text.replace("3.2781", "3.3")).source_hash == run.source_hash
    assert only(text.replace("import os", "import re")).source_hash != run.source_hash


def test_public_log_in_seconds_with_seed():
    """The optimization track's logs: seconds, other keys, the seed in the header."""
    text = SOURCE + SEPARATOR + "\nRunning PyTorch 2.11.0\nUsing seed=9\nUsing mu=0.95\n" + SEPARATOR + "\n"
    text += "step:125/3225 val_loss:4.62997 train_time:23.965s step_avg:191.72ms\n"
    text += "step:3225/3225 val_loss:3.27807 train_time:504.5s step_avg:159.33ms mfu:3.06%\n"
    run = only(text)
    assert run.val.time_ms.tolist() == [23965, 504500] and run.seed == 9 and run.state == "finished"
    assert run.columns["step_avg"].value.tolist() == [191.72, 159.33]
    assert run.columns["mfu"].value.tolist() == [3.06] and run.unread_lines == 0


def test_several_trials_in_a_file():
    """Each trial counts in the statistics; the second must not hide the first one's final loss."""
    trial = "".join(f"step:{s}/200 train_time:{s}ms step_avg:1.00ms\n" for s in range(1, 200))
    texts = []
    for n, last in enumerate([3.281, 3.279, 3.277]):
        points = (0, 10.8), (100, 4.0), (200, last)
        val = [f"step:{s}/200 val_loss:{v} train_time:{s}ms step_avg:1.00ms\n" for s, v in points]
        texts += [val[0], trial if n % 2 else "", *val[1:]]
    runs = parse_log("".join(texts), "many.txt")
    assert [run.final_val_loss for run in runs] == [3.281, 3.279, 3.277]
    assert [run.trial for run in runs] == [0, 1, 2] and [run.state for run in runs] == ["finished"] * 3
    assert [len(run.val) for run in runs] == [3, 3, 3] and len({run.run_id for run in runs}) == 3


def test_trials_of_appended_logs_have_their_own_headers():
    """Fails if the first trial gets the source and seed of the last: arms would be pooled, or exchanged."""
    sources = [SOURCE, SOURCE + "x = 2\n"]
    logs = [
        f"{source}{SEPARATOR}\nseed: {seed}\n{SEPARATOR}\nstep:9/9 val_loss:3.{seed} train_time:9ms\n"
        for seed, source in enumerate(sources, 1)
    ]
    alone = [only(text) for text in logs]
    for run, wanted in zip(parse_log("".join(logs)), alone, strict=True):
        assert (run.seed, run.source_hash) == (wanted.seed, wanted.source_hash)
    assert [run.seed for run in alone] == [1, 2] and len({run.source_hash for run in alone}) == 2


def test_trials_of_final_lines_only():
    runs = parse_log("".join(f"step:1750/1750 val_loss:{v} train_time:9s\n" for v in (3.27, 3.28, 3.26)))
    assert [run.final_val_loss for run in runs] == [3.27, 3.28, 3.26]
    runs = parse_log("step:1/5 val_loss:4 train_time:1s\nstep:2/8 val_loss:3 train_time:1s\n")
    assert [run.num_steps for run in runs] == [5, 8]


def test_validation_at_the_step_of_a_training_line_is_no_new_trial():
    """Public logs print step 250 twice, for training and validation; on a GPU, the loss is a step late."""
    lines = "".join(f"step:{s}/9 train_time:{s}ms\n" for s in range(1, 5))
    only(lines + "step:4/9 val_loss:4.5 train_time:5ms\nstep:5/9 train_time:6ms\n")
    only("step:5/9 train_time:6ms\nstep:5/9 train_loss:4 lr:1\nstep:6/9 train_time:7ms\n")
    late = "step:50/99 val_loss:4 train_time:1ms\nstep:49/99 train_loss:4.2 train_time:1ms\n"
    only(late + "step:50/99 train_loss:4.1 train_time:1ms\n")


def test_llmc_log():
    """The oldest format: tel is the validation loss, trl the training loss."""
    text = "s:0 tel:11.0092\ns:0 trl:11.0091 lr:0.000001 norm:15.37\n"
    text += "".join(f"s:{s} trl:{9 - s / 100} lr:{s / 1e6:.6f} norm:1.50\n" for s in range(1, 250))
    run = only(text + "s:250 tel:6.1710\ns:250 eval:0.2911\n")
    assert run.val.step.tolist() == [0, 250] and run.val.loss.tolist() == [11.0092, 6.1710]
    assert run.train.step.tolist() == list(range(250)) and run.train.loss[1] == 8.99
    assert run.columns["lr"].value[249] == 0.000249 and values(run, "eval") == [0.2911]
    assert run.state == "unknown" and run.num_steps is None and run.unread_lines == 0


def test_windows_newlines():
    run = only((header() + step_lines(end=100)).replace("\n", "\r\n"))
    same_curve(run.train, only(header() + step_lines(end=100)).train)
    assert run.unread_lines == 0


def test_what_cannot_be_read_is_counted_and_shown():
    """A reader that silently drops lines turns a broken log into a clean curve."""
    noise = "step:5/10 val_loss:abc:[ train_time\n  warning: something\nstep:x/10 val_loss:3\n\n3.25\n"
    run = only(header() + "step:4/10 val_loss:4.0 train_time:1ms\n" + noise)
    assert run.unread_lines == 4 and run.val.step.tolist() == [4]
    assert "step:5/10 val_loss:abc:[ train_time" in run.unread_examples and len(run.unread_examples) == 3


# ------------------------------------------------------------------------------------------------
# Any input at all
# ------------------------------------------------------------------------------------------------

WORDS = """step: s: 1 250 / 1600 val_loss: train_loss: tel: 4.123 -1e-5 nan ms s % [ ] , 0.1,0.2 [0.1,0.2] :
event: resumed started finished config: {} {"seed":1} \"\"\" . - 999999999999 \0 é _ 1_0 ١"""
LINES = f"""step:2/9 val_loss:3.5 train_time:7ms
step:3/9 val_loss:3.25 train_time:9ms
step:2/9 spec:[1,2]
step:4/9 spec:[1,2,3] w:x
affects:{{"machine": ["kernels"]}}
config:{{"seed": 3}}
import os
def f():
step:2/9 val_loss:1
{SEPARATOR}
"""
MORE_PIECES = [" ", " ", "\n", "\n", "\r\n", " step:3", "\x0b", "\u2028", "peak memory \n"]
PIECES = st.sampled_from([*WORDS.split(), *LINES.splitlines(keepends=True), *MORE_PIECES])


def check_invariants(runs):
    assert runs
    for run in runs:
        assert (np.diff(run.val.step) > 0).all() and (np.diff(run.train.step) > 0).all()
        assert len(run.val.step) == len(run.val.loss) == len(run.val.time_ms) == len(run.val.tokens)
        for key in run.columns:
            column = run.columns[key]
            assert len(column.step) == len(column.value) and (np.diff(column.step) > 0).all()
        assert run.unread_lines >= 0 and run.state in (*run_log.END_EVENTS, "running", "unknown")
        assert isinstance(run.final_val_loss, float) and isinstance(run.best_val_loss, float)
        arm_key(run), run.first_at(3.28), run.target_loss, run.last_time_ms
    group_by_arm(runs)


@settings(max_examples=300 * MORE, deadline=None, database=None)
@given(st.binary(max_size=400))
def test_no_bytes_make_it_crash(data):
    check_invariants(parse_log(data))


@settings(max_examples=600 * MORE, deadline=None, database=None)
@given(st.lists(PIECES, max_size=60))
def test_no_text_makes_it_crash(pieces):
    """Shuffled parts of real logs must give a result and no exception."""
    check_invariants(parse_log("".join(pieces), "x.txt"))


ODD_NUMBERS = "nan inf -inf 1e-05 0 -0.0 123456789012345678 .5 5. +3 - 1.2.3"
NUMBER = st.one_of(
    st.floats(width=64).map(repr),
    st.floats(-1e6, 1e6).map(lambda x: f"{x:.4f}"),
    st.floats(0, 99).map(lambda x: f"{x:.2f}"),
    st.sampled_from([*ODD_NUMBERS.split(), ""]),
)
KEYS = st.sampled_from(["a", "beta1", "beta2", "train_time", "x/y", "muon_lr", "lr"])


@settings(max_examples=100 * MORE, deadline=None, database=None)
@given(
    st.lists(KEYS, min_size=1, max_size=4),
    st.lists(st.lists(NUMBER, min_size=4, max_size=4), min_size=1, max_size=12),
    st.lists(st.sampled_from(["", "", "ms", "s", "%"]), min_size=4, max_size=4),
    st.booleans(),
)
def test_every_line_is_read_as_if_it_were_alone(keys, table, units, as_list):
    """No line may change how another is read: together they give, bit for bit, what each gives alone."""
    lines = []
    for step, row in enumerate(table, 1000):
        fields = [f"{key}:{number}{unit}" for key, number, unit in zip(keys, row, units, strict=False)]
        fields += [f"spec:[{row[0]},{row[1]}]"] if as_list else []
        lines.append(f"step:{step}/9999 {' '.join(fields)}\n")
    together, alone = only("".join(lines)), [only(line) for line in lines]
    assert together.unread_lines == sum(run.unread_lines for run in alone)
    words = {key for run in alone for key in run.columns if run.columns[key].value.dtype == object}
    for key in {key for run in alone for key in run.columns}:
        steps = [run.last_step for run in alone if key in run.columns]
        assert together.columns[key].step.tolist() == steps
        for run in alone:
            if key in run.columns and key not in words:
                value = together.columns[key].value[steps.index(run.last_step)]
                assert str(value) == str(run.columns[key].value[0])  # -0.0 is not 0.0


HARD = ["123456789012345678", "0.1234567890123456789", "9007199254740993"]
HARD += ["4.35", "-0.0", "1e-05", "nan", "-inf", ".5", "5.", "+3"]


@pytest.mark.parametrize("text", HARD)
@pytest.mark.parametrize("unit, factor", [("", 1), ("ms", 1), ("s", 1000), ("%", 1)])
def test_a_number_is_what_float_makes_of_it(text, unit, factor):
    assert str(only(f"step:1/9 x:{text}{unit}\n").columns["x"].value[0]) == str(float(text) * factor)


def test_examples_of_unreadable_lines_differ_as_shown():
    """Fails if lines that differ only beyond what is kept of them take the place of others."""
    lines = ["step:1/9 val_loss:3.2 train_time:9ms", *(f"{'x' * 200}{i}" for i in range(3)), "y"]
    run = only("\n".join([*lines, ""]))
    assert run.unread_lines == 4 and run.unread_examples == ["x" * 200, "y"]


BROKEN = {
    "a:1ms b:2": "a:1ms2 b:",
    "a:[1,2]": "a:[,12]",
    "a:[1,2] b:3": "a:[12,] b:3",
    "a:1.5 b:2": "a:.15 b:",
}


@pytest.mark.parametrize("good, bad", BROKEN.items())
def test_a_broken_line_among_good_ones(good, bad):
    """Lines with the same letters but digits elsewhere must not shift numbers into the next column."""
    lines = [f"step:{s}/99 {good}" for s in range(10, 16)]
    lines[4] = f"step:14/99 {bad}"
    run = only("\n".join(lines) + "\n")
    assert run.unread_lines == 1 and run.unread_examples == [lines[4]]
    for column in run.columns.values():
        assert 14 not in column.step and len(column.step) == 5 and len(np.unique(column.value, axis=0)) == 1


def test_keys_with_a_stray_digit_are_not_confused():
    """`tra1in_loss` has the letters of `train_loss`, but its digit must not enter a number."""
    lines = [f"step:{s}/99 train_loss:4.5 beta1:0.5 train_time:9ms" for s in range(50)]
    lines[20] = "step:20/99 tra1in_loss:4.5 beta1:0.5 train_time:9ms"
    lines[30] = "step:30/99 train_loss:4.5 beta2:0.5 train_time:9ms"
    run = only("\n".join(lines) + "\n")
    assert 20 not in run.train.step and run.columns["tra1in_loss"].step.tolist() == [20]
    assert run.columns["beta2"].step.tolist() == [30] and len(run.columns["beta1"].step) == 49
    assert set(run.train.loss) == {4.5}


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def test_read_runs_of_files_and_folders(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(make_log(name, num_steps=100))
    (tmp_path / "a.out").write_text("console output")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "c.txt").write_text("step:1/1 val_loss:1 train_time:1ms\n")
    assert [run.run_id for run in read_runs(tmp_path)] == ["a", "b"]
    assert [run.run_id for run in read_runs([tmp_path / "deeper", tmp_path / "b.txt"])] == ["c", "b"]
    os.utime(tmp_path / "a.txt", (2e9, 2e9))
    assert run_log.newest_log(tmp_path) == tmp_path / "a.txt"
    assert run_log.newest_log(tmp_path / "none") is None
    with pytest.raises(FileNotFoundError, match="logs are logs/RUN_ID.txt"):
        read_log(tmp_path / "missing.txt")
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        read_log(tmp_path)


def test_a_log_named_twice_is_read_once(tmp_path, monkeypatch):
    """Fails if `C/*.txt*`, or a folder and a log in it, makes three public logs six samples."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("step:1/1 val_loss:1 train_time:1ms\n")
        (tmp_path / f"{name}.txt.xz").write_bytes(lzma.compress((tmp_path / f"{name}.txt").read_bytes()))
    monkeypatch.chdir(tmp_path)
    several = ["b.txt", "./b.txt", "."]
    for paths in (sorted(tmp_path.iterdir()), [".", "a.txt"], ["a.txt.xz", tmp_path], several):
        assert sorted(run.run_id for run in read_runs(paths)) == ["a", "b"]


def test_follower_reads_only_logs_that_changed(tmp_path, monkeypatch):
    """Rereading 1,000 logs every second would keep the machine busy."""
    read = []
    monkeypatch.setattr(run_log, "read_log", lambda path: (read.append(path), read_log(path))[1])
    log, other = tmp_path / "run.txt", tmp_path / "other.txt"
    text = make_log("run", num_steps=300)
    cut = len(header("run", num_steps=300)) + 5000
    log.write_text(text[:cut])
    other.write_text(text)
    follower = LogFollower(tmp_path, log)
    assert follower.poll() == [other, log] and follower.poll() == []
    with log.open("a") as file:
        file.write(text[cut:])
    assert follower.poll() == [log] and read == [other, log, log]
    same_run(follower.logs[log].runs[0], read_log(log)[0])
    other.unlink()
    assert follower.poll() == [other]
    (tmp_path / "x.sweep.json").write_text("{}")
    assert follower.poll() == []
    log.unlink()
    assert follower.poll() == [log] and not follower.logs


@pytest.mark.parametrize("how", ["shorter", "longer in place", "another file"])
def test_follower_notices_a_replaced_file(tmp_path, how):
    """A new run under an old name must not be appended to the old curve."""
    log = tmp_path / "run.txt"
    log.write_text(make_log("run", seed=1, num_steps=200, end_event=""))
    follower = LogFollower(tmp_path)
    follower.poll()
    other = make_log("run", seed=2, num_steps=100 if how == "shorter" else 400)
    if how == "another file":
        (tmp_path / "new").write_text(other)
        os.replace(tmp_path / "new", log)
    else:
        log.write_text(other)
    assert follower.poll() == [log]
    assert len(follower.logs[log].runs) == 1
    same_run(follower.logs[log].runs[0], read_log(log)[0])


def test_follower_survives_what_it_cannot_read(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "missing")
    (tmp_path / "garbage.txt").write_bytes(bytes(range(256)) * 10)
    os.mkfifo(tmp_path / "pipe.txt")  # reading it would wait for ever
    follower = LogFollower(tmp_path, tmp_path / "pipe.txt")
    assert follower.poll() == [tmp_path / "garbage.txt"]
    assert LogFollower(tmp_path / "missing").poll() == []


def test_follower_tries_a_log_again_that_it_could_not_read(tmp_path, monkeypatch):
    """Fails if one error of the disk hides a run for good, or takes its numbers from the table."""
    log = tmp_path / "run.txt"
    log.write_text(make_log("run", num_steps=100, end_event="", end=50))
    follower = LogFollower(log)
    follower.poll()
    with log.open("a") as file:
        file.write(step_lines(num_steps=100, begin=51))

    def fail(path):
        raise OSError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(run_log, "read_log", fail)
        assert follower.poll() == [log] and follower.logs[log].error == "Input/output error"
        assert [run.last_step for run in follower.logs[log].runs] == [50]
    assert follower.poll() == [log] and not follower.logs[log].error
    assert [run.last_step for run in follower.logs[log].runs] == [100]


def test_follower_takes_a_whole_last_line_without_a_line_break(tmp_path):
    """Fails if a finished public log is running for ever, or a line that is still written counts."""
    lines = [f"step:{s}/90 val_loss:3.{s:02d} train_time:{s}ms" for s in range(0, 91, 10)]
    log = tmp_path / "run.txt"
    log.write_text("\n".join(lines))
    follower = LogFollower(tmp_path)
    assert follower.poll() == [log] and follower.poll() == []
    (run,) = follower.logs[log].runs
    assert (run.state, run.last_step) == ("finished", 90)
    same_run(run, read_log(log)[0])
    with log.open("a") as file:
        file.write("\nstep:0/90 val_loss:3.00 train_time:0ms\nstep:10/90 val_loss:2.00 train_time:1")
    follower.poll()
    found = [(run.state, run.last_step, len(run.val)) for run in follower.logs[log].runs]
    assert found == [("finished", 90, 10), ("running", 0, 1)]


def test_follower_of_single_logs(tmp_path):
    """A launcher follows a log that does not exist yet; a monitor follows a sweep's logs."""
    log, other = tmp_path / "run.txt", tmp_path / "other.txt"
    other.write_text(make_log("other", num_steps=100))
    follower = LogFollower(log)
    assert follower.poll() == [] and not follower.logs
    log.write_text(make_log("run", num_steps=100))
    assert follower.poll() == [log] and follower.poll() == []
    packed = tmp_path / "packed.txt.xz"
    packed.write_bytes(lzma.compress(log.read_bytes()))
    assert LogFollower(packed).poll() == [], "it would be read as text"
    follower.paths = [other]
    assert follower.poll() == [log, other] and list(follower.logs) == [other]


# ------------------------------------------------------------------------------------------------
# Arms
# ------------------------------------------------------------------------------------------------


def test_arms_pool_seeds_and_nothing_else():
    """Pooling different settings would average two effects; different sources, two programs."""
    logs = [make_log(f"r{s}-{a}", s, {"spectral_lr_mul": a}, 100) for a in (0.0, 0.1) for s in (1, 2)]
    arms, notes = group_by_arm([only(log) for log in logs])
    assert [arm.label for arm in arms] == ["spectral_lr_mul=0", "spectral_lr_mul=0.1"] and not notes
    assert [arm.seeds for arm in arms] == [[1, 2], [1, 2]]
    recording = {"spectral_lr_mul": 0.0, "val_loss_every": 10, "save_every": 7}
    assert arm_key(only(make_log("other", 9, recording, 100))) == arms[0].key
    facts = only(make_log("facts", 9, {"spectral_lr_mul": 0.0, "model_facts": {"num_layers": 12}}, 100))
    assert arm_key(facts) != arms[0].key  # another model under the same settings
    # Another script or source is another arm, even with the same settings.
    baseline = only(make_log("b", 1, {"spectral_lr_mul": 0.0}, 100, script="train_gpt.py"))
    assert arm_key(baseline) != arms[0].key
    edited = only(make_log("e", 3, {"spectral_lr_mul": 0.0}, 100, source=SOURCE + "# edited\n"))
    arms, notes = group_by_arm([*(only(log) for log in logs), edited])
    assert [len(arm.runs) for arm in arms] == [2, 2, 1] and "not pooled" in notes[0] and "e" in notes[0]


def test_repeats_of_a_seed_are_named():
    """Five runs of one seed look like five samples, but differ only by rounding."""
    runs = [only(make_log(name, seed, {}, 100)) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    runs.append(only(make_log("d", 2, {}, 100, end_event="event:crashed")))  # not part of any mean
    arms, notes = group_by_arm(runs)
    assert len(arms) == 1 and len(notes) == 1
    assert "2 runs of seed 1 count as one" in notes[0] and "seed 2" not in notes[0]


def test_public_trials_of_one_script_are_one_arm():
    text = SOURCE + SEPARATOR + "\nhead\n" + SEPARATOR + "\nstep:9/9 val_loss:3.3 train_time:9ms\n"
    runs = parse_log(text, "a.txt") + parse_log(text.replace("3.3", "3.2"), "b.txt")
    arms, notes = group_by_arm(runs + parse_log("step:9/9 val_loss:3 train_time:9ms\n", "c.txt"))
    assert [len(arm.runs) for arm in arms] == [2, 1] and not notes


# ------------------------------------------------------------------------------------------------
# Cost
# ------------------------------------------------------------------------------------------------


def best_of_five(function):
    """Return the shortest CPU time in s, and the result."""
    times = []
    for _ in range(5):
        begin = time.process_time()
        result = function()
        times.append(time.process_time() - begin)
    return min(times), result


def test_a_log_is_read_in_a_few_times_what_finding_its_numbers_takes():
    """A log of 2.5 MB takes 0.1 s on an idle core. The yardstick is measured just before, here."""
    data = (header() + step_lines(num_steps=14500, val_every=250)).encode()
    yardstick, _ = best_of_five(lambda: [re.findall(rb"[\d.]+", line) for line in data.split(b"\n")])
    seconds, (run,) = best_of_five(lambda: parse_log(data))
    assert len(run.train) == 14500 and run.unread_lines == 0
    assert seconds < 5 * yardstick, f"{seconds:.3f} s, {seconds / yardstick:.1f} times the yardstick"


def test_config_line_that_is_no_json():
    run = only(SEPARATOR + "\nconfig:{broken\n" + SEPARATOR + "\nstep:1/2 val_loss:3 train_time:1ms\n")
    assert run.config == {} and run.val.loss.tolist() == [3.0] and run.unread_lines == 1
