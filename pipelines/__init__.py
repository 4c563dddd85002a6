"""The Ray jobs, one a script: ``python pipelines/NAME.py …`` or ``ray job submit --working-dir . -- python …``."""

import gc

# Each job, and each of its workers, imports torch and Ray: a million objects that stay. Looking for garbage after every
# 700 of them, as Python does, takes a tenth of that time.
gc.set_threshold(100_000, 20, 20)
