"""The command line: Typer wiring, one module per group of commands.

What a command does is in the other packages; nothing here computes. Torch is imported inside commands, so that `--help`
is quick. One more command is a function with `@app.command` in the module of its group.
"""

# the order of the groups in `--help`
# isort: off
from advmoe.cli import stages
from advmoe.cli import results
from advmoe.cli import models
from advmoe.cli import project

# isort: on
from advmoe.cli.application import app, main

__all__ = ["app", "main", "models", "project", "results", "stages"]
