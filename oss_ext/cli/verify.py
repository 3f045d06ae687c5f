"""``oss verify``: whether a schedule is what its file says."""

from __future__ import annotations

import click

from oss_ext.cli.base import (
    Choice,
    batch_option,
    load_for,
    load_schedule,
    model_options,
    quiet_option,
    schedule_argument,
)
from oss_ext.verify import MOST_SAMPLES
from oss_ext.verify import verify as verify_schedule


@click.command()
@schedule_argument
@model_options
@click.option("--samples", type=click.IntRange(1), default=MOST_SAMPLES, show_default=True,
              help="Draw at most so many; SCHEDULE says how many it needs.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Seed of the search's noise.")
@batch_option
@quiet_option
def verify(
    schedule_file: str,
    choice: Choice,
    samples: int,
    seed: int,
    max_batch: int | None,
    quiet: bool,
) -> None:
    """Check what SCHEDULE, a file or preset:NAME, says of itself, by running it once more.

    Prints every claim, and what cannot be checked; exits with 1 if one does not hold.
    """
    schedule = load_schedule(schedule_file)
    model = load_for([schedule], choice, force=True)  # what differs is said below
    claims = verify_schedule(
        model, schedule, seed=seed, samples=samples, max_batch=max_batch, progress=not quiet
    )
    for claim in claims:
        click.echo(claim)
    if any(claim.holds is False for claim in claims):
        click.get_current_context().exit(1)
