"""One language model on six kinds of text, the bytes of one of them shuffled: which method keeps the clean ones good?

A byte-level transformer of 137,000 parameters learns from what lies on every machine where this package
is installed. Methods: equal weights; GroupDRO; DoReMi's excess loss, which needs a trained reference; ExcessMTL in one
backward pass, and by the weights of a sampler. Prints losses in bits per byte, weights, and tokens per second.

    python examples/domains.py --quick                      a minute on one CPU core
    python examples/domains.py --output runs/domains        a quarter of an hour; resumes where it stopped

docs/tutorials/domains.md walks through it.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import importlib.metadata
import io
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler

from excessmtl_ext import Balancer, ExcessMTL, GroupDRO, Uniform
from excessmtl_ext.domains import (
    DomainSampler,
    DomainWeights,
    domain_losses,
    move_weights,
    split_domains,
)

DOMAINS = ["docstrings", "Python", "C++ headers", "licences", "file lists", "shuffled"]
SHUFFLED = len(DOMAINS) - 1  # descriptions of packages, their bytes in random order
WINDOW = 64  # bytes that the model sees at once
COLUMNS = ("seed", "method", "domain", "bits_per_byte", "mean_weight")


# ---- text


def documents() -> dict[str, Iterable[str]]:
    """Texts of the standard library and of the installed packages, by kind."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = [
        path
        for path in sorted(library.rglob("*.py"))
        if not {"site-packages", "dist-packages", "test", "tests"} & set(path.parts)
    ]
    packages = sorted(importlib.metadata.distributions(), key=lambda each: each.metadata["Name"])
    headers = sorted((Path(torch.__file__).parent / "include").rglob("*.h"))
    licences = (
        Path(str(file.locate()))
        for package in packages
        for file in package.files or []
        if ".dist-info" in str(file) and any(w in file.name.lower() for w in ("licen", "notice"))
    )
    return {
        "docstrings": map(docstrings_of, modules[::2]),
        "Python": map(text_of, modules[1::2]),
        "C++ headers": map(text_of, headers),
        "licences": map(text_of, licences),
        "file lists": ("\n".join(map(str, each.files or [])) for each in packages),
        "shuffled": ((each.read_text("METADATA") or "") for each in packages),
    }


