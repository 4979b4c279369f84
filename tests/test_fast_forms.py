"""kernels/fast_forms.py: each fast form computes what the trainer's own function does, and is not used once
that function has been edited, so that an edited trainer trains what it says."""

import re

import pytest
import torch
from helpers import (
    BASELINE,
    ROOT,
    TRAINERS,
    base_env,
    copy_project,
    losses,
    read,
    run,
    train_steps,
    trainer_on,
)
from reference import shake

import train_gpt
from kernels import fast_forms
from kernels.fast_forms import CPU_FORMS

BY_NAME = {form.name: form for form in CPU_FORMS}
UPDATES = ("polar_express",)  # forms of the update; the others are the model's
NUM_STEPS = 3


def tiny_trainer(trainer, shards):
    """Make (Trainer of the tiny preset, its data) with the settings of a short run."""
    return trainer_on(trainer, **base_env(shards, NUM_SCHEDULED_ITERATIONS=NUM_STEPS))


# ------------------------------------------------------------------------------------------------ the same


def two_steps(shards) -> tuple[float, dict, dict]:
    """Train tiny: (loss, {parameter: gradient} of the first step, {parameter: weights} after the second)."""
    made, data = tiny_trainer(train_gpt, shards)
    shake(made.model)
    params, grads = dict(made.model.named_parameters()), {}
    start = {name: p.detach().clone() for name, p in params.items()}

    def keep_first():
        if not grads:
            grads.update({name: p.grad.clone() for name, p in params.items()})

    made.optimizer.before_update = keep_first
    loss = made.step(0, data.next((512, 0))).item()
    made.step(1, data.next((512, 0)))
    return loss, grads, {name: p.detach() - start[name] for name, p in params.items()}


@pytest.fixture(scope="module")
def plain_steps(shards):
    return two_steps(shards)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_cpus_fast_form_computes_what_the_plain_function_does(name, shards, plain_steps, monkeypatch):
    """Fails if one fast form, alone in the tiny model, changes the loss, a gradient or an update beyond
    rounding, or is not called at all."""
    calls, form = [], BY_NAME[name]

    def make(*args):
        fast = form.make(*args)

        def counted(*args):
            calls.append(name)
            return fast(*args)

        return counted

    monkeypatch.setattr(fast_forms, "CPU_FORMS", (form._replace(make=make),))
    with fast_forms.installed(train_gpt, *read(train_gpt)[:2]) as (names, _):
        assert names == [name]
        loss, grads, moved = two_steps(shards)
    assert calls
    plain_loss, plain_grads, plain_moved = plain_steps
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    pairs = {n: (g, plain_grads[n]) for n, g in grads.items()}
    tolerance = 1e-3  # for scalars' gradients, whose terms cancel; others are within 1e-5
    if name in UPDATES:
        assert all(torch.equal(got, wanted) for got, wanted in pairs.values())
        pairs, tolerance = {n: (x, plain_moved[n]) for n, x in moved.items()}, 1e-2
    for parameter, (got, wanted) in pairs.items():
        assert wanted.any(), parameter
        assert (got - wanted).norm() < tolerance * wanted.norm(), parameter


# ------------------------------------------------------------------------------------------ fingerprints


def check_fingerprints(trainer, forms):
    for form in forms:
        found = fast_forms.fingerprint(trainer, (form.name, *form.repeats))
        assert found in (form.fingerprint, ""), (
            f"{trainer.__name__}: {form.name}, or something that its fast form repeats, has been edited: "
            f"the fast form steps aside. Edit it too, then enter {found!r} in kernels/fast_forms.py"
        )


@pytest.mark.parametrize("trainer", TRAINERS)
def test_fingerprints_of_a_cpus_forms(trainer):
    """Fails if a run of this trainer would lose a fast form."""
    check_fingerprints(trainer, CPU_FORMS)
    with fast_forms.installed(trainer, *read(trainer)[:2]) as (names, warnings):
        assert names == list(BY_NAME) and warnings == []


@pytest.mark.parametrize("trainer", TRAINERS)
def test_fingerprints_of_the_triton_forms(trainer):
    """Fails if a run of this trainer on a GPU would lose a fast form; "" is a function of the twin alone."""
    pytest.importorskip("triton", reason="triton is not installed, so KERNELS=torch is what runs here")
    forms = fast_forms.cuda_forms()
    check_fingerprints(trainer, forms)
    missing = {f.name for f in forms if not fast_forms.fingerprint(trainer, (f.name, *f.repeats))}
    assert missing == ({"step_ord"} if trainer is train_gpt else set())


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_trainer_gets_its_own_functions_back(trainer):
    """Fails if a fast form stays installed after its run, even one that ends in an error."""
    names = [form.name.split(".") for form in CPU_FORMS]

    def in_place():
        return [
            getattr(getattr(trainer, first), *rest) if rest else getattr(trainer, first)
            for first, *rest in names
        ]

    before = in_place()
    with pytest.raises(RuntimeError, match="the run"), fast_forms.installed(trainer, *read(trainer)[:2]):
        assert not any(a is b for a, b in zip(before, in_place()))
        raise RuntimeError("the run")
    assert all(a is b for a, b in zip(before, in_place()))


