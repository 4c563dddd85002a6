"""Command lines from dataclasses, and errors that tell a person what to do.

Exit codes of every job: 0 done; 1 stopped by an error that is explained on stderr; 2 wrong command line or
configuration; 3 finished, but more images failed than ``--max-error-rate`` allows; 130 interrupted; 143 ended in good
order after SIGTERM or a spot machine's notice.
"""

from __future__ import annotations

import gc
import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro
import yaml
from rich.console import Console

from pipelines.common.stopping import TerminatedError
from tinysam.lake.filesystem import LakeError
from tinysam.lake.fingerprint import to_plain
from tinysam.lake.run_record import redact
from tinysam.modeling.errors import CheckpointError

T = TypeVar("T")

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_TOO_MANY_ERRORS, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 3, 130, 143

# Log lines and progress go to stderr, so that stdout holds the summary alone.
console = Console()
error_console = Console(stderr=True)


class JobError(Exception):
    """The job cannot go on; the message names the thing at fault and the remedy."""


def parse_config(cls: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """Builds the dataclass ``cls`` from ``--config FILE`` (YAML), with the flags of ``argv`` on top, and prints it.

    The file's keys are the flags' names, nested as the dataclasses are; dashes and underscores are the same::

        lake: s3://bucket/images
        everything:
          points-per-side: 32

    The help's first lines are ``description``, or the docstring of ``cls``.

    Exits with code 2, and a message without a traceback, for an unknown flag or key and for a value out of range.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    path, args = _take_config_path(args)
    if path is not None:
        args = [*_yaml_flags(path), *args]
    about = description or inspect.getdoc(cls)
    about = f"{about}\n\n--config FILE reads flags from a YAML file; flags on the command line win."
    config = tyro.cli(cls, args=args, description=about)
    text = yaml.safe_dump(redact(to_plain(config)), sort_keys=False, allow_unicode=True)
    error_console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
    return config


def _take_config_path(args: list[str]) -> tuple[str | None, list[str]]:
    path, rest = None, []
    remaining = iter(args)
    for arg in remaining:
        if arg == "--config":
            path = next(remaining, None)
            if path is None:
                _usage_error("--config needs the path of a YAML file")
        elif arg.startswith("--config="):
            path = arg.removeprefix("--config=")
        else:
            rest.append(arg)
    return path, rest


def _yaml_flags(path: str) -> list[str]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        _usage_error(f"cannot read --config {path}: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        _usage_error(f"--config {path} is not valid YAML: {error}")
    if not isinstance(values, Mapping):
        _usage_error(f"--config {path} must hold a mapping from flags to values")
    return list(_flags(values))


def _flags(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The command line that says what ``values`` say: tyro then checks both in the same way."""
    flags: list[str] = []
    for key, value in values.items():
        name = prefix + str(key).replace("_", "-")
        if isinstance(value, Mapping):
            flags += _flags(value, f"{name}.")
        elif isinstance(value, bool):
            head, _, last = name.rpartition(".")
            flags.append(f"--{name}" if value else f"--{head}.no-{last}" if head else f"--no-{last}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags += [f"--{name}", str(value)]
    return flags


def _usage_error(message: str) -> NoReturn:
    print_error(message)
    raise SystemExit(EXIT_USAGE)


def print_error(message: str) -> None:
    """Prints a message as an error, character by character as it is."""
    error_console.print("[bold red]error:[/]", end=" ")
    error_console.print(message, markup=False, highlight=False, soft_wrap=True)


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a script's ``main`` and exits with its code; errors that people can act on lose their traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    gc.freeze()  # all of torch is no garbage: looking through it at the end takes a second or two
    try:
        code = main()
    except KeyboardInterrupt:
        error_console.print("interrupted; run the same command again to go on from here")
        code = EXIT_INTERRUPTED
    except TerminatedError:
        error_console.print("stopped before the end, as asked; run the same command again to go on from here")
        code = EXIT_TERMINATED
    except (JobError, LakeError, CheckpointError) as error:
        print_error(str(error))
        code = EXIT_ERROR
    sys.exit(code or EXIT_OK)
