"""Vigil command line: stream, train, publish, query, and a whole local platform for the demo."""
