"""Hugging Face transformers: a Trainer for domains of one loss, such as kinds of text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from excessmtl_ext.balancer import Balancer
from excessmtl_ext.domains import DomainSampler, domain_losses, move_weights, split_domains
from excessmtl_ext.integrations.transformers import BalancedTrainer

SAMPLER_FILE = "domain_sampler.pt"
"""Name of the sampler's state in a checkpoint folder."""

IGNORED_LABEL = -100

UnreducedLoss = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


class DomainTrainer(BalancedTrainer):
    """A Trainer that balances the T domains which the samples of one data set belong to.

    Each row of the data set has, beside the model's inputs and ``labels``, the number of its domain. The model is any
    that returns ``logits``; it is given neither labels nor domains. What the balancer is made of decides where the
    weights act:

    ================================================ ====================================================
    ``ExcessMTL(num_tasks=T, feature_dim=-1)``       in one backward pass, below the model's head, as
                                                     :func:`excessmtl_ext.domains.split_domains`; any
                                                     number of processes
    made with the model or parameters of it          on the losses, as ``balancer.backward(losses)``; one
                                                     process
    the same, and ``sampler``                        on how often each domain is drawn; the loss is the
                                                     batch's plain mean; one process
    ================================================ ====================================================

    Evaluation adds ``eval_loss/NAME`` of every domain, the mean over all of its labels, and
    ``eval_worst_domain_loss``; ``eval_loss`` is the mean over the domains.

    Args:
        *args: As for ``transformers.Trainer``.
        balancer: Of T tasks.
        domain_names: T names for the log; None for the numbers of the domains.
        domain_key: The column with the numbers: an integer per row, or one per token; negative: of no domain.
        unreduced_loss: Called with the model's output and the labels; returns the losses of rows [B] or tokens [B, L],
            and booleans of the same shape: which of them count. None: cross entropy of ``logits`` [B, C] and labels
            [B], or of [B, L, C] and [B, L], where each position of a causal language model predicts the next one.
            Labels of -100 do not count.
        head: The module that the features go into, for the first kind of balancer. None:
            ``model.get_output_embeddings()``.
        sampler: Draws the rows of the training set; its ``weights`` follow the balancer. Checkpoints have its state.
        **kwargs: As for ``transformers.Trainer``.

    Raises:
        ValueError: as :class:`BalancedTrainer <excessmtl_ext.integrations.transformers.BalancedTrainer>`; a batch has
            no domains, labels or logits; there is no head; or the options need one process and there are several.
    """

    def __init__(
        self,
        *args: Any,
        balancer: Balancer,
        domain_names: Sequence[str] | None = None,
        domain_key: str = "domain_id",
        unreduced_loss: UnreducedLoss | None = None,
        head: nn.Module | None = None,
        sampler: DomainSampler | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, balancer=balancer, task_names=domain_names, **kwargs)
        self.domain_key = domain_key
        if "labels" not in self.label_names:
            self.label_names = [*self.label_names, "labels"]  # of a model that takes none
        self.unreduced_loss = unreduced_loss
        self.domain_sampler = sampler
        self.head = self._checked_head(head)
        if self.head is None and self.args.world_size > 1:
            raise ValueError(
                f"Expected one process, but got {self.args.world_size}: the passes per domain run in one. Take a "
                f"balancer without parameters, ExcessMTL(num_tasks={balancer.num_tasks}, feature_dim=-1)."
            )
        self._sums = torch.zeros(2, balancer.num_tasks, dtype=torch.float64)
        self.num_used = 0
        self._num_replayed = 0
        if sampler is not None:
            if sampler.weights.num_domains != balancer.num_tasks:
                raise ValueError(
                    f"Expected `sampler` of {balancer.num_tasks} domains, but got {sampler.weights.num_domains}."
                )
            sampler.weights.follow(balancer)
            self.add_callback(_SamplerCallback(self))

    def _checked_head(self, head: nn.Module | None) -> nn.Module | None:
        """Returns where the features are split, None where the weights act elsewhere."""
        balancer = self.balancer
        if balancer.shared_parameters or balancer.search is not None:
            return None
        if self.domain_sampler is not None:
            raise ValueError(
                "Expected a balancer with parameters for `sampler`, such as GroupDRO(model.parameters(), ...), but got "
                f"{balancer!r}."
            )
        if head is None:
            find = getattr(self.model, "get_output_embeddings", None)
            head = None if find is None else find()
        if head is None:
            raise ValueError(
                f"Expected `head`, the module of {type(self.model).__name__} that makes logits of features, but it has "
                "no output embeddings to take instead. Name it: head=model.classifier."
            )
        return head

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        names: list[str] = self._signature_columns or []
        self._signature_columns = [*names, *({self.domain_key} - set(names))]

    # ---- losses

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the loss to call backward on, in evaluation the mean over domains; called by the Trainer."""
        inputs = dict(inputs)
        ids = self._popped(inputs, self.domain_key)
        labels = self._popped(inputs, "labels")
        if torch.is_grad_enabled() and model.training:
            self.num_used += len(labels)
            outputs = self._outputs(model, inputs, ids)
            loss = self._training_loss(*self._unreduced(outputs, labels, ids))
        else:
            outputs = model(**inputs)
            losses, ids, mask = self._unreduced(outputs, labels, ids)
            self._count(losses, ids, mask)
            losses_of = domain_losses(losses, ids, self.balancer.num_tasks, mask=mask)
            loss = torch.stack([each for each in losses_of if each is not None]).mean()
        return (loss, outputs) if return_outputs else loss

    def _popped(self, inputs: dict[str, Any], name: str) -> Tensor:
        if name not in inputs:
            raise ValueError(
                f"Expected {name!r} in every row of the data set, but a batch has {', '.join(map(repr, inputs))}. "
                "The data collator must keep it."
            )
        value: Tensor = inputs.pop(name)
        return value

    def _outputs(self, model: nn.Module, inputs: dict[str, Any], ids: Tensor) -> Any:
        """Runs the model, with the features split where they go into the head."""
        if self.head is None:
            return model(**inputs)
        num_splits = 0

        def split(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            nonlocal num_splits
            num_splits += 1
            features, *others = given
            return (split_domains(self.balancer, features, ids), *others)

        handle = self.head.register_forward_pre_hook(split)
        try:
            outputs = model(**inputs)
        finally:
            handle.remove()
        if num_splits != 1:
            raise ValueError(
                f"Expected `head` to run once in the forward pass, but it ran {num_splits} times. Name the module that "
                "makes logits of features."
            )
        return outputs

    def _unreduced(
        self, outputs: Any, labels: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the losses per row or token, their domains, and which of them count."""
        if self.unreduced_loss is not None:
            losses, mask = self.unreduced_loss(outputs, labels)
        else:
            if "logits" not in outputs or labels.is_floating_point():
                raise ValueError(
                    "Expected logits and integer labels, but the model returns "
                    f"{', '.join(map(repr, outputs))}, and labels are {labels.dtype}. Give `unreduced_loss`."
                )
            logits = outputs["logits"]
            if logits.dim() == 3 and self._predicts_next():
                logits, labels = logits[:, :-1], labels[:, 1:]
                ids = ids[:, 1:] if ids.dim() == 2 else ids
            losses = cross_entropy(
                logits.flatten(0, -2).float(),
                labels.flatten(),
                reduction="none",
                ignore_index=IGNORED_LABEL,
            ).view(labels.shape)
            mask = labels != IGNORED_LABEL
        if ids.shape != losses.shape[: ids.dim()] or ids.dim() == 0:
            raise ValueError(
                f"Expected {self.domain_key!r} of every row or of every token, but got shape {list(ids.shape)} for "
                f"losses of {list(losses.shape)}."
            )
        domains = ids.reshape(*ids.shape, *[1] * (losses.dim() - ids.dim())).expand(losses.shape)
        return losses, domains, mask & (domains >= 0)

    def _predicts_next(self) -> bool:
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "get_base_model"):  # adapters of peft
            model = model.get_base_model()
        name = type(model).__name__
        loss_type = getattr(model, "loss_type", None)
        if loss_type is None and name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            raise ValueError(
                f"Expected a language model of transformers, but {name} has no `loss_type`: nothing tells whether a "
                "position predicts its own label or the next one. Give `unreduced_loss`."
            )
        return loss_type is None or str(loss_type) == "ForCausalLM"

    def _training_loss(self, losses: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        by_domain = domain_losses(losses, ids, self.balancer.num_tasks, mask=mask)
        present = [loss for loss in by_domain if loss is not None]
        if not present:
            return (losses * 0).sum()  # nothing to learn from this batch
        if self.head is not None:
            return torch.stack(present).sum()
        if self.domain_sampler is None:
            loss: Tensor = self.balancer(by_domain)
            return loss
        move_weights(self.balancer, by_domain)
        return losses[mask].mean()

    # ---- evaluation

    def _count(self, losses: Tensor, ids: Tensor, mask: Tensor) -> None:
        counted = losses[mask].double()
        each = torch.stack([counted, torch.ones_like(counted)])
        self._sums = self._sums.to(losses.device).index_add(1, ids[mask], each)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluates like the Trainer, and adds the loss of every domain."""
        self._sums = torch.zeros_like(self._sums, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = self.accelerator.reduce(self._sums)  # type: ignore[misc]
        means = {
            name: float(total[domain] / count[domain])
            for domain, name in enumerate(self.task_names)
            if count[domain]
        }
        if means and output.metrics is not None:
            prefix = metric_key_prefix
            output.metrics.update({f"{prefix}_loss/{name}": mean for name, mean in means.items()})
            output.metrics[f"{prefix}_loss"] = sum(means.values()) / len(means)
            output.metrics[f"{prefix}_worst_domain_loss"] = max(means.values())
        return output

    # ---- sampling

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.domain_sampler is None:
            return super()._get_train_sampler(train_dataset)
        num_replayed, self._num_replayed = self._num_replayed, 0
        return _Rest(self.domain_sampler, num_replayed)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Trains like the Trainer; a resumed run restores the states of balancer and sampler from the checkpoint."""
        folder = self.checkpoint_folder(resume_from_checkpoint)
        sampler = self.domain_sampler
        if sampler is not None and folder is not None:
            path = Path(folder) / SAMPLER_FILE
            if not path.exists():
                raise FileNotFoundError(
                    f"Expected {SAMPLER_FILE} in {folder}, but there is none: it was saved without `sampler`. Train "
                    "without resume_from_checkpoint to start anew."
                )
            state = torch.load(path, weights_only=True)
            sampler.load_state_dict(state)
            self._num_replayed = len(sampler) - (state["num_left"] or len(sampler))
        return super().train(resume_from_checkpoint, *args, **kwargs)


class _SamplerCallback(TrainerCallback):
    """Adds the sampler's state to every checkpoint."""

    def __init__(self, trainer: DomainTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sampler = self.trainer.domain_sampler
        assert sampler is not None
        sampler.weights.update(self.trainer.balancer.task_weights)  # those of a checkpoint

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.num_used = 0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sampler = self.trainer.domain_sampler
        assert sampler is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(sampler.state_dict(num_used=self.trainer.num_used), folder / SAMPLER_FILE)


class _Rest(Sampler[int]):
    """The rest of the sampler's epoch, after as many stand-ins as the Trainer skips when it resumes."""

    def __init__(self, sampler: DomainSampler, num_replayed: int) -> None:
        self.sampler = sampler
        self.num_replayed = num_replayed

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        num_replayed, self.num_replayed = self.num_replayed, 0
        return itertools.chain(itertools.repeat(0, num_replayed), self.sampler)
