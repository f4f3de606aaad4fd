"""The ``coterie`` command: one file per group of commands.

Knows how to read arguments, print results and report errors; every computation is done elsewhere and
imported inside the command that needs it, so that ``coterie --help`` loads no torch.
"""
