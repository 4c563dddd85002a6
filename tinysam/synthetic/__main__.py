"""``python -m tinysam.synthetic --output DIR --count N``: writes synthetic scenes in SA-1B's layout."""

from __future__ import annotations

import sys

import tyro
from rich.console import Console
from rich.progress import track

from tinysam.lake.filesystem import LakeError
from tinysam.synthetic.write import SceneSet, iter_write


def main() -> int:
    """Runs the command line and returns its exit code."""
    config = tyro.cli(SceneSet, description=__doc__)
    console = Console(stderr=True)
    try:
        objects = sum(track(iter_write(config), "Painting", total=config.count, console=console))
    except LakeError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        return 2
    console.print(f"{config.count} scenes with {objects} objects in {config.output}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
