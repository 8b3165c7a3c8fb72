# The operator: docker build -f images/operator.Dockerfile -t rlhf-operator:0.1.0 .
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
WORKDIR /src
COPY requirements/build.txt requirements/operator.txt requirements/
RUN python -m venv /opt/rlhf \
 && /opt/rlhf/bin/pip install --no-cache-dir --no-deps --require-hashes -r requirements/operator.txt \
 && pip install --no-cache-dir --no-deps --require-hashes -r requirements/build.txt
COPY api api
COPY operator operator
RUN pip wheel --no-deps --no-build-isolation -w wheels ./api ./operator \
 && /opt/rlhf/bin/pip install --no-cache-dir --no-deps --no-index wheels/*.whl

FROM ${PYTHON}
COPY --from=build /opt/rlhf /opt/rlhf
ENV PATH=/opt/rlhf/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 65532:65532
CMD ["python", "-m", "rlhf_operator"]
