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

key=$(cat requirements/dev.txt requirements/apart.txt ./*/pyproject.toml <(echo "$python $PWD") | sha256sum | cut -c1-16)
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
# Tools whose parts others import where they find them: the Kubernetes client the one for 20 MiB of each operator, Ray (by
# jsonschema) the other for 2 s of each of its processes.
"$uv" pip install -q --python .venv/bin/python --no-deps --require-hashes --target .venv/apart -r requirements/apart.txt
echo "$key" > .venv/.key
say "done in $((SECONDS - start)) s"
[ -z "$beside" ] || wait "$beside" || true  # who needs what it makes tries again, and says what is wrong
