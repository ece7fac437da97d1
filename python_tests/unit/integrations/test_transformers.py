"""Hugging Face transformers: BalancedTrainer on a tiny BERT with two heads, randomly initialised."""

from __future__ import annotations

import itertools

import pytest
import torch
from _published import published
from torch import nn

from excessmtl_ext import ExcessMTL, Uniform

pytest.importorskip(
    "accelerate", reason="accelerate, which transformers' Trainer needs, is missing"
)
pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

from excessmtl_ext.integrations.transformers import STATE_FILE, BalancedTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument"),
]

TASKS = ["topic", "length"]


class TwoHeads(PreTrainedModel):
    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.topic = nn.Linear(config.hidden_size, 3)
        self.length = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, topic_labels=None, length_labels=None):
        features = self.encoder(input_ids).last_hidden_state[:, 0]
        topic, length = self.topic(features), self.length(features)[:, 0]
        losses = [
            nn.functional.cross_entropy(topic, topic_labels),
            nn.functional.mse_loss(length, length_labels),
        ]
        return {"losses": losses, "topic": topic, "length": length}


def make_model() -> TwoHeads:
    torch.manual_seed(0)
    return TwoHeads(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
            hidden_dropout_prob=0.1,
        )
    )


def rows(count: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "input_ids": torch.randint(20, (6,), generator=generator),
            "topic_labels": torch.randint(3, (), generator=generator),
            "length_labels": 3 * torch.randn((), generator=generator),
        }
        for _ in range(count)
    ]


def make_trainer(folder, model=None, balancer=None, **options) -> BalancedTrainer:
    model = make_model() if model is None else model
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
        **options,
    }
    return BalancedTrainer(
        model=model,
        args=TrainingArguments(
            str(folder),
            label_names=["topic_labels", "length_labels"],
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            **settings,
        ),
        train_dataset=rows(),
        eval_dataset=rows(8),
        balancer=balancer
        or published(model.encoder.parameters(), num_tasks=2, robust_step_size=0.5),
        task_names=TASKS,
    )


