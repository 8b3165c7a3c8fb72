#!/usr/bin/env bash
# Compile the hashed requirement files from the pyproject files. No index lines: they install from whatever index is configured.
# usage: hack/lock.sh        (make lock)
set -euo pipefail
cd "$(dirname "$0")/.."
compile() { # OUT ARGS...: one requirement file, the workspace's own packages left out (they are installed from the tree)
  local out=requirements/$1; shift
  uv pip compile "$@" --quiet --python-version "${PYTHON_VERSION:-3.11}" --python-platform x86_64-manylinux_2_35 --generate-hashes \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links --no-emit-package rlhf-api --output-file "$out"
  echo "$out: $(grep -c == "$out") packages"
}
compile operator.txt operator/pyproject.toml
compile worker-cpu.txt worker/pyproject.toml --extra cpu
compile dev.txt pyproject.toml api/pyproject.toml operator/pyproject.toml worker/pyproject.toml cli/pyproject.toml --group dev --extra cpu --extra files
compile build.txt - <<< 'hatchling>=1.27'
printf '%s\n' 'kubernetes-validate>=1.37' 'cyclonedx-bom>=7.5' | compile apart.txt -
# For the image on top of vLLM's own: its Python, and the ordinary packages without the overrides of the CPU environment.
PYTHON_VERSION=3.12 compile worker-gpu.txt worker/pyproject.toml --extra gpu --no-config
