"""Adapters that let other projects' programs use composed models.

Each module needs the optional extra it is named after, and is imported by nothing else in coterie.
"""
