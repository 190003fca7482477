# The server built with cargo on this machine, for a node that reaches no image registry.
ARG BASE=docker.io/library/python:3.11-slim-bookworm
FROM ${BASE}
COPY reductstore /usr/local/bin/reductstore
ENTRYPOINT ["reductstore"]
