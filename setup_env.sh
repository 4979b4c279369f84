# Sourced by run.sh and test.sh: a virtual environment in .venv that holds requirements.txt.
# Safe to run again: nothing happens while requirements.txt is what was installed.

setup_env() {
  local python=${PYTHON:-python3} stamp=.venv/installed-requirements.txt
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "$python is $("$python" --version 2>&1); wanted Python 3.11 or later. Set PYTHON=/path/to/python3.11" >&2
    return 2
  fi
  if ! cmp -s requirements.txt "$stamp"; then
    echo "setting up .venv from requirements.txt (once; torch is large)"
    if [ ! -x .venv/bin/python ] && ! "$python" -m venv .venv; then
      echo "could not make .venv; on Debian and Ubuntu: apt-get install python3-venv" >&2
      return 2
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt || return 2
    cp requirements.txt "$stamp"
  fi
}
