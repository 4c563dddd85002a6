"""The ``tinysam`` command: one image, weights, the outputs of jobs. The jobs over whole lakes lie in ``pipelines/``.

Exit codes: 0 done; 1 failed, with the reason on stderr; 2 wrong command line; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
DEFAULT_MODEL = "demo_student"
EXPORT_FORMATS = ("coco", "cvat", "label-studio", "sa1b", "yolo", "png")
ENGINES = ("auto", "torch", "compiled", "int8", "fp8", "openvino", "onnxruntime")
PRESETS = ("adaptive", "paper")

_EXAMPLES = """\
examples:
  tinysam segment photo.jpg --point 320,200             the object at a point
  tinysam segment photo.jpg --box 40,60,300,280         the object in a box
  tinysam everything photo.jpg --out overlay.png        every object
  tinysam weights tinysam                               download a public checkpoint
  tinysam verify runs/labels                            is every image there, once and whole?
  tinysam export runs/labels --format coco --to coco    the masks for other tools
  tinysam report runs/labels                            a page about a label job's output
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    # Not before: --help and a wrong flag should be answered at once.
    from tinysam import commands

    try:
        commands.COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except commands.UsageError as error:
        _complain(error)
        return EXIT_USAGE
    except commands.expected_errors() as error:
        _complain(error)
        return EXIT_ERROR
    except MemoryError as error:
        _complain(f"out of memory ({error}); a smaller image, or fewer points, need less")
        return EXIT_ERROR
    return EXIT_OK


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="tinysam",
        description="Segment images with a small SAM. Jobs over millions of images are in pipelines/.",
        epilog=_EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32),
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)

    segment = commands.add_parser(
        "segment",
        help="the object at points or in a box",
        description="Segments the object that points and boxes show, and draws it.",
    )
    _add_photo(segment)
    segment.add_argument(
        "--point",
        type=_numbers(2, "X,Y"),
        action="append",
        default=[],
        metavar="X,Y",
        help="a point on the object, in pixels from the top left; can be given several times",
    )
    segment.add_argument(
        "--label",
        type=int,
        choices=(0, 1),
        action="append",
        default=[],
        metavar="0|1",
        help="for each --point, in their order: 1 is on the object, 0 is not (default: all 1)",
    )
    segment.add_argument(
        "--box",
        type=_numbers(4, "X0,Y0,X1,Y1"),
        action="append",
        default=[],
        metavar="X0,Y0,X1,Y1",
        help="a box around the object; without points it can be given several times, for several objects",
    )
    segment.add_argument("--mask", metavar="FILE", help="also write the mask itself, white on black (PNG, …)")
    _add_output(segment, "segment")

    everything = commands.add_parser(
        "everything", help="every object", description="Segments every object, and draws all of them."
    )
    _add_photo(everything)
    grid = everything.add_mutually_exclusive_group()
    grid.add_argument("--flat", action="store_true", help="SAM's dense grid instead of the hierarchical one")
    grid.add_argument(
        "--preset",
        choices=PRESETS,
        default="adaptive",
        help="of the hierarchical grid: adaptive prompts the fewest points, paper is TinySAM's (default: adaptive)",
    )
    everything.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="what runs the model; auto is OpenVINO on a CPU, which takes a while at first for a new model, and torch "
        "on a GPU (default: auto)",
    )
    everything.add_argument(
        "--points-per-side", type=int, default=32, metavar="N", help="points along each side of the grid (default: 32)"
    )
    everything.add_argument(
        "--pred-iou-thresh",
        type=float,
        metavar="X",
        help="leave out masks of lower predicted IoU (default: SAM's 0.88; 0.5 for the models that ship)",
    )
    everything.add_argument(
        "--stability-score-thresh",
        type=float,
        metavar="X",
        help="leave out masks of lower stability (default: SAM's 0.95; 0.7 for the models that ship)",
    )
    everything.add_argument("--points", action="store_true", help="draw the point that each mask came from")
    everything.add_argument("--boxes", action="store_true", help="draw each mask's box")
    _add_output(everything, "everything")

    weights = commands.add_parser(
        "weights",
        help="download a public checkpoint",
        description="Downloads a public checkpoint, or the rest of it, and checks what has arrived.",
    )
    weights.add_argument("name", nargs="?", metavar="NAME", help="which; without a name, all are listed")
    weights.add_argument("--from", dest="source", metavar="PATH", help="take this copy (path or URL), do not download")
    weights.add_argument(
        "--folder", type=Path, metavar="DIR", help="where to (default: $TINYSAM_HOME or ~/.cache/tinysam)"
    )

    verify = commands.add_parser(
        "verify",
        help="check a job's output",
        description="Checks that every image of a job is in its output exactly once, as it was written. Exits with 1 "
        "if it is not.",
    )
    verify.add_argument("output", metavar="OUTPUT", help="output folder of a job over a lake (path or URL)")
    verify.add_argument(
        "--repair", action="store_true", help="delete what is broken, so that the job's next run makes it again"
    )

    export = commands.add_parser(
        "export",
        help="a label job's masks for other tools",
        description="Writes the masks of a label job in the format of another tool. Images that failed are left out.",
    )
    export.add_argument(
        "labels", metavar="LABEL_OUTPUT", help="output folder of pipelines/label_images.py (path or URL)"
    )
    export.add_argument(
        "--format",
        required=True,
        choices=EXPORT_FORMATS,
        help="coco: instances.json; cvat: COCO as CVAT imports it; label-studio: tasks.json; sa1b: JSON an image; "
        "yolo: polygons an image; png: 16-bit label map an image",
    )
    export.add_argument("--to", required=True, metavar="FOLDER", help="where to (path or URL)")

    report = commands.add_parser(
        "report",
        help="a page about a label job's output",
        description="Makes one self-contained HTML page: masks, distributions, failures, speed and quality.",
    )
    report.add_argument(
        "labels", metavar="LABEL_OUTPUT", help="output folder of pipelines/label_images.py (path or URL)"
    )
    report.add_argument("--lake", metavar="URL", help="where the images lie now, if they have moved since")
    report.add_argument(
        "--stages", nargs="+", default=[], metavar="OUTPUT", help="output folders of other jobs to show on the page"
    )
    report.add_argument("--output", default="report.html", metavar="FILE", help="default: report.html")
    report.add_argument("--images", type=int, default=24, metavar="N", help="random images to show (default: 24)")
    report.add_argument("--seed", type=int, default=0, help="which random images (default: 0)")
    return parser


def _add_photo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photo", help="an image, path or URL")
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME|PATH",
        help=f"a name that `tinysam weights` lists, or a checkpoint (default: {DEFAULT_MODEL})",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def _add_output(parser: argparse.ArgumentParser, kind: str) -> None:
    parser.add_argument("--out", metavar="FILE", help=f"the picture with masks (default: PHOTO-{kind}.png here)")
    parser.add_argument("--json", metavar="FILE", help="also write the masks as SA-1B's JSON, with COCO run lengths")


def _numbers(count: int, form: str) -> Callable[[str], tuple[float, ...]]:
    def parse(text: str) -> tuple[float, ...]:
        try:
            values = tuple(float(part) for part in text.split(","))
        except ValueError:
            values = ()
        if len(values) != count or not all(abs(value) < float("inf") for value in values):
            raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
        return values

    return parse


def _complain(error: Exception | str) -> None:
    sys.stderr.write(f"tinysam: error: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
