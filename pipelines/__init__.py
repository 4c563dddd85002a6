"""The Ray jobs, one a script: ``python pipelines/NAME.py …`` or ``ray job submit --working-dir . -- python …``."""
