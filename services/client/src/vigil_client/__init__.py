"""Vigil client library: stream images, get verdicts, survive lost connections."""
