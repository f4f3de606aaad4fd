"""Upcycling: from dense models of one architecture to one mixture of experts."""
