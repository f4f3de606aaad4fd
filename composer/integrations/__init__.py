"""Wrappers that put composed retrievers behind other frameworks' interfaces for embeddings.

Those frameworks call ``encode``, which cannot know a query from a document; these call ``encode_query`` and
``encode_document``. Each module needs the extra it is named after, and is imported by nothing else in coterie.
"""
