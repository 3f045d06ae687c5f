"""``oss report``: a page from a run folder."""

from __future__ import annotations

from pathlib import Path

import click

from oss_ext.cli.base import PathTo, check_writable
from oss_ext.report import write_report
from oss_ext.runs import RUN, Run


@click.command()
@click.argument("folder", metavar="RUN", type=PathTo())
@click.option("--open", "opened", is_flag=True, help="Then show it in the browser.")
def report(folder: Path, opened: bool) -> None:
    """Make RUN/report.html, and pictures of its plots, from the folder of a run.

    The page is one file: it can be sent on and opened from disk.
    """
    if not (folder / RUN).is_file():
        raise ValueError(f"{folder}: expected the folder of a run, found no {RUN} in it")
    run = Run.load(folder)
    check_writable(folder)
    page, *pictures = write_report(run, folder)
    click.echo(f"wrote {page}")
    for picture in pictures:
        click.echo(f"wrote {picture}")
    if opened:
        click.launch(page.absolute().as_uri())
