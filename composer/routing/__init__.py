"""Routing: contexts, scorers and selectors, and what passes between a model and its router."""