@pytest.mark.parametrize("env", [{"COMPILE": "1"}, {"KERNELS": "torch"}], ids=str)
def test_runs_of_plain_functions(env):
    """Fails if a compiled run on a CPU uses the fast forms, which are slower there and break its graph, or
    they cannot be turned off."""
    with fast_forms.installed(train_gpt, *read(train_gpt, **env)[:2]) as (names, warnings):
        assert names == warnings == []


# ------------------------------------------------------------------------------------------------ edits

GELU = ("F.linear(norm(x_BTC), self.up).relu().square()", "F.gelu(F.linear(norm(x_BTC), self.up))")

NEXT = "def nesterov("  # what follows polar_express


def edited(old: str, new: str) -> str:
    """Return train_gpt.py's source with one passage changed."""
    text = (ROOT / BASELINE).read_text()
    assert text.count(old) == 1, f"train_gpt.py has {old!r} {text.count(old)} times; change the test's edit"
    return text.replace(old, new)


@pytest.mark.parametrize(
    "old, new, lost",
    [
        (*GELU, {"MLP.forward"}),
        ("torch.empty(4 * c.width, c.width)", "torch.empty(2 * c.width, c.width)", {"MLP.forward"}),
        (
            "F.rms_norm(x, (x.size(-1),))",
            "F.layer_norm(x, (x.size(-1),))",
            {"MLP.forward"},
        ),
        ("        A = X @ X.mT\n", "        A = X @ X.mT + 0\n", {"polar_express"}),
        (NEXT, "polar_express = nn.Identity()\n\n\n" + NEXT, {"polar_express"}),
        (
            NEXT,
            "polar_express = functools.wraps(polar_express)(lambda G, dtype: G)\n" + NEXT,
            {"polar_express"},
        ),
    ],
)
def test_an_edit_takes_its_fast_forms_away_and_no_other(old, new, lost, load):
    """Fails if an edited function, or one that a fast form repeats, is replaced by code for the old one."""
    module = load(edited(old, new))
    with fast_forms.installed(module, *read(module)[:2]) as (names, warnings):
        assert set(names) == set(BY_NAME) - lost
        assert len(warnings) == len(lost) and all("steps aside" in text for text in warnings)


def test_comments_docstrings_and_layout_may_change_freely(load):
    """Fails if a better comment costs a run its fast form."""
    old = """        hidden = F.linear(norm(x_BTC), self.up).relu().square()
"""
    new = '''        """Another docstring."""
        # another comment
        hidden = F.linear(
            norm(x_BTC), self.up
        ).relu().square()
'''
    module = load(edited(old, new))
    with fast_forms.installed(module, *read(module)[:2]) as (names, warnings):
        assert names == list(BY_NAME) and warnings == []


def plain_losses(trainer, shards) -> list[float]:
    """Return the training losses of a short run in this process, without a fast form."""
    return train_steps(*tiny_trainer(trainer, shards), 0, NUM_STEPS)


def test_a_run_of_an_edited_trainer_trains_the_edit_and_says_so(tmp_path, shards, load):
    """Fails if a trainer with another activation trains the old one, or does not report that it is slower."""
    copy_project(tmp_path)
    script = tmp_path / BASELINE
    script.write_text(edited(*GELU))
    done = run(
        tmp_path, str(script), base_env(shards, RUN_ID="edited", NUM_SCHEDULED_ITERATIONS=NUM_STEPS), ranks=0
    )
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "logs" / "edited.txt").read_text()
    (warning,) = (line for line in log.splitlines() if line.startswith("event:warning"))
    assert "the fast form of MLP.forward steps aside" in warning
    (names,) = re.findall(r"^event:kernels .*fast_forms:(\S+)", log, re.M)
    assert names.split(",") == [name for name in BY_NAME if name != "MLP.forward"]
    found = losses(tmp_path, "edited", "train_loss")
    assert found == pytest.approx(plain_losses(load(script.read_text()), shards), abs=1e-4)
    assert abs(found[-1] - plain_losses(train_gpt, shards)[-1]) > 2e-3
