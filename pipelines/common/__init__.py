"""What the jobs share. The only packages that import ray are ``pipelines`` and its tests.

Ray reads these settings when it is first imported, so they are set here, before any module of this package runs.
Whatever the environment already says wins.
"""

from __future__ import annotations

import os

_RAY_SETTINGS = {
    # read_parquet starts this many actors to read footers, 32 by default: 7-22 s for a tiny file on a small machine.
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    # Ray's coming default, and without it each start prints a warning about the change.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray Data's actor pools always log an error about constructor arguments that is none (ray#53727).
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
for _name, _value in _RAY_SETTINGS.items():
    os.environ.setdefault(_name, _value)
