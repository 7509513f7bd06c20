"""`lfu-reg report`: its arguments, and the file that it writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from lfu_reg.cli.errors import Unusable
from lfu_reg.cli.options import check_writable
from lfu_reg.cli.report.finished import read
from lfu_reg.cli.report.page import page


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a `lfu-reg compare`, finished or not, or of the demo.")],
    out: Annotated[Path | None, typer.Option(help="File to write. If not given: report.html in that folder.")] = None,
) -> None:
    """One page of a comparison, with all that is in it: verdict, table, picture, answers, settings and versions."""
    for needed in ("matplotlib", "scipy"):
        if importlib.util.find_spec(needed) is None:
            raise Unusable(f"report needs {needed}, which is not installed: pip install 'lfu_reg[compare]'")
    finished = read(run)
    file = run / "report.html" if out is None else out
    check_writable(file, "--out")
    file.write_text(page(finished), encoding="utf-8")
    typer.echo(f"Written to {file}")
