"""``oss models``, ``oss solvers`` and ``oss backends``: what there is here."""

from __future__ import annotations

import inspect

import click
import torch

from oss_ext import models, ops, solvers


@click.command("models")
def list_models() -> None:
    """List the models and their options."""
    for name, load in models.MODELS.items():
        summary = (inspect.getdoc(load) or "").split("\n")[0]
        click.echo(f"{name}: {summary}")
        for option, parameter in inspect.signature(load).parameters.items():
            click.echo(f"    --set {option}=...  default {parameter.default!r}")
    click.echo("--pipeline DIR: any diffusers pipeline, by its own loop.")
    click.echo("    --set KEY=VALUE  argument of the pipeline's call, e.g. guidance_scale=4.5")


@click.command("solvers")
def list_solvers() -> None:
    """List the solvers, and how often a step of theirs evaluates the model."""
    for name, solver in solvers.SOLVERS.items():
        click.echo(f"{name}: {solver.title}")
        if solver.evaluations > 1:
            click.echo(f"    {solver.evaluations} model evaluations per step")


@click.command()
def backends() -> None:
    """List the kernel backends: which one serves each device here, and why others cannot."""
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    for backend in ops.BACKENDS.values():
        click.echo(f"{backend.name}: {backend.description}")
        for device in devices:
            serves = "in use" if ops.serving(device) is backend else "available"
            click.echo(f"    {device}: {backend.why_not(device) or serves}")
    for key, value in ops.native.build_info().items():
        click.echo(f"{key}: {value}")
