"""The migration page: every block runs, and what its table says of other code is so in that code."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from _paths import ROOT
from _published import published
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from excessmtl_ext import Balancer

PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")


def sections() -> dict[str, list[str]]:
    """The page's Python blocks by heading; the blocks of one heading belong together."""
    parts = re.split(r"^##+ (.*)$", PAGE, flags=re.MULTILINE)[1:]
    blocks = {
        title: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    }
    return {title: found for title, found in blocks.items() if found}


def import_or_skip(*packages: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what their own imports say
        for package in packages:
            pytest.importorskip(package, reason=f"{package} is not installed")


PACKAGES = {
    "From the authors' code or LibMTL": ["LibMTL"],
    "From torchjd": ["torchjd"],
    "In the trainer you have: Lightning": ["lightning.pytorch"],
    "In the trainer you have: Accelerate": ["accelerate"],
    "In the trainer you have: transformers": ["accelerate", "transformers"],
    "In the trainer you have: transformers, domains of one loss": ["accelerate", "transformers"],
}


def readers_names() -> dict[str, Any]:
    """What the page calls yours."""
    encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
    heads = nn.ModuleList([nn.Linear(8, 1) for _ in range(2)])
    inputs, targets = torch.randn(16, 6), torch.randn(16, 2)

    def make_head_loss(task: int):
        return lambda head, features, batch: (
            (head(features)[:, 0] - (1 + task) * batch[1][:, task]).square().mean()
        )

    head_losses = [make_head_loss(task) for task in range(2)]

    def task_losses(batch):
        features = encoder(batch[0])
        return [loss(head, features, batch) for head, loss in zip(heads, head_losses, strict=True)]

    return {
        "encoder": encoder,
        "heads": heads,
        "optimizer": torch.optim.SGD([*encoder.parameters(), *heads.parameters()], lr=0.01),
        "loader": DataLoader(TensorDataset(inputs, targets), batch_size=4),
        "task_losses": task_losses,
        "head_losses": head_losses,
    }


class DictModel(nn.Module):
    """What transformers' Trainer takes: keywords in, a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 1) for _ in range(2)])

    def forward(self, x, labels):
        features = self.encoder(x).tanh()
        outputs = torch.cat([head(features) for head in self.heads], dim=1)
        return {"losses": (outputs - labels).square().mean(0), "outputs": outputs}


def language_model_and_texts() -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    ids = torch.randint(9, (16, 6))
    rows = [{"input_ids": row, "labels": row, "domain_id": at % 2} for at, row in enumerate(ids)]
    return {"language_model": GPT2LMHeadModel(config), "texts": rows}


@pytest.fixture
def names(request, monkeypatch, tmp_path) -> dict[str, Any]:
    title = request.getfixturevalue("title")
    import_or_skip(*PACKAGES.get(title, []))
    monkeypatch.chdir(tmp_path)
    given = readers_names()
    if "LibMTL" in title:
        import LibMTL
        from integrations._libmtl_trainer import Trainer, settings

        if not hasattr(LibMTL.weighting, "ExcessMTL"):
            pytest.skip("this LibMTL has no ExcessMTL")
        monkeypatch.setattr(LibMTL, "Trainer", Trainer)
        rows = [(torch.randn(6), {"a": torch.randn(1), "b": torch.randn(1)}) for _ in range(16)]
        given |= {"settings": settings(["a", "b"]), "loader": DataLoader(rows, batch_size=4)}
    if "transformers" in title:
        rows = [{"x": torch.randn(6), "labels": torch.randn(2)} for _ in range(16)]
        given |= {"model": DictModel(), "dataset": rows}
    if "domains" in title:
        given |= language_model_and_texts()
    return given


def balancers_in(names: dict[str, Any]) -> list[Balancer]:
    """Every balancer that a block left in a name, or in a module under that name."""
    found: dict[int, Balancer] = {}
    for value in names.values():
        for owner in (
            value,
            getattr(value, "lightning_module", None),
            getattr(value, "balancer", None),
        ):
            if isinstance(owner, nn.Module):
                found |= {id(m): m for m in owner.modules() if isinstance(m, Balancer)}
    return list(found.values())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings(
    "ignore:.*(many workers|litlogger|logging interval|tensorboard|pin_memory)"
)
@pytest.mark.parametrize("title", sections())
def test_every_block_of_the_page_runs_and_moves_its_weights(title, names):
    try:
        for block in sections()[title]:
            exec(compile(block, "docs/migration.md", "exec"), names)
    finally:
        if "Accelerate" in title or "transformers" in title:
            from accelerate.state import AcceleratorState, GradientState

            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
    used = [balancer for balancer in balancers_in(names) if balancer.num_steps > 0]
    assert used
    for balancer in used:
        assert balancer.num_steps.item() == 4
        assert balancer.task_weights.std() > 0


def test_the_page_has_the_sections_that_need_packages():
    assert set(PACKAGES) < set(sections())
    assert PAGE.count("```python") == sum(len(blocks) for blocks in sections().values())


# ---- the table's column on the authors' code and LibMTL


class Regression(nn.Module):
    """One encoder and two heads, with losses whose encoder gradients can be switched off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.heads = (
            nn.Linear(6, 8),
            nn.ModuleList([nn.Linear(8, 1) for _ in range(2)]),
        )

    def losses(self, scales=(1.0, 1.0)):
        features = self.encoder(torch.linspace(-1, 1, 24).reshape(4, 6))
        return [
            (head(features).square().mean() + task) * scale
            for task, (head, scale) in enumerate(zip(self.heads, scales, strict=True))
        ]

    def head_grads(self) -> list[torch.Tensor]:
        return [head.weight.grad.clone() for head in self.heads]  # type: ignore[union-attr]


@pytest.fixture
def libmtl_weighting():
    """LibMTL's own ExcessMTL over a Regression, without its Trainer."""
    import_or_skip("LibMTL")
    import LibMTL

    if not hasattr(LibMTL.weighting, "ExcessMTL"):
        pytest.skip("this LibMTL has no ExcessMTL")

    class Bare(LibMTL.weighting.ExcessMTL):
        def __init__(self, model: Regression) -> None:
            super().__init__()
            self.model, self.encoder = model, model.encoder
            self.task_num, self.rep_grad, self.device = 2, False, torch.device("cpu")
            self.init_param()

        def get_share_params(self):
            return self.encoder.parameters()

        def zero_grad_share_params(self):
            self.encoder.zero_grad()

        def step(self, scales=(1.0, 1.0)) -> torch.Tensor:
            self.zero_grad()
            losses = torch.stack(self.model.losses(scales))
            return torch.from_numpy(self.backward(losses, robust_step_size=0.5)).clone()

    return Bare


def test_libmtl_weighs_heads_and_sums_to_the_number_of_tasks(libmtl_weighting):
    theirs = libmtl_weighting(Regression())
    assert theirs.step().tolist() == [1.0, 1.0]  # the first step
    unweighted = theirs.model.head_grads()
    weights = theirs.step((1.0, 0.1))
    assert weights.sum().item() == pytest.approx(2.0)
    assert weights[0] != weights[1]
    scaled = zip(theirs.model.head_grads(), unweighted, weights, (1.0, 0.1), strict=True)
    for grad, before, weight, scale in scaled:
        torch.testing.assert_close(grad, before * weight * scale)


def test_libmtl_never_recovers_from_a_zero_baseline_or_a_nan_where_we_do(libmtl_weighting):
    for bad in (0.0, float("nan")):
        theirs, model = libmtl_weighting(Regression()), Regression()
        ours = published(model.encoder.parameters(), num_tasks=2, robust_step_size=0.5)
        for scales in ((1.0, bad), (1.0, 1.0), (1.0, 1.0)):
            weights = theirs.step(scales)
            ours.backward(model.losses(scales))
        assert weights.isnan().all()
        assert ours.task_weights.isfinite().all()


def test_libmtl_does_not_save_its_weights(libmtl_weighting):
    theirs = libmtl_weighting(Regression())
    theirs.step()
    theirs.step((1.0, 0.1))
    assert not [name for name in theirs.state_dict() if not name.startswith(("encoder", "model"))]


# ---- the table's column on torchjd; that it cannot load its state is in integrations/test_torchjd.py


@pytest.fixture
def torchjd_weighting():
    import_or_skip("torchjd")
    from torchjd.aggregation import ExcessMTLWeighting

    return ExcessMTLWeighting


def test_torchjd_moves_the_weights_in_the_first_step_by_the_raw_risk(torchjd_weighting):
    grads = torch.randn(2, 50) * torch.tensor([[1.0], [2.0]])
    theirs, ours = torchjd_weighting(), published(num_tasks=2)
    assert theirs.robust_step_size == 1.0
    assert ours.robust_step_size == 0.01
    assert theirs(grads)[1] > 0.99
    assert torchjd_weighting()(grads / 100)[1] < 0.7  # the same tasks in other units
    assert torchjd_weighting(n_warmup_steps=1)(grads).tolist() == [0.5, 0.5]
    assert ours.update_weights(grads).tolist() == [0.5, 0.5]


def test_torchjd_gives_all_weight_to_a_task_whose_baseline_was_zero(torchjd_weighting):
    grads = torch.randn(2, 50)
    theirs, ours = (
        torchjd_weighting(0.5, n_warmup_steps=1),
        published(num_tasks=2, robust_step_size=0.5),
    )
    for matrix in (grads * torch.tensor([[1.0], [0.0]]), grads):
        weights = theirs(matrix)
        ours.update_weights(matrix)
    assert weights.tolist() == [0.0, 1.0]
    assert 0.3 < ours.task_weights[1] < 0.7


def test_torchjd_never_recovers_from_a_nan_where_we_do(torchjd_weighting):
    grads = torch.randn(2, 50)
    bad = grads.clone()
    bad[0, 0] = float("nan")
    theirs, ours = torchjd_weighting(0.01), published(num_tasks=2)
    for matrix in (grads, bad, grads):
        weights = theirs(matrix)
        ours.update_weights(matrix)
    assert weights.isnan().all()
    assert ours.task_weights.isfinite().all()
    assert ours.num_skipped_steps.item() == 1


def test_torchjd_keeps_its_state_in_the_type_of_the_gradients(torchjd_weighting):
    grads = torch.randn(2, 50, dtype=torch.bfloat16)
    theirs, ours = torchjd_weighting(), published(num_tasks=2)
    theirs(grads)
    ours.update_weights(grads)
    assert theirs._sq_grad_sum.dtype == torch.bfloat16
    assert ours.sq_grad_sum.dtype == torch.float32
