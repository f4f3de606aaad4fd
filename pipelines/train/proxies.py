"""Public text that looks like an owner's: a small classifier tells the owner's text from public text, and picks.

It stands in for a data set that nobody may see when routers are tuned (FlexOlmo, arXiv 2507.07024, section 3.4, whose
authors released no code for it). Everything here runs where the owner's text is and uses no other owner's, so that
each owner's choice is the same whoever else takes part. Knows text alone; knows nothing of models. The choice tells
something of the owner's text: which public documents resemble it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experts.errors import DataError

__all__ = ["DomainClassifier", "choose_proxies", "resemblance"]

_FEATURES = 1 << 16
_CHARACTERS = 2000
"""What is read of a document: its domain shows early."""


class DomainClassifier:
    """Logistic regression on hashed character n-grams: an owner's text against public text.

    Hashing needs no vocabulary, so nothing of the owner's words is kept but 65536 weights; n-grams of 2 to 4 characters
    serve code, tables and prose in any language alike (Weinberger et al., arXiv 0902.2206).

    Args:
        own: Documents of the owner.
        public: Public documents.

    Raises:
        DataError: One side has no document.
    """

    def __init__(self, own: Sequence[str], public: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import LogisticRegression

        if not own or not public:
            raise DataError(
                f"A domain's classifier needs documents of both sides: {len(own)} of the owner and {len(public)} "
                "public ones were given."
            )
        self._vectorizer: Any = HashingVectorizer(
            analyzer="char_wb", ngram_range=(2, 4), n_features=_FEATURES, alternate_sign=False
        )
        self._model: Any = LogisticRegression(C=10.0, class_weight="balanced", max_iter=300)
        labels = np.concatenate([np.ones(len(own)), np.zeros(len(public))])
        self._model.fit(self._features([*own, *public]), labels)

    def log_odds(self, documents: Sequence[str]) -> NDArray[np.float64]:
        """How much each document is taken for the owner's, in nats; float64 ``(documents,)``, 0 is even."""
        if not documents:
            return np.zeros(0)
        odds: NDArray[np.float64] = self._model.decision_function(self._features(documents))
        return odds

    def _features(self, documents: Sequence[str]) -> Any:
        return self._vectorizer.transform([text[:_CHARACTERS] for text in documents])


def resemblance(own: Sequence[str], public: Sequence[str], *, folds: int = 2) -> NDArray[np.float64]:
    """How much each public document looks like the owner's, by a classifier that was not shown it as public.

    Args:
        own: Documents of the owner.
        public: Public documents, at least ``folds`` of them.
        folds: How many classifiers; each judges the documents that it was not fitted on.

    Returns:
        Log-odds, float64 ``(len(public),)``.

    Raises:
        DataError: There are too few documents.
    """
    if len(public) < folds:
        raise DataError(
            f"Proxies are chosen among public documents: give at least {folds}, not {len(public)}."
        )
    odds = np.empty(len(public))
    for fold in range(folds):
        judged = np.arange(len(public)) % folds == fold
        classifier = DomainClassifier(
            own, [text for text, out in zip(public, judged, strict=True) if not out]
        )
        odds[judged] = classifier.log_odds([text for text, out in zip(public, judged, strict=True) if out])
    return odds


def choose_proxies(own: Sequence[str], public: Sequence[str], *, count: int) -> list[int]:
    """Positions of the public documents that look most like the owner's, the most alike first.

    Args:
        own: Documents of the owner.
        public: Public documents.
        count: At most this many.

    Raises:
        DataError: There are too few documents.
    """
    order = np.argsort(-resemblance(own, public), kind="stable")
    return [int(position) for position in order[:count]]
