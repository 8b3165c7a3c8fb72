#!/usr/bin/env bash
# Make .venv: a CPython >= 3.11 with the hashed requirements and the four distributions from this tree. Quick when nothing changed.
# usage: hack/setup.sh [MODULE]        (make setup); MODULE needs no environment and runs beside the installs
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '[setup] %s\n' "$*"; }

python=${PYTHON:-}
for candidate in python3.11 python3.12 python3; do
  [ -n "$python" ] && break
  "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && python=$candidate
done
[ -n "$python" ] || { say "no CPython 3.11 or 3.12 found: install one, or set PYTHON to its path"; exit 2; }
python=$("$python" -c 'import sys; print(sys.executable)')

key=$(cat requirements/dev.txt requirements/schemas.txt ./*/pyproject.toml <(echo "$python $PWD") | sha256sum | cut -c1-16)
[ "$(cat .venv/.key 2>/dev/null)" = "$key" ] && { say "the environment is up to date"; exit 0; }

if ! ldconfig -p | grep -q libnuma.so.1; then
  say "libnuma1 is missing (vLLM on CPU needs it)"
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { say "install it: apt-get install libnuma1"; exit 2; }
  apt-get update -qq && apt-get install -y -qq libnuma1 >/dev/null
fi

if command -v uv >/dev/null; then uv=uv; else
  say "uv is missing: installing it beside the environment"
  "$python" -m venv .venv-uv && .venv-uv/bin/python -m pip install -q uv && uv=.venv-uv/bin/uv
fi

beside=
[ $# -eq 0 ] || { "$python" -m "$1" & beside=$!; trap 'kill "$beside" 2>/dev/null || true' EXIT; }
start=$SECONDS
# Compiled now: the containers of the embedded cluster see this environment read-only and would compile it at every import.
say "installing the requirements (about 2 GB the first time)"
"$uv" venv -q --clear --python "$python" .venv
"$uv" pip install -q --python .venv/bin/python --compile-bytecode --no-deps --require-hashes -r requirements/dev.txt
"$uv" pip install -q --python .venv/bin/python --no-deps --no-build-isolation -e api -e operator -e worker -e cli
# Not beside the operator: the Kubernetes client imports it where it finds it, for 2 s and 20 MiB of each process.
"$uv" pip install -q --python .venv/bin/python --no-deps --require-hashes --target .venv/schemas -r requirements/schemas.txt
echo "$key" > .venv/.key
say "done in $((SECONDS - start)) s"
[ -z "$beside" ] || wait "$beside" || true  # who needs what it makes tries again, and says what is wrong
