"""Fast forms of a trainer's own functions, and the rule by which one takes a function's place.

A trainer defines each function once, in plain torch. A fast form computes the same on one kind of device. It
belongs to the text that it was written for: `fingerprint` covers the function and everything in the trainer
whose arithmetic the fast form repeats. Where that text has been edited the fast form steps aside with a
warning, so whoever changes the model trains what they wrote. Comments, docstrings and layout may change
freely.

After an edit on purpose, of both the plain function and its fast form, put the new fingerprint here:

    python -m kernels.fast_forms      # prints the fingerprints of both trainers as they are now
"""

import ast
import contextlib
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Callable
from typing import NamedTuple

from kernels import cpu


class FastForm(NamedTuple):
    """Replacement of one function of a trainer."""

    name: str  # function or method in the trainer, such as "MLP.forward"
    make: Callable  # module -> the fast function; the trainer's own is still in place then
    repeats: tuple[str, ...]  # other definitions that the trainer has or imports, whose arithmetic it repeats
    fingerprint: str  # hash of the text of all of these
    covers: Callable = lambda o: True  # whether it knows these optimizer settings


CPU_FORMS = (
    FastForm("MLP.forward", cpu.make_mlp_forward, ("MLP.__init__", "norm"), "e176c8d517db"),
    FastForm("polar_express", cpu.make_polar_express, (), "da3474ec8e1d"),
)


def cuda_forms() -> tuple[FastForm, ...]:
    """The Triton forms; importing them takes triton."""
    from kernels import cuda

    muon = ("orthogonalize", "polar_express", "reduce_variance", "nesterov", "with_decay")
    ord_parts = ("vectors.inner", "vectors.norm", "vectors.ratio", "ord_update", "radial_factor", "ord_stats")
    return (
        FastForm("MLP.forward", cuda.make_mlp_forward, ("MLP.__init__",), "a960a9b66929"),
        FastForm(
            "GPT.head_loss",
            cuda.make_head_loss,
            ("softcap", "target_logits", "multi_token_loss", "prefix_loss"),
            "2f5b216a8621",
        ),
        FastForm("step_muon", cuda.make_step_muon, muon, "d89822448696", cuda.covers_muon),
        FastForm("step_ord", cuda.make_step_ord, (*ord_parts, *muon), "7eeeb9121d57", cuda.covers_ord),
    )


def fingerprint(module, names: tuple[str, ...]) -> str:
    """Hash of these definitions' text, without comments, docstrings and layout.

    "" if one is missing or has been replaced by something else, such as a module or a wrapper.
    """
    texts = []
    for name in names:
        found = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if not inspect.isfunction(found) or hasattr(found, "__wrapped__"):
            return ""
        texts.append(plain_text(found))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def plain_text(function) -> str:
    """A function's code in a form that depends on nothing but the code."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree)


def forms_for(kernels: str) -> tuple[FastForm, ...]:
    """The fast forms of KERNELS=triton, cpu or torch (none)."""
    if kernels == "triton":
        return cuda_forms()
    return CPU_FORMS if kernels == "cpu" else ()


@contextlib.contextmanager
def installed(module, s, o):
    """Put the fast forms in place for a run with these settings. Yields (names, warnings).

    s, o: the trainer's and the optimizer's settings.
    """
    names, warnings, originals = [], [], []
    wanted = [form for form in forms_for(s.kernels) if form.covers(o)]
    # all are checked before one is replaced: a function may be part of another form
    fits = [fingerprint(module, (form.name, *form.repeats)) == form.fingerprint for form in wanted]
    try:
        for form, form_fits in zip(wanted, fits):
            if not form_fits:
                warnings.append(
                    f"the fast form of {form.name} steps aside: {form.name} or something it uses has been "
                    "edited; the plain one runs, which is slower"
                )
                continue
            holder, _, attribute = form.name.rpartition(".")
            owner = getattr(module, holder) if holder else module
            originals.append((owner, attribute, getattr(owner, attribute)))
            setattr(owner, attribute, form.make(module))
            names.append(form.name)
        yield names, warnings
    finally:
        for owner, attribute, original in reversed(originals):
            setattr(owner, attribute, original)


def main():
    for script in ("train_gpt", "train_gpt_muon_ord"):
        module = importlib.import_module(script)
        for form in (*CPU_FORMS, *cuda_forms()):
            print(f"{script:20} {form.name:20} {fingerprint(module, (form.name, *form.repeats))}")


if __name__ == "__main__":
    main()
