"""Hugging Face transformers: DomainTrainer on a tiny GPT-2 and a tiny BERT, randomly initialised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from excessmtl_ext import ExcessMTL, GroupDRO, Uniform
from excessmtl_ext.domains import DomainSampler, DomainWeights, domain_losses

pytest.importorskip(
    "accelerate", reason="accelerate, which transformers' Trainer needs, is missing"
)
pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    TrainingArguments,
)

from excessmtl_ext.integrations.domain_trainer import SAMPLER_FILE, DomainTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument"),
]

NUM_DOMAINS, VOCABULARY, LENGTH = 3, 11, 6
NAMES = ["prose", "code", "noise"]


def make_model(dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def rows(count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of three domains; the last two labels of each third row do not count."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        domain = index % NUM_DOMAINS
        ids = torch.randint(1 + 3 * domain, 4 + 3 * domain, (LENGTH,), generator=generator)
        labels = ids.clone()
        if index % 3 == 0:
            labels[-2:] = -100
        made.append({"input_ids": ids, "labels": labels, "domain_id": domain})
    return made


def make_trainer(folder: Any, model: nn.Module, balancer: Any, **options: Any) -> DomainTrainer:
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    own = {name: options.pop(name) for name in list(options) if name in TrainingArguments.__dict__}
    given = {"train_dataset": rows(), "eval_dataset": rows(12, seed=1), **options}
    return DomainTrainer(
        model=model,
        args=TrainingArguments(str(folder), **{**settings, **own}),
        balancer=balancer,
        domain_names=NAMES,
        **given,
    )


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor | None]:
    """The losses of the domains, written out."""
    logits = model(input_ids=batch["input_ids"]).logits
    found: list[Tensor | None] = []
    for domain in range(NUM_DOMAINS):
        each = [
            cross_entropy(logits[row, at], batch["labels"][row, at + 1])
            for row in range(len(logits))
            for at in range(LENGTH - 1)
            if batch["domain_id"][row] == domain and batch["labels"][row, at + 1] != -100
        ]
        found.append(torch.stack(each).mean() if each else None)
    return found


def batches_of(seen: list[Tensor]) -> list[dict[str, Tensor]]:
    """The batches that the model has seen, with labels and domains again."""
    by_ids = {tuple(row["input_ids"].tolist()): row for row in rows()}
    found = []
    for input_ids in seen:
        given = [by_ids[tuple(ids.tolist())] for ids in input_ids]
        found.append(
            {
                "input_ids": input_ids,
                "labels": torch.stack([row["labels"] for row in given]),
                "domain_id": torch.tensor([row["domain_id"] for row in given]),
            }
        )
    return found


@pytest.mark.parametrize("method", [ExcessMTL, GroupDRO, Uniform])
def test_training_is_that_of_a_loop_of_ones_own(method, tmp_path):
    model = make_model()
    start = parameters_of(model)
    seen: list[Tensor] = []
    model.transformer.wte.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    trainer = make_trainer(tmp_path, model, method(model.parameters(), num_tasks=NUM_DOMAINS))
    trainer.train()
    trained, batches = parameters_of(model), batches_of(list(seen))

    model.load_state_dict(start, strict=False)
    balancer = method(model.parameters(), num_tasks=NUM_DOMAINS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches:
        optimizer.zero_grad()
        balancer.backward(losses_of(model, batch))
        optimizer.step()
    assert len(batches) == 6
    torch.testing.assert_close(trainer.balancer.task_weights, balancer.task_weights)
    torch.testing.assert_close(trained, parameters_of(model))


def test_without_parameters_the_pass_is_one_and_the_features_are_split(tmp_path):
    model = make_model()
    start = parameters_of(model)
    seen: list[Tensor] = []
    model.transformer.wte.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    passes: list[int] = []
    model.transformer.wpe.weight.register_hook(lambda _: passes.append(1))
    trainer = make_trainer(tmp_path, model, ExcessMTL(num_tasks=NUM_DOMAINS, feature_dim=-1))
    trainer.train()
    trained, batches = parameters_of(model), batches_of(list(seen))
    assert len(passes) == 6
    assert not model.lm_head._forward_pre_hooks

    model.load_state_dict(start, strict=False)
    balancer = ExcessMTL(num_tasks=NUM_DOMAINS, feature_dim=-1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches:
        optimizer.zero_grad()
        features = model.transformer(batch["input_ids"]).last_hidden_state
        copies = balancer.split(features)
        total = torch.zeros(())
        for domain in range(NUM_DOMAINS):
            if (batch["domain_id"] == domain).any():
                logits = model.lm_head(copies[domain])[:, :-1]
                losses = cross_entropy(
                    logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
                ).view(len(logits), -1)
                counts = (batch["labels"][:, 1:] != -100) & (batch["domain_id"] == domain)[:, None]
                total = total + losses[counts].mean()
        total.backward()
        optimizer.step()
    assert balancer.task_weights.std() > 0.001
    torch.testing.assert_close(trainer.balancer.task_weights, balancer.task_weights)
    torch.testing.assert_close(trained, parameters_of(model))


def test_evaluation_adds_the_loss_of_every_domain_over_all_of_its_labels(tmp_path):
    model = make_model()
    trainer = make_trainer(
        tmp_path,
        model,
        ExcessMTL(num_tasks=NUM_DOMAINS, feature_dim=-1),
        per_device_eval_batch_size=5,
    )
    metrics = trainer.evaluate()
    given = rows(12, seed=1)
    batch = {
        "input_ids": torch.stack([row["input_ids"] for row in given]),
        "labels": torch.stack([row["labels"] for row in given]),
        "domain_id": torch.tensor([row["domain_id"] for row in given]),
    }
    model.eval()
    with torch.no_grad():
        expected = [float(loss) for loss in losses_of(model, batch)]  # type: ignore[arg-type]
    assert [metrics[f"eval_loss/{name}"] for name in NAMES] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert metrics["eval_worst_domain_loss"] == pytest.approx(max(expected), rel=1e-5)
    assert trainer.balancer.num_steps.item() == 0
    # Again, and of some domains alone: nothing stays of the first time.
    fewer = trainer.evaluate([row for row in given if row["domain_id"] != 1])
    assert "eval_loss/code" not in fewer
    assert fewer["eval_loss/prose"] == pytest.approx(expected[0], rel=1e-5)


def test_the_log_holds_the_weights_by_the_names_of_the_domains(tmp_path):
    model = make_model()
    trainer = make_trainer(tmp_path, model, ExcessMTL(num_tasks=NUM_DOMAINS, feature_dim=-1))
    trainer.train()
    last = [row for row in trainer.state.log_history if "task_weight/code" in row][-1]
    assert [last[f"task_weight/{name}"] for name in NAMES] == pytest.approx(
        trainer.balancer.task_weights.tolist()
    )


def make_sampled(folder: Any, **options: Any) -> tuple[DomainTrainer, DomainWeights]:
    model = make_model(dropout=0.1)
    weights = DomainWeights(NUM_DOMAINS, smoothing=0.1)
    sampler = DomainSampler([row["domain_id"] for row in rows()], weights, seed=3)
    balancer = GroupDRO(model.parameters(), num_tasks=NUM_DOMAINS, robust_step_size=0.5)
    return make_trainer(folder, model, balancer, sampler=sampler, **options), weights


def test_a_sampler_draws_by_the_weights_and_the_loss_is_the_plain_mean(tmp_path):
    trainer, weights = make_sampled(tmp_path, max_steps=1)
    model = trainer.model
    model.eval()  # no dropout; the Trainer switches it on again
    start = parameters_of(model)
    seen: list[Tensor] = []
    model.transformer.wte.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attn_pdrop = 0.0
    trainer.train()
    moved = trainer.balancer.task_weights
    assert moved.std() > 0.001
    expected = 0.9 * moved / moved.sum() + 0.1 / 3
    torch.testing.assert_close(weights.probabilities, expected)
    trained = parameters_of(model)

    model.load_state_dict(start, strict=False)
    (batch,) = batches_of(seen)
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    torch.testing.assert_close(trained, parameters_of(model))


@pytest.mark.parametrize("stop", [4, 6, 9])
def test_a_resumed_run_draws_what_the_whole_run_draws(stop, tmp_path):
    """In the first epoch of six steps, at its end, and in the second one; with dropout."""
    whole, _ = make_sampled(tmp_path / "whole", max_steps=11)
    whole.train()
    folder = tmp_path / "parts"
    first, _ = make_sampled(folder, max_steps=stop, save_strategy="steps", save_steps=stop)
    first.train()
    second, weights = make_sampled(folder, max_steps=11)
    second.train(resume_from_checkpoint=True)
    assert second.balancer.num_steps.item() == 11
    assert torch.equal(second.balancer.task_weights, whole.balancer.task_weights)
    assert torch.equal(weights.probabilities, whole.domain_sampler.weights.probabilities)
    expected = parameters_of(whole.model)
    assert all(torch.equal(each, expected[name]) for name, each in second.model.named_parameters())


def test_a_checkpoint_without_the_sampler_is_refused(tmp_path):
    trainer, _ = make_sampled(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    (tmp_path / "checkpoint-2" / SAMPLER_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="saved without `sampler`"):
        make_sampled(tmp_path)[0].train(resume_from_checkpoint=True)


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=2,
    )
    return BertForSequenceClassification(config)


def labelled() -> list[dict[str, Any]]:
    return [{**row, "labels": index % 2} for index, row in enumerate(rows())]


def test_a_classifier_has_a_loss_per_row_and_names_its_head(tmp_path):
    model = classifier()
    trainer = make_trainer(
        tmp_path,
        model,
        ExcessMTL(num_tasks=NUM_DOMAINS, feature_dim=-1),
        head=model.classifier,
        train_dataset=labelled(),
    )
    trainer.train()
    assert trainer.balancer.num_steps.item() == 6
    metrics = trainer.predict(labelled()).metrics
    given = labelled()
    with torch.no_grad():
        model.eval()
        logits = model(torch.stack([row["input_ids"] for row in given])).logits
        losses = cross_entropy(
            logits, torch.tensor([row["labels"] for row in given]), reduction="none"
        )
    expected = domain_losses(losses, torch.tensor([row["domain_id"] for row in given]), NUM_DOMAINS)
    found = [metrics[f"test_loss/{name}"] for name in NAMES]
    assert found == pytest.approx([float(each) for each in expected], rel=1e-5)  # type: ignore[arg-type]


def test_a_loss_of_ones_own_says_what_counts(tmp_path):
    def unreduced(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses = outputs["logits"][:, 0, 0] * 0 + torch.arange(1.0, len(labels) + 1)
        return losses, losses > 1

    trainer = make_trainer(
        tmp_path,
        make_model(),
        ExcessMTL(num_tasks=NUM_DOMAINS, feature_dim=-1),
        unreduced_loss=unreduced,
        per_device_eval_batch_size=4,
    )
    metrics = trainer.evaluate(rows(4))  # domains 0, 1, 2, 0
    assert [metrics[f"eval_loss/{name}"] for name in NAMES] == [4.0, 2.0, 3.0]


def test_a_batch_in_which_nothing_counts_changes_nothing(tmp_path):
    model = make_model()
    start = parameters_of(model)
    for each in (given := rows(4)):
        each["domain_id"] = -1
    trainer = make_trainer(
        tmp_path,
        model,
        ExcessMTL(num_tasks=NUM_DOMAINS, feature_dim=-1),
        max_steps=1,
        train_dataset=given,
    )
    trainer.train()
    assert trainer.balancer.num_steps.item() == 0
    assert all(torch.equal(each, start[name]) for name, each in model.named_parameters())


def without(name: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != name} for row in rows()]


def test_what_does_not_fit_is_refused_with_the_way_out(tmp_path):
    in_one_pass = ExcessMTL(num_tasks=NUM_DOMAINS, feature_dim=-1)
    for name in ("domain_id", "labels"):
        trainer = make_trainer(tmp_path, make_model(), in_one_pass, train_dataset=without(name))
        with pytest.raises(ValueError, match=f"'{name}' in every row of the data set, but"):
            trainer.train()
    with pytest.raises(ValueError, match=r"Name it: head=model\.classifier"):
        make_trainer(tmp_path, classifier(), in_one_pass)
    model = make_model()
    trainer = make_trainer(tmp_path, model, in_one_pass, head=model.transformer.h[0].mlp.act)
    trainer.head = nn.Identity()
    with pytest.raises(ValueError, match="`head` to run once in the forward pass, but it ran 0"):
        trainer.train()

    class Renamed(GPT2LMHeadModel):
        pass

    trainer = make_trainer(tmp_path, Renamed(model.config), in_one_pass)
    with pytest.raises(ValueError, match="nothing tells whether a position predicts its own"):
        trainer.train()
    weights = DomainWeights(2)
    with pytest.raises(ValueError, match="Expected a balancer with parameters for `sampler`"):
        make_trainer(tmp_path, model, in_one_pass, sampler=DomainSampler([0, 1], weights))
    with pytest.raises(ValueError, match="Expected `sampler` of 3 domains, but got 2"):
        balancer = Uniform(model.parameters(), num_tasks=NUM_DOMAINS)
        make_trainer(tmp_path, model, balancer, sampler=DomainSampler([0, 1], weights))