def text_of(path: Path) -> str:
    """A file's text, nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def docstrings_of(path: Path) -> str:
    """All docstrings of a module."""
    try:
        tree = ast.parse(text_of(path))
    except (SyntaxError, ValueError):
        return ""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners))
    return "\n\n".join(text for text in found if text)


@dataclass
class Text:
    """Windows of bytes [N, WINDOW + 1], and which domain [N] each is of."""

    windows: Tensor
    domain_ids: Tensor


def load_text(max_bytes: int) -> tuple[Text, Text]:
    """For training and for the test: at most ``max_bytes`` of each kind, whole documents in either part."""
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for texts in documents().values():
        # Each document once, in an order that depends on nothing but the documents; none fills a part alone.
        pieces = {text[: max_bytes // 60].encode() for text in texts if text.strip()}
        ordered = sorted(pieces, key=lambda piece: hashlib.blake2b(piece).digest())
        train, test = bytearray(), bytearray()
        for piece in ordered:
            (test if len(test) < max_bytes // 30 else train).extend(piece)
        for part, joined in zip(parts, (train[:max_bytes], test[: max_bytes // 30]), strict=True):
            number = len(joined) // (WINDOW + 1)
            if number < 8:
                raise ValueError(
                    f"Expected some {8 * WINDOW} bytes of each kind of text, but found {len(joined)} of one. Install "
                    "a few packages."
                )
            rows = torch.frombuffer(joined, dtype=torch.uint8)[: number * (WINDOW + 1)]
            part.append(rows.view(number, WINDOW + 1).long())
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        order = torch.rand(part[SHUFFLED].shape, generator=generator).argsort(dim=1)
        part[SHUFFLED] = part[SHUFFLED].gather(1, order)
    train, test = (
        Text(
            torch.cat(part),
            torch.repeat_interleave(torch.arange(len(part)), torch.tensor([len(p) for p in part])),
        )
        for part in parts
    )
    return train, test


# ---- model


class ByteModel(nn.Module):
    """A causal transformer over bytes."""

    def __init__(self, width: int = 64, num_layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Parameter(0.02 * torch.randn(WINDOW, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(WINDOW), False)

    def features(self, x: Tensor) -> Tensor:
        """What the head takes [B, WINDOW, width]."""
        z = self.layers(self.embedding(x) + self.position, mask=self.mask, is_causal=True)
        return self.norm(z)

    def losses(self, z: Tensor, y: Tensor) -> Tensor:
        """A loss per byte [B, WINDOW], in nats."""
        return cross_entropy(self.head(z).flatten(0, 1), y.flatten(), reduction="none").view_as(y)


# ---- methods


class Method:
    """How a batch becomes gradients; the base class: a balancer that weighs the domains' losses."""

    def __init__(self, model: ByteModel, make: Callable[..., Balancer] = Uniform) -> None:
        self.model = model
        self.balancer = make(model.parameters(), num_tasks=len(DOMAINS))
        self.sampling = DomainWeights(len(DOMAINS))  # equal, and they stay so

    def backward(self, x: Tensor, y: Tensor, ids: Tensor) -> None:
        """Fills ``.grad``."""
        losses = self.model.losses(self.model.features(x), y)
        self.balancer.backward(domain_losses(losses, ids, len(DOMAINS)))

    def weights(self) -> Tensor:
        """Shares of the domains [T], sum 1."""
        return self.balancer.task_weights


class Split(Method):
    """ExcessMTL in one backward pass: the balancer sits where the features go into the head."""

    def __init__(self, model: ByteModel) -> None:
        super().__init__(model)
        self.balancer = ExcessMTL(num_tasks=len(DOMAINS), feature_dim=-1)

    def backward(self, x: Tensor, y: Tensor, ids: Tensor) -> None:
        """Fills ``.grad``."""
        z = split_domains(self.balancer, self.model.features(x), ids)
        losses = domain_losses(self.model.losses(z, y), ids, len(DOMAINS))
        torch.stack([loss for loss in losses if loss is not None]).sum().backward()


class Sampled(Method):
    """ExcessMTL by the sampler: weights decide what is drawn; risks are estimated from the head alone."""

    def __init__(self, model: ByteModel) -> None:
        super().__init__(model)
        head = list(model.head.parameters())
        self.balancer = ExcessMTL(model.parameters(), num_tasks=len(DOMAINS), estimate_from=head)
        self.sampling.follow(self.balancer)

    def backward(self, x: Tensor, y: Tensor, ids: Tensor) -> None:
        """Fills ``.grad``."""
        losses = self.model.losses(self.model.features(x), y)
        move_weights(self.balancer, domain_losses(losses, ids, len(DOMAINS)))
        losses.mean().backward()


class ExcessLoss(Method):
    """Weights by the loss beyond that of a trained reference (Xie et al., DoReMi, NeurIPS 2023, Algorithm 1)."""

    def __init__(self, model: ByteModel, reference: ByteModel) -> None:
        super().__init__(model)
        self.reference = reference.requires_grad_(False)
        self.log_weights = torch.zeros(len(DOMAINS))

    def backward(self, x: Tensor, y: Tensor, ids: Tensor) -> None:
        """Fills ``.grad``."""
        losses = self.model.losses(self.model.features(x), y)
        beyond = losses.detach() - self.reference.losses(self.reference.features(x), y)
        for domain, excess in enumerate(domain_losses(beyond.clamp(min=0), ids, len(DOMAINS))):
            self.log_weights[domain] += 0.0 if excess is None else excess  # step size 1
        self.log_weights = (
            0.999 * self.log_weights.softmax(0) + 0.001 / len(DOMAINS)
        ).log()  # smoothed
        weights = self.log_weights.exp()
        by_domain = enumerate(domain_losses(losses, ids, len(DOMAINS)))
        torch.stack(
            [weights[t] * loss for t, loss in by_domain if loss is not None]
        ).sum().backward()

    def weights(self) -> Tensor:
        """Shares of the domains [T], sum 1."""
        return self.log_weights.exp()


