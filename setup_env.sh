# Sourced by run.sh and test.sh: sets `python` to one that has what requirements.txt lists.
#   default         the one in .venv, which is made if need be
#   TORCH=2.11.0    the one in .venv-torch2.11.0: with this torch, and its triton, instead of the pinned one
#   VENV=0          the one on PATH, as it is, for machines where nothing can be installed
# Safe to run again: it changes nothing if the environment works and has every package. It checks every time, because
# an environment that was copied or renamed, or whose Python is gone, looks whole and is not.

setup_env() {
  local base=${PYTHON:-python3} venv=.venv${TORCH:+-torch$TORCH}
  if [ "${VENV:-1}" = 0 ]; then
    [ -z "${TORCH:-}" ] ||
      { echo "TORCH=$TORCH with VENV=0: the python on PATH is used as it is, with its own torch; unset one" >&2; return 2; }
    take_python_on_path
    return
  fi
  requirements >/dev/null || return 2
  python=$venv/bin/python
  if has_requirements; then
    return
  fi
  if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "$base is $("$base" --version 2>&1); wanted Python 3.11 or later. Set PYTHON=/path/to/python3.11" >&2
    return 2
  fi
  echo "setting up $venv from requirements.txt${TORCH:+ with torch $TORCH} (once; torch is large)"
  if ! "$python" -m pip --version >/dev/null 2>&1 && ! "$base" -m venv --clear "$venv"; then
    echo "could not make $venv; on Debian and Ubuntu: apt-get install python3-venv" >&2
    return 2
  fi
  requirements | "$python" -m pip install --quiet --disable-pip-version-check -r /dev/stdin || return 2
}

# Print requirements.txt, with the torch that TORCH names and its triton
requirements() {
  local triton
  case ${TORCH:-} in
    '') cat requirements.txt; return ;;
    2.11.?) triton=3.6.0 ;;
    2.12.?) triton=3.7.0 ;;
    *) echo "TORCH=$TORCH is none of 2.11.0, 2.12.0, 2.12.1; leave it unset for the one in requirements.txt" >&2; return 2 ;;
  esac
  sed -e "s/^torch==[0-9.]*/torch==$TORCH/" -e "s/^triton==[0-9.]*/triton==$triton/" requirements.txt
}

has_requirements() {
  local lacking
  lacking=$(requirements | lacks "${python:-.venv/bin/python}" pinned) && [ -z "$lacking" ]
}

take_python_on_path() {
  local lacking found
  python=python
  found=$(command -v python) || { echo "VENV=0: there is no python on PATH" >&2; return 2; }
  lacking=$(lacks python works <requirements.txt) ||
    { echo "VENV=0: $found is $(python --version 2>&1); wanted Python 3.11 or later" >&2; return 2; }
  [ -n "$lacking" ] || return 0
  echo "VENV=0: $found lacks" $lacking >&2
  if grep -qE '^(torch|numpy|safetensors)' <<<"$lacking"; then
    echo "training takes torch 2.11, 2.12 or 2.13 (with CUDA, triton 3.6 or 3.7), numpy and safetensors" >&2
    return 2
  fi
}

# Name what $1, a Python, lacks of the requirements on stdin; fail if it is too old. $2: `pinned` wants a virtual
# environment and these versions; `works` wants any versions, but of torch and triton those known to work.
lacks() {
  "$1" -c '
import fnmatch, importlib.metadata, sys
pinned, work = sys.argv[1] == "pinned", {"torch": "2.1[123].*", "triton": "3.[67].*"}
if sys.version_info < (3, 11) or (pinned and sys.prefix == sys.base_prefix):
    sys.exit(1)
for line in sys.stdin:
    wanted, _, system = line.partition("#")[0].partition(";")
    if not wanted.strip() or (system.strip() and sys.platform not in system):
        continue
    name, _, version = wanted.strip().partition("==")
    try:
        found = importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        print(name)
        continue
    if not fnmatch.fnmatch(found, (version or "*") if pinned else work.get(name, "*")):
        print(f"{name}-{found}")
' "$2" 2>/dev/null
}
