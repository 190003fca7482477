"""Ingest: takes frames over gRPC, validates and enqueues them, answers with acceptance or verdict."""
