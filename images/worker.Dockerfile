# The worker, on vLLM's image:  docker build -f images/worker.Dockerfile -t rlhf-worker:0.1.0 .
# The worker without GPUs:      docker build -f images/worker.Dockerfile -t rlhf-worker:0.1.0-cpu \
#                                 --build-arg BASE=python:3.11-slim-bookworm --build-arg REQUIREMENTS=worker-cpu.txt .
ARG BASE=vllm/vllm-openai:v0.32.0

FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY requirements/build.txt requirements/
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements/build.txt
COPY api api
COPY worker worker
RUN pip wheel --no-deps --no-build-isolation -w /wheels ./api ./worker

FROM ${BASE}
ARG REQUIREMENTS=worker-gpu.txt
# libnuma1: vLLM on CPU. wget: KubeRay's probes.
RUN apt-get update \
 && apt-get install -y --no-install-recommends libnuma1 wget \
 && rm -rf /var/lib/apt/lists/*
COPY requirements/${REQUIREMENTS} /tmp/requirements.txt
# What the base already has in the same version is left as it is.
RUN python3 -m pip install --no-cache-dir --no-deps --require-hashes --break-system-packages -r /tmp/requirements.txt \
 && rm /tmp/requirements.txt \
 && { command -v python >/dev/null || ln -s "$(command -v python3)" /usr/local/bin/python; }
COPY --from=build /wheels /tmp/wheels
RUN python3 -m pip install --no-cache-dir --no-deps --no-index --break-system-packages /tmp/wheels/*.whl \
 && rm -r /tmp/wheels \
 && useradd --uid 65532 --create-home rlhf
# Pods cannot write the bytecode that the base left out: every process of theirs would compile torch and vLLM anew.
# Some packages hold files that are no Python of this version, which is no failure.
RUN python3 -m compileall -q -j 0 $(python3 -c 'import site; print(*site.getsitepackages())') > /dev/null || true
ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1
# Ray's workers begin by watching over each other (rlhf_worker/watcher.py).
ENV __RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR=rlhf_worker.watcher.watch_node
USER 65532:65532
WORKDIR /home/rlhf
# KubeRay gives the Ray containers their command, the operator the driver's; vLLM's image would start a server.
ENTRYPOINT []
CMD ["python", "-m", "rlhf_worker", "--help"]
