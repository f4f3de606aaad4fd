"""Runs the command line as ``python -m pipelines.cli``; knows nothing else."""

from __future__ import annotations

from pipelines.cli.main import main

if __name__ == "__main__":
    main()
