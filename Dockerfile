# One image per service: docker build --build-arg PACKAGE=ingest -t vigil/ingest:0.1.0 .
# PACKAGE is ingest, inference, storage, shadow, review or operator.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG UV_VERSION=0.13.9
# A venv of its own: Debian's Python refuses packages outside of one.
RUN python -m venv /opt/uv && /opt/uv/bin/pip install --quiet --no-cache-dir uv==${UV_VERSION}
# The machine's certificates, so that a build behind a company's proxy works; copies, since the cache is another mount.
ENV UV_SYSTEM_CERTS=true UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never UV_COMPILE_BYTECODE=1 \
    UV_PROJECT_ENVIRONMENT=/opt/vigil
WORKDIR /src
COPY . .
ARG PACKAGE
RUN --mount=type=cache,target=/root/.cache/uv \
    /opt/uv/bin/uv sync --quiet --frozen --no-dev --no-editable --package vigil-${PACKAGE} \
    # OpenVINO brings plugins and importers that a worker never loads: models are its own IR, on the CPU.
    && find /opt/vigil -path '*/openvino/libs/*' \( -name '*_[gn]pu_plugin.so' -o -name cache.json \
       -o -name '*_frontend.so*' ! -name '*_ir_frontend.so*' \) -delete \
    # And it reports its use to its makers where this package is there.
    && rm -rf /opt/vigil/lib/python*/site-packages/openvino_telemetry* \
    && find /opt/vigil -path '*/numpy/*' -type d -name tests -prune -exec rm -rf {} + \
    && printf '#!/bin/sh\nexec /opt/vigil/bin/python -m vigil_%s "$@"\n' "${PACKAGE}" > /opt/vigil/bin/serve \
    && chmod 755 /opt/vigil/bin/serve

FROM ${BASE}
ARG PACKAGE
LABEL org.opencontainers.image.title="vigil-${PACKAGE}" org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/vigil /opt/vigil
# Nothing is written outside of mounted folders: the root may be read-only. The name is for libraries that ask for it: any
# user id may run this, and none is in /etc/passwd.
ENV PATH=/opt/vigil/bin:/usr/local/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 LOGNAME=vigil HOME=/tmp
USER 65532:65532
ENTRYPOINT ["/opt/vigil/bin/serve"]
