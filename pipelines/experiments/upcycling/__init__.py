"""The upcycling comparison: mixtures of whole models that owners trained alone (BAM, BTX and what they are judged by).

Light to import: torch is loaded by what runs.
"""
