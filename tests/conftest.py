"""Before every test: settings of a platform that runs beside it, such as those of `out/local/env`, are taken away."""

import os

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
