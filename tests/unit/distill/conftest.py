from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distill_cache import write_cache


@pytest.fixture
def make_cache(tmp_path: Path) -> Callable[..., str]:
    """``make_cache(name, **options)`` writes a cache of ``write_cache``'s options and returns its folder."""

    def make(name: str, **options: Any) -> str:
        return write_cache(tmp_path / name, **options)

    return make
