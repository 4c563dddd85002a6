from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tinysam

PACKAGE = Path(tinysam.__file__).parent


def test_the_library_imports_no_ray() -> None:
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
        if path.stem != "__main__"
    ]
    assert "tinysam.lake.schema" in modules
    program = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "sys.exit('ray was imported' if any(name.split('.')[0] == 'ray' for name in sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_resolve() -> None:
    for name in tinysam.__all__:
        assert getattr(tinysam, name) is not None
