# Sourced by run.sh and test.sh: a virtual environment in .venv that holds requirements.txt.
# Safe to run again: nothing happens while .venv works and has every package. It is asked, each time, because an
# environment that was copied, renamed or whose Python is gone looks whole and is not.

setup_env() {
  local python=${PYTHON:-python3}
  if has_requirements; then
    return
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "$python is $("$python" --version 2>&1); wanted Python 3.11 or later. Set PYTHON=/path/to/python3.11" >&2
    return 2
  fi
  echo "setting up .venv from requirements.txt (once; torch is large)"
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1 && ! "$python" -m venv --clear .venv; then
    echo "could not make .venv; on Debian and Ubuntu: apt-get install python3-venv" >&2
    return 2
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt || return 2
}

# whether .venv's own Python runs, is new enough, and has every package of requirements.txt in the wanted version
has_requirements() {
  .venv/bin/python -c '
import importlib.metadata, re, sys
if sys.version_info < (3, 11) or sys.prefix == sys.base_prefix:
    sys.exit(1)
for line in open("requirements.txt", encoding="utf-8"):
    wanted, _, system = line.partition("#")[0].partition(";")
    if wanted.strip() and (not system.strip() or sys.platform in system):
        name, _, version = wanted.strip().partition("==")
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            sys.exit(1)
        if version and found.partition("+")[0] != version:
            sys.exit(1)
' >/dev/null 2>&1
}
