"""Vigil command line: stream, train, publish, query, and a whole local platform for the demo."""

import os

# What a command that Ctrl-C ended exits with.
INTERRUPTED = 130

# Before grpc is imported: children are forked only to start other programs, and its fork handlers log about each.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
