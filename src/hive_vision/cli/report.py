"""hive-vision report: one page and a model card about runs and their results."""

import sys
from collections.abc import Sequence
from pathlib import Path

HELP = """\
usage: hive-vision report RUN [RUN ...] [output=FOLDER]

What was run, and what came of it? Writes one HTML page, report.html, that can be mailed, printed
and read on a telephone (it loads nothing and runs no script), and model_card.md, the same as
Markdown for a model hub. Both say which method did better on what, but only where 95% intervals do.

  hive-vision report runs/demo
  hive-vision report runs/miniature-hive runs/miniature-sa output=runs/report

  RUN                an output folder of hive-vision pretrain, finetune, demo, compare, probe,
                     evaluate or maps; several are put side by side; one that is not finished is
                     shown as far as it came
  output=FOLDER      where the two files go (RUN; with several, runs/report)
"""


def run(arguments: list[str]) -> None:
    """Run the command."""
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(HELP)
        return
    folders, output = parse(arguments)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {str(output)!r} is a file; give a folder")
    from hive_vision.studies.report import CARD, PAGE, write_report

    write_report(folders, output)
    sys.stdout.write(f"model card: {output / CARD}\nreport: {output / PAGE}\n")


def parse(arguments: Sequence[str]) -> tuple[list[Path], Path]:
    """Read a command line.

    Returns:
        The folders, and where the report goes.

    Raises:
        ValueError: If it is none.
    """
    folders, output = [], ""
    for word in arguments:
        key, equals, value = word.removeprefix("--").partition("=")
        if equals and key == "output" and not Path(word).exists():
            if not value:
                raise ValueError("report: output is empty; write output=FOLDER")
            output = value
        elif word.startswith("-") or (equals and not Path(word).exists()):
            raise ValueError(
                f"report: unknown option {word!r}; give folders and output=FOLDER, see "
                "hive-vision report --help"
            )
        else:
            folders.append(Path(word))
    if not folders:
        raise ValueError("report: no folder given; add the output folder of a run")
    default = folders[0] if len(folders) == 1 else Path("runs/report")
    return folders, Path(output) if output else default
