"""Compilers that torch.compile and Triton call at run time, tried before the run.

Without them a run would end in its rehearsal, in a traceback of torch's.
"""

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from runtime.settings import SettingsError

PROGRAM = "#include <Python.h>\nint main(void) { return 0; }\n"  # all generated code is made for Python
# language, as compilers name it -> (variable that names the compiler, compilers in the order they are tried)
LANGUAGES = {
    "c": ("CC", ("gcc", "clang")),
    "c++": ("CXX", ("clang++" if sys.platform == "darwin" else "g++",)),
}


def check_compilers(s):
    """Raise SettingsError if these settings want a compiler that is not here or does not work."""
    cuda, compiled = s.device == "cuda", s.compile == "1"
    if not compiled and not (cuda and s.kernels == "triton"):
        return
    language = "c" if cuda else "c++"  # Triton's launchers; inductor's kernels for a CPU
    wrong = fault(language)
    if wrong:
        without = "COMPILE=0 and KERNELS=torch do" if cuda else "COMPILE=0 does"
        raise SettingsError(f"compiling takes a {language.upper()} compiler: {wrong}; {without} without")


@functools.cache
def fault(language: str) -> str:
    """Describe what keeps this language from being compiled here, and what to do; empty if nothing does."""
    variable, names = LANGUAGES[language]
    compiler = os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
    if not compiler:
        return f"found no {' or '.join(names)} on PATH; install one, or name it in {variable}"
    include = python_headers()
    command = [compiler, "-x", language, "-fsyntax-only", f"-I{include}", "-"]
    try:
        done = subprocess.run(command, input=PROGRAM, capture_output=True, text=True)
    except OSError as error:
        return f"{compiler} cannot be run ({error.strerror}); set {variable} to one that can"
    if done.returncode and "Python.h" in done.stderr:
        return (
            f"found no Python.h in {include}; install this Python's headers (python3-dev or python3-devel), "
            "or use a Python that has them, such as uv's or conda's"
        )
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        return f"{compiler} fails on a program of one line ({said}); mend it, or set {variable} to another"
    return ""


def python_headers() -> Path:
    """Folder in which torch and Triton look for Python.h. Debian's own scheme has another one."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"])
