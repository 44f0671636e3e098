#!/usr/bin/env bash
# Exit 0 when PYTHON ($1) is what the locks were made for; otherwise say what to do instead.
set -euo pipefail
python=$1

explain() {
  cat >&2 <<TEXT
triptych: $1
The locks under requirements/ pin CPython 3.11 on Linux x86-64, glibc 2.28 or newer. There, name the interpreter:
    make PYTHON=/path/to/python3.11 test
Anywhere else, install the unlocked extras and call the tools directly:
    python -m venv .venv && .venv/bin/pip install -e '.[dev]' && .venv/bin/pytest && .venv/bin/triptych report
TEXT
  exit 1
}

command -v -- "$python" >/dev/null || explain "there is no '$python' on this machine."
here=$("$python" -c 'import platform, sys; print(platform.python_implementation(), "%d.%d" % sys.version_info[:2], platform.system(), platform.machine())') ||
  explain "'$python' does not run."
[ "$here" = "CPython 3.11 Linux x86_64" ] || explain "'$python' is $here."
"$python" -c 'import ensurepip, venv' 2>/dev/null || explain "'$python' cannot make virtual environments (on Debian: apt install python3.11-venv)."
