"""The entry point of the ``coterie`` command: checks the installation, then hands over to the application.

Imports nothing of ours but the shadow check at module level, because a package that hides one of ours
would otherwise break this very import with an error that names neither.
"""

from __future__ import annotations

import sys

from pipelines.shadow import explain, find_shadows

__all__ = ["main"]


def main() -> None:
    """Run ``coterie`` with the arguments of the process and exit."""
    shadows = find_shadows()
    if shadows:
        sys.stderr.write(f"Error: {explain(shadows)}\n")
        sys.exit(1)
    try:
        from pipelines.cli.app import command
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
    command().main(prog_name="coterie")
