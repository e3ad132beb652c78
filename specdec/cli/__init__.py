"""The command line: `specdec generate | chat | bench | check | doctor`. torch is imported by the commands only."""

from specdec.cli.app import app, main

__all__ = ["app", "main"]