METHODS: dict[str, Callable[[ByteModel, ByteModel], Method]] = {
    "Uniform": lambda model, _: Method(model),
    "GroupDRO": lambda model, _: Method(model, GroupDRO),
    "DoReMi's excess loss": ExcessLoss,
    "ExcessMTL, one pass": lambda model, _: Split(model),
    "ExcessMTL, sampler": lambda model, _: Sampled(model),
    "ExcessMTL, T passes": lambda model, _: Method(model, ExcessMTL),
}
BY_DEFAULT = list(METHODS)[:-1]


# ---- training


@dataclass
class Settings:
    """Sizes of a run."""

    num_steps: int = 600
    batch_size: int = 32
    learning_rate: float = 3e-3
    max_bytes: int = 1_000_000


def batches(text: Text, method: Method, seed: int, settings: Settings) -> Iterator[list[Tensor]]:
    """Inputs, targets and domains of every step."""
    number = settings.num_steps * settings.batch_size
    sampler = DomainSampler(text.domain_ids, method.sampling, num_samples=number, seed=seed)
    for rows in BatchSampler(sampler, settings.batch_size, drop_last=True):
        windows = text.windows[rows]
        yield [windows[:, :-1], windows[:, 1:], text.domain_ids[rows]]


def train(
    name: str, text: Text, seed: int, settings: Settings, reference: ByteModel
) -> tuple[ByteModel, list[float]]:
    """Trains from scratch; returns the model and the mean weight of each domain."""
    torch.manual_seed(seed)
    model = ByteModel()
    method = METHODS[name](model, reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    warmup = max(1, settings.num_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1 - step / settings.num_steps)
    )
    total, began = torch.zeros(len(DOMAINS), dtype=torch.float64), time.perf_counter()
    for step, batch in enumerate(batches(text, method, seed, settings), start=1):
        optimizer.zero_grad()
        method.backward(*batch)
        if nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
            optimizer.step()
        schedule.step()
        total += method.weights()
        if step % max(1, settings.num_steps // 10) == 0:
            left = (time.perf_counter() - began) * (settings.num_steps / step - 1)
            print(f"\rseed {seed}, {name}: step {step}, {left:.0f} s left ", end="", flush=True)
    print()
    return model, (total / settings.num_steps).tolist()


@torch.no_grad()
def bits_per_byte(model: ByteModel, text: Text) -> list[float]:
    """The loss of every domain."""
    found = torch.cat(
        [model.losses(model.features(w[:, :-1]), w[:, 1:]) for w in text.windows.split(256)]
    )
    losses = domain_losses(found, text.domain_ids, len(DOMAINS))
    return [float(loss) / 0.6931471805599453 for loss in losses if loss is not None]


def tokens_per_second(
    names: Sequence[str], text: Text, settings: Settings, num_rounds: int
) -> dict[str, float]:
    """Speed of a step of each method, medians over rounds in which each has its turn."""
    turns = {}
    for name in names:
        torch.manual_seed(0)
        model = ByteModel()
        method = METHODS[name](model, ByteModel())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        turns[name] = (method, optimizer, batches(text, method, 0, settings))
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(num_rounds):
        for name, (method, optimizer, drawn) in turns.items():
            batch = next(drawn)
            began = time.perf_counter()
            optimizer.zero_grad()
            method.backward(*batch)
            optimizer.step()
            times[name].append(time.perf_counter() - began)
    tokens = settings.batch_size * WINDOW
    return {name: tokens / statistics.median(each) for name, each in times.items()}


# ---- results

Rows = list[dict[str, str]]


def run(
    folder: Path, names: Sequence[str], seeds: Iterable[int], settings: Settings
) -> tuple[Rows, Rows]:
    """Trains what ``folder`` does not have yet; returns the tables of losses and of speeds."""
    folder.mkdir(parents=True, exist_ok=True)
    train_text, test_text = load_text(settings.max_bytes)
    scores, speeds = folder / "scores.csv", folder / "speeds.csv"
    for seed in seeds:
        reference, saved = ByteModel(), folder / f"reference_{seed}.pt"
        if saved.exists():
            reference.load_state_dict(torch.load(saved, weights_only=True))
        for name in dict.fromkeys(["Uniform", *names]):  # its model is DoReMi's reference
            if any((row["seed"], row["method"]) == (str(seed), name) for row in read(scores)):
                continue
            model, weights = train(name, train_text, seed, settings, reference)
            if name == "Uniform":
                reference = model
                torch.save(model.state_dict(), saved)
            losses = bits_per_byte(model, test_text)
            append(
                scores,
                COLUMNS,
                [
                    (seed, name, domain, f"{loss:.4f}", f"{weight:.4f}")
                    for domain, loss, weight in zip(DOMAINS, losses, weights, strict=True)
                ],
            )
    if not speeds.exists():
        rounds = min(40, settings.num_steps)
        measured = tokens_per_second(list(METHODS), train_text, settings, rounds)
        append(
            speeds,
            ("method", "tokens_per_second"),
            [(name, f"{speed:.0f}") for name, speed in measured.items()],
        )
    return read(scores), read(speeds)


def read(table: Path) -> Rows:
    """Rows of a table; none where there is no file."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def append(table: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Adds rows at once, so that a stopped run leaves whole ones."""
    text = io.StringIO()
    is_new = not table.exists()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows] if is_new else rows)
    with table.open("a", newline="") as file:
        file.write(text.getvalue())


