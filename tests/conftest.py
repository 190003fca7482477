"""Before every test: what tests and the processes that they start would inherit is taken away.

Settings of a platform that runs beside it, such as those of `out/local/env`; and that a shell's background job, as
which the tests may run, does not hear Ctrl-C.
"""

import os
import signal

_FOR_TESTS = (
    "VIGIL_TEST_",
    "VIGIL_E2E",
    "VIGIL_REDUCT_",
    "VIGIL_KUBE_",
    "VIGIL_CLUSTER_",
    "VIGIL_CHROMIUM",
    "VIGIL_WRITE_",
)

# As this is loaded: some are read when a module is.
for _name in [name for name in os.environ if name.startswith("VIGIL_") and not name.startswith(_FOR_TESTS)]:
    del os.environ[_name]

signal.signal(signal.SIGINT, signal.default_int_handler)
