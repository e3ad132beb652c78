"""The command line: `specdec generate | chat | bench | doctor`. Nothing here imports torch before a command needs it."""

from specdec.cli.app import app, main

__all__ = ["app", "main"]