def summary(scores: Rows, speeds: Rows) -> list[str]:
    """A Markdown table: losses of the clean domains, mean and range over the seeds; weight and speed."""
    speed = {row["method"]: float(row["tokens_per_second"]) for row in speeds}
    lines = [
        "| method | worst clean domain | mean of the clean | shuffled | weight of the shuffled | tokens per second |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["method"] for row in scores):
        runs: dict[str, dict[str, float]] = {}
        shares = []
        for row in scores:
            if row["method"] == name:
                runs.setdefault(row["seed"], {})[row["domain"]] = float(row["bits_per_byte"])
                if row["domain"] == DOMAINS[SHUFFLED]:
                    shares.append(float(row["mean_weight"]))
        clean = [[run[domain] for domain in DOMAINS[:SHUFFLED]] for run in runs.values()]
        cells = [
            spread([max(each) for each in clean]),
            spread([statistics.fmean(each) for each in clean]),
            spread([run[DOMAINS[SHUFFLED]] for run in runs.values()]),
            f"{statistics.fmean(shares):.3f}",
            f"{speed[name]:,.0f} ({speed[name] / speed['Uniform']:.2f} x Uniform)",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def spread(values: Sequence[float]) -> str:
    """Mean, and range where there are several."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def main(words: Sequence[str] | None = None) -> list[str]:
    """Runs the command line; returns the table that it prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/domains"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=BY_DEFAULT)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=Settings.num_steps)
    parser.add_argument("--quick", action="store_true", help="one seed of 100 small steps")
    given = parser.parse_args(words)
    settings = Settings(num_steps=given.steps)
    if given.quick:
        settings = Settings(num_steps=min(given.steps, 100), batch_size=24, max_bytes=200_000)
        given.seeds, given.output = 1, given.output.with_name(given.output.name + "_quick")
    table = summary(*run(given.output, given.methods, range(given.seeds), settings))
    print("\n".join(table))
    return table


if __name__ == "__main__":
    main()
