"""Layers that stand where a base model had its own FFN."""
