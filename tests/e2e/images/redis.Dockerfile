# Debian's Redis under Valkey's name: it speaks TLS, which the server of the wheel does not.
ARG BASE=docker.io/library/python:3.11-slim-bookworm
FROM ${BASE}
RUN apt-get update -q && apt-get install -y -q --no-install-recommends redis-server && rm -rf /var/lib/apt/lists/* \
    && ln -s /usr/bin/redis-server /usr/local/bin/valkey-server
ENTRYPOINT ["valkey-server"]
