"""Everything with a process around it: training, evaluation, the demo and the command line.

Light on import: no submodule is loaded until it is asked for by name.
"""