def parameters_of(trainer: BalancedTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def test_training_is_that_of_a_loop_of_ones_own(tmp_path):
    model = make_model()
    model.config.hidden_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    start = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[torch.Tensor] = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    trained = parameters_of(trainer)

    batches, by_ids = list(seen), {tuple(row["input_ids"].tolist()): row for row in rows()}
    model.load_state_dict(start)
    balancer = published(model.encoder.parameters(), num_tasks=2, robust_step_size=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for input_ids in batches:
        batch = [by_ids[tuple(ids.tolist())] for ids in input_ids]
        optimizer.zero_grad()
        balancer.backward(
            model(**{name: torch.stack([row[name] for row in batch]) for name in batch[0]})[
                "losses"
            ]
        )
        optimizer.step()
    assert len(batches) == 6
    torch.testing.assert_close(
        trainer.balancer.task_weights, balancer.task_weights, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(trained, parameters_of(trainer))


def test_accumulation_moves_the_weights_per_batch_and_divides_the_gradient(tmp_path):
    """Half of the gradient comes from each of two equal batches, so the update is that of one such batch."""
    plain, halves = (make_model() for _ in range(2))
    for module in [*plain.modules(), *halves.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = {"per_device_train_batch_size": 16, "max_steps": 1}
    one = make_trainer(tmp_path, plain, Uniform(plain.encoder.parameters(), num_tasks=2), **batch)
    one.train()
    two = make_trainer(
        tmp_path,
        halves,
        Uniform(halves.encoder.parameters(), num_tasks=2),
        gradient_accumulation_steps=2,
        **{**batch, "per_device_train_batch_size": 8},
    )
    two.train()
    assert (one.balancer.num_steps.item(), two.balancer.num_steps.item()) == (1, 2)
    torch.testing.assert_close(parameters_of(two), parameters_of(one), rtol=1e-4, atol=1e-6)


def test_the_log_holds_the_weights_of_every_training_row(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "task_weight/topic" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    assert [logged[-1][f"task_weight/{name}"] for name in TASKS] == pytest.approx(
        trainer.balancer.task_weights.tolist()
    )
    assert logged[0]["task_weight/topic"] == 0.5 != logged[-1]["task_weight/topic"]
    assert all("loss" in row for row in logged)


def test_evaluation_reports_the_plain_mean_and_moves_no_weight(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    before = trainer.balancer.task_weights.clone()
    prediction = trainer.predict(rows(8))
    expected = []
    with torch.no_grad():
        trainer.model.eval()
        for row in rows(8):
            output = trainer.model(**{name: value[None] for name, value in row.items()})
            expected.append(torch.stack(output["losses"]).mean())
    assert prediction.metrics["test_loss"] == pytest.approx(
        torch.stack(expected).mean().item(), rel=1e-5
    )
    assert [part.shape for part in prediction.predictions] == [(8, 3), (8,)]
    assert torch.equal(trainer.balancer.task_weights, before)
    assert trainer.balancer.num_steps.item() == 6


@pytest.mark.parametrize("resume", ["path", True])
def test_a_resumed_run_continues_bit_for_bit(resume, tmp_path):
    """With dropout, so that the random state counts too."""
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    folder = tmp_path / "halves"
    first = make_trainer(folder, max_steps=3, save_strategy="steps", save_steps=3)
    first.train()
    assert (folder / "checkpoint-3" / STATE_FILE).exists()
    second = make_trainer(folder)
    second.train(str(folder / "checkpoint-3") if resume == "path" else resume)
    assert second.balancer.num_steps.item() == 6
    assert torch.equal(second.balancer.task_weights, whole.balancer.task_weights)
    expected = parameters_of(whole)
    assert all(torch.equal(value, expected[name]) for name, value in parameters_of(second).items())


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    (tmp_path / "checkpoint-2" / STATE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"not saved by a BalancedTrainer"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_an_output_without_losses_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.losses_key = "task_losses"
    with pytest.raises(
        ValueError, match="'task_losses', the losses of the 2 tasks, but got 'losses'"
    ):
        trainer.train()


def test_a_task_without_labels_is_left_out(tmp_path):
    class Partial(TwoHeads):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            return {**output, "losses": [output["losses"][0], None]}

    torch.manual_seed(0)
    model = Partial(make_model().config)
    trainer = make_trainer(tmp_path, model, max_steps=2)
    trainer.train()
    assert model.length.weight.grad is None
    assert trainer.balancer.num_task_steps.tolist() == [2, 0]
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("method", [ExcessMTL, Uniform])
def test_a_nan_label_costs_one_step_and_not_the_model(method, max_grad_norm, tmp_path):
    model = make_model()
    balancer = method(model.encoder.parameters(), num_tasks=2)
    # One epoch: each of the 16 rows is in one of four batches.
    trainer = make_trainer(tmp_path, model, balancer, max_steps=4, max_grad_norm=max_grad_norm)
    trainer.train_dataset[5]["length_labels"] = torch.tensor(float("nan"))
    seen = [parameters_of(trainer)]

    class Recorder(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(parameters_of(trainer))

    trainer.add_callback(Recorder())
    trainer.train()
    moved = [
        any(not torch.equal(old[name], new[name]) for name in old)
        for old, new in itertools.pairwise(seen)
    ]
    assert sorted(moved) == [False, True, True, True]
    assert all(value.isfinite().all() for value in seen[-1].values())


def test_model_init_is_refused(tmp_path):
    model = make_model()
    with pytest.raises(ValueError, match="Expected `model`, but got `model_init`"):
        BalancedTrainer(
            model_init=lambda: model,
            args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
            balancer=Uniform(model.encoder.parameters(), num_tasks=2),
        )
