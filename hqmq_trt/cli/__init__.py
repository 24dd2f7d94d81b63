"""Command line of hqmq-trt: one module a command."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Annotated

import typer

from hqmq_trt.cli.build import build
from hqmq_trt.cli.diff import diff
from hqmq_trt.cli.eval import eval_app
from hqmq_trt.cli.export import export
from hqmq_trt.cli.inspect import inspect
from hqmq_trt.cli.memory import memory
from hqmq_trt.cli.output import Output
from hqmq_trt.cli.run import run
from hqmq_trt.cli.versions import versions
from hqmq_trt.errors import HqmqError

app = typer.Typer(
    name="hqmq-trt",
    help="Give a language model a KV cache of quaternion codes (HQMQ) and run it.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (export, build, run, diff, inspect, memory):
    app.command()(_command)
app.add_typer(eval_app)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the versions that matter and exit.")] = False,
    json_mode: Annotated[bool, typer.Option("--json", help="With --version: as JSON.")] = False,
) -> None:
    if version:
        found = versions()
        if json_mode:
            typer.echo(json.dumps(found, indent=2))
        else:
            for name, value in found.items():
                typer.echo(f"{name:15} {value or 'not installed'}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def main() -> None:
    """Entry point: a user's mistake becomes one line on stderr and exit code 2."""
    try:
        app()
    except (HqmqError, OSError) as error:
        if Output.verbose:
            traceback.print_exc()
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
