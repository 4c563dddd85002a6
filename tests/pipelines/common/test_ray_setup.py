"""One Ray for several commands."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from pipelines.common.ray_setup import shared_ray

ROOT = Path(__file__).resolve().parents[3]

SHARE = """
import os, subprocess, sys
import ray
from pipelines.common.ray_setup import shared_ray

join = '''
import ray
from pipelines.common.ray_setup import start_ray
start_ray()
print(ray.get_runtime_context().gcs_address, flush=True)
'''
with shared_ray() as address:
    print(address, flush=True)
    for _ in range(2):
        subprocess.run([sys.executable, "-c", join], env=os.environ | {"RAY_ADDRESS": address}, check=True)
print(ray.is_initialized(), flush=True)
"""


def test_commands_join_the_shared_ray_which_ends_after_them() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SHARE], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    address, first, second, running = done.stdout.split()
    assert (first, second, running) == (address, address, "False")
    host, port = address.rsplit(":", 1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


def test_a_ray_that_runs_in_this_process_is_shared_and_left_running(ray_address: str) -> None:
    with shared_ray() as address:
        assert address == ray_address
    assert ray.is_initialized()
