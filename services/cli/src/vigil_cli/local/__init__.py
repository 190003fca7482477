"""The whole platform as processes on one machine, for the demo, the tests and the bench."""

from vigil_cli.local.reduct import Store, find_store
from vigil_cli.local.stack import LocalStack, StackError

__all__ = ["LocalStack", "StackError", "Store", "find_store"]
