"""Training of a retriever with the trainer of sentence-transformers, on states and vectors made before.

The loss is the cross-entropy of a query against documents whose vectors are constants: ``CE(q . D / temperature)``
(RouterRetriever, arXiv 2409.02685, with the whole domain in the place of a batch). Knows tensors and a plan of steps;
knows nothing of texts, files of pairs or owners.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules.input_module import InputModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback

from experts.errors import TrainingError
from pipelines.train.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from pipelines.train.loop import LoopResult, LoopSettings, learning_rate_at
from pipelines.train.query_encoder import QueryStates, RetrievalBase

__all__ = ["PairTable", "RankingLoss", "StoredQueries", "train_queries"]


class StoredQueries(InputModule):  # type: ignore[misc]
    """Stands in for the encoder: a "text" is the number of a query, whose states go through the upper layers only.

    Args:
        base: The embedding model; its upper layers hold what is trained.
        states: Of all queries.
        trained: What is trained.
    """

    def __init__(self, base: RetrievalBase, states: QueryStates, trained: Sequence[nn.Module]) -> None:
        super().__init__()
        self.trained = nn.ModuleList(trained)
        object.__setattr__(self, "_base", base)  # frozen: no part of what is trained, moved or saved
        self._states = states

    def preprocess(
        self, inputs: Sequence[str], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Numbers of queries, as text, to a tensor; under the name by which the trainer finds a column's features."""
        return {"input_ids": torch.tensor([int(number) for number in inputs])}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Put token embeddings and mask of the queries beside their numbers."""
        base: RetrievalBase = object.__getattribute__(self, "_base")
        states, mask = self._states.batch(features["input_ids"].tolist())
        return {**features, "token_embeddings": base.upper(states, mask), "attention_mask": mask}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Nothing: what is trained is written in its own form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTable:
    """What is trained on: pair i asks with query ``queries[i]`` for document ``documents[i]``.

    Attributes:
        queries: ``(pairs,)`` int64, numbers of stored states.
        documents: ``(pairs,)`` int64, rows of the documents' vectors.
        answers: For each query, by its number, every row that answers it.
        hard: ``(queries, hard)`` int64 rows that the base ranks high and that do not answer; None: no such rows.
    """

    queries: NDArray[np.int64]
    documents: NDArray[np.int64]
    answers: Mapping[int, Sequence[int]]
    hard: NDArray[np.int64] | None = None


class RankingLoss(nn.Module):
    """Cross-entropy of each pair's document against others; other right answers of the query are left out.

    Args:
        model: Gives ``sentence_embedding``.
        documents: ``(documents, dimension)``, constant.
        pairs: What is asked.
        temperature: Similarities are divided by it.
        cosine: Whether vectors are divided by their lengths first.
        whole: Against all documents; else against those of the batch and the hard ones.
    """

    def __init__(
        self,
        model: nn.Module,
        documents: Tensor,
        pairs: PairTable,
        *,
        temperature: float,
        cosine: bool,
        whole: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self._documents = F.normalize(documents, dim=1) if cosine else documents
        self._pairs = pairs
        self._temperature = temperature
        self._cosine = cosine
        self._whole = whole
        self.last = math.nan

    def forward(self, features: Sequence[dict[str, Any]], labels: Tensor) -> Tensor:
        """Mean loss of the pairs with the numbers ``labels``; ``features`` holds the queries alone."""
        queries = self.model(features[0])["sentence_embedding"]
        queries = F.normalize(queries, dim=1) if self._cosine else queries
        numbers = labels.numpy()
        wanted = torch.from_numpy(self._pairs.documents[numbers])
        columns = self._columns(numbers)
        scores = queries @ self._documents[columns].T / self._temperature
        target = torch.searchsorted(columns, wanted)
        loss = F.cross_entropy(scores.masked_fill(self._others(numbers, columns, target), -math.inf), target)
        self.last = float(loss.detach())
        return loss

    def _columns(self, numbers: NDArray[np.int64]) -> Tensor:
        """Rows of the documents that the batch is told apart from, ascending."""
        if self._whole:
            return torch.arange(len(self._documents))
        rows = [self._pairs.documents[numbers]]
        if self._pairs.hard is not None:
            rows.append(self._pairs.hard[self._pairs.queries[numbers]].ravel())
        return torch.from_numpy(np.unique(np.concatenate(rows)))

    def _others(self, numbers: NDArray[np.int64], columns: Tensor, target: Tensor) -> Tensor:
        """Where a row holds another right answer than the one that is asked for."""
        hidden = torch.zeros(len(numbers), len(columns), dtype=torch.bool)
        for row, number in enumerate(numbers):
            answers = torch.tensor(self._pairs.answers[int(self._pairs.queries[number])])
            if len(answers) > 1:
                hidden[row] = torch.isin(columns, answers)
        hidden[torch.arange(len(numbers)), target] = False
        return hidden


class _Plan(torch.utils.data.Dataset[dict[str, Any]]):
    """The pairs of the steps that are left, in their order."""

    def __init__(self, pairs: PairTable, numbers: NDArray[np.int64]) -> None:
        self._pairs, self._numbers = pairs, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(self._numbers[index])
        return {"anchor": str(self._pairs.queries[number]), "label": number}


class _Trainer(SentenceTransformerTrainer):  # type: ignore[misc]
    """The stock trainer without shuffling (the plan decides the order), saving or model cards."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            shuffle=False,
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # else it would draw from the state that dropout draws from
        )

    def preprocess_dataset(self, dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None: a model card would quote the data."""


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Stores checkpoints, reports each step, and stops on a loss that is not finite."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        loss: RankingLoss,
        *,
        settings: LoopSettings,
        checkpoint: Path,
        on_step: Callable[[int, float, float], None],
    ) -> None:
        self._parameters, self._optimizer, self._loss = parameters, optimizer, loss
        self._settings, self._checkpoint, self._on_step = settings, checkpoint, on_step
        found = load_checkpoint(checkpoint, parameters=parameters, optimizer=optimizer)
        self._rng = torch.get_rng_state() if found else None
        self.state = found or TrainingState(step=0, seconds=0.0)
        self.resumed = self.state.step
        self._begin = time.perf_counter() - self.state.seconds
        self._quarter = max(1, settings.steps // 4)
        self._whole = True  # False while parameters stand between two steps

    def interrupted(self) -> None:
        """Store where it stands, if that is between two steps and further than before."""
        if self._whole and self.state.step > self.resumed:
            self.store()

    def store(self) -> None:
        """Write a checkpoint."""
        save_checkpoint(
            self._checkpoint, parameters=self._parameters, optimizer=self._optimizer, state=self.state
        )

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self._rng is not None:  # the trainer has set its own seed meanwhile
            torch.set_rng_state(self._rng)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if not math.isfinite(self._loss.last):
            raise TrainingError(
                f"The loss is {self._loss.last} at step {self.state.step + 1} of {self._settings.steps}. Lower "
                "learning_rate, lengthen warmup or check the data."
            )
        self._whole = False

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        loss = self._loss.last
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            seconds=time.perf_counter() - self._begin,
            losses=(*self.state.losses, loss)[-self._quarter :],
        )
        self._whole = True
        done = self.state.step
        if done % self._settings.checkpoint_every == 0 and done < self._settings.steps:
            self.store()
        self._on_step(done, loss, self.state.seconds)


def train_queries(
    base: RetrievalBase,
    states: QueryStates,
    trained: Sequence[nn.Module],
    *,
    loss_of: Callable[[nn.Module], RankingLoss],
    pairs: PairTable,
    plan: NDArray[np.int64],
    settings: LoopSettings,
    seed: int,
    checkpoint: Path,
    scratch: Path,
    on_step: Callable[[int, float, float], None],
) -> LoopResult:
    """Run the steps that are left.

    Args:
        base: The embedding model with what is trained attached.
        states: Of the queries, entering the first trained layer.
        trained: Modules whose trainable parameters are trained.
        loss_of: Makes the loss of a model.
        pairs: What is asked.
        plan: ``(steps, batch)``: numbers of pairs.
        settings: The numbers.
        seed: For dropout.
        checkpoint: Written every ``checkpoint_every`` steps and on interruption; continued from if it exists.
        scratch: A folder for the trainer; it stores nothing there.
        on_step: Called with steps done, loss and seconds so far.

    Raises:
        TrainingError: The loss is not finite.
        KeyboardInterrupt: Passed on, after a checkpoint.
    """
    model = SentenceTransformer(
        modules=[StoredQueries(base, states, trained), *list(base.model)[1:]], device="cpu"
    )
    parameters = [p for module in trained for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        _groups(parameters, weight_decay=settings.weight_decay), lr=settings.learning_rate, betas=(0.9, 0.999)
    )
    loss = loss_of(model)
    watch = _Watch(parameters, optimizer, loss, settings=settings, checkpoint=checkpoint, on_step=on_step)
    left = plan[watch.resumed :]
    if len(left):
        first = watch.resumed
        for group in optimizer.param_groups:  # the schedule's factors are of the peak rate
            group["lr"] = group["initial_lr"] = settings.learning_rate
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_at(first + step, settings) / settings.learning_rate
        )
        trainer = _Trainer(
            model=model,
            args=_arguments(scratch, batch=plan.shape[1], steps=len(left), settings=settings, seed=seed),
            train_dataset=_Plan(pairs, left.ravel()),
            loss=loss,
            optimizers=(optimizer, schedule),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)  # what is reported is decided elsewhere
        try:
            trainer.train()
        except KeyboardInterrupt:
            watch.interrupted()
            raise
    return LoopResult(
        loss=float(np.mean(watch.state.losses)),
        seconds=watch.state.seconds,
        resumed_from=watch.resumed,
        state=watch.state,
    )


def _groups(parameters: Sequence[nn.Parameter], *, weight_decay: float) -> list[dict[str, Any]]:
    """Let matrices decay, and no bias or norm."""
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": weight_decay}]
    return groups + ([{"params": others, "weight_decay": 0.0}] if others else [])


def _arguments(
    scratch: Path, *, batch: int, steps: int, settings: LoopSettings, seed: int
) -> SentenceTransformerTrainingArguments:
    return SentenceTransformerTrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=batch,
        max_steps=steps,
        max_grad_norm=settings.grad_clip,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
