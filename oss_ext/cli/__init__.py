"""The command line ``oss``: parse, call, print. A new command is a function and a line here."""

from __future__ import annotations

import signal
import sys
from typing import Any

import click

import oss_ext
from oss_ext.cli import compare, info, reports, schedules, search, students, verify
from oss_ext.events import one_line

INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C
TERMINATED = 143  # and by SIGTERM


class _Terminated(BaseException):
    """What SIGTERM raises, so that files are left whole."""


def _terminate(*signal_and_frame: object) -> None:
    raise _Terminated


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(oss_ext.__version__, prog_name="oss")
def cli() -> None:
    """Optimal few-step sampling schedules for diffusion and flow-matching models.

    \b
    oss search --model digits --steps 5,10 --out schedules
    oss search --pipeline DIR --prompts prompts.txt --steps 8,10 --out schedules
    oss show schedules/digits-10.json
    oss verify schedules/digits-10.json
    oss compare schedules/digits-5.json schedules/digits-10.json
    oss compare --model digits --steps 5,10 --methods all --out run
    oss report run
    oss sample schedules/digits-10.json --out samples.png
    oss export schedules/digits-10.json --to comfyui
    """


for command in (
    search.plan,
    search.search,
    students.sample,
    schedules.show,
    verify.verify,
    compare.compare,
    reports.report,
    schedules.export_schedule,
    schedules.list_presets,
    info.list_models,
    info.list_solvers,
    info.backends,
):
    cli.add_command(command)


def main() -> None:
    """Entry point: errors are one line on stderr; 0 done, 1 failed, 2 misused, 130 interrupted,
    143 terminated."""
    status: Any
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        status = cli(prog_name="oss", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        status = INTERRUPTED
    except _Terminated:
        click.echo("terminated", err=True)
        status = TERMINATED
    except (ValueError, RuntimeError, OSError) as error:
        click.echo(f"error: {one_line(error)}", err=True)
        status = 1
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(status or 0)
