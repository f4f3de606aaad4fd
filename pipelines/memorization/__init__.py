"""Measures what a composed model has memorised: exposure of planted canaries, extraction of training text.

Knows models, tokenizers and text; knows nothing of how an expert was trained. Nothing here proves that a text is
not memorised: a canary that is not found, or a prefix that is not continued, is one attack that failed.
"""
