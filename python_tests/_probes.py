"""Drawn probes: a few steps of ExcessMTL in some mode, on some kind of graph, through events that users meet.

Each step is compared with the method by hand in float64 (:mod:`_by_hand`), or is a documented error that changes
nothing, to the bit.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from _asserts import assert_equal_bits
from _by_hand import ByHand, Row, Setting
from _probe_draw import ONE_PASS, Probe
from _probe_world import (
    REFUSABLE,
    Net,
    SpoiledGradient,
    batch,
    twin_of,
)
from torch import Tensor

from excessmtl_ext import ExcessMTL


class Refused(Exception):
    """A documented error that has changed nothing."""


class Run:
    """A probe under way: the network and its balancer, and the same by hand."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        torch.manual_seed(probe.seed)
        self.net = Net(probe.num_tasks, probe.graph).to(probe.dtype)
        self.balancer = self.made()
        self.hand = self.by_hand_from_the_start()
        self.units = [1.0] * probe.num_tasks
        self.calls = 0
        self.waiting = list(range(probe.num_tasks))

    def made(self) -> Any:
        """Returns a balancer of the probe's options."""
        options = dict(self.probe.options)
        if self.probe.mode in ("features", "split"):
            options["estimate_from"] = "features"
        if "subset" in self.probe.mode:
            options["estimate_from"] = list(self.net.second.parameters())
        return ExcessMTL(self.net.shared(), num_tasks=self.probe.num_tasks, **options)

    def by_hand_from_the_start(self) -> Any:
        """Returns the method by hand, before its first step."""
        shapes = [each.shape for each in self.estimated()]
        return ByHand(self.probe.num_tasks, shapes, self.setting())

    def setting(self) -> Setting:
        options = self.probe.options
        return Setting(
            step_size=options.get("robust_step_size"),
            fisher=options.get("fisher", "linear"),
            eps=options.get("eps", 2.0**-126),
            momentum=options["gradient_momentum"],
            total=1.0 if options["weight_scale"] == "simplex" else float(self.probe.num_tasks),
            sizes=options["combine"] is None,
            warmup=options["num_warmup_steps"],
            max_log_ratio=options.get("max_log_ratio", 0.2),
            floor=options["min_weight"],
            priorities=options.get("priorities"),
        )

    def estimated(self) -> list[Tensor]:
        """Returns tensors of the shapes of those whose gradients the estimate takes."""
        if self.probe.mode in ("features", "split"):
            return [torch.zeros(self.net.second.out_features, self.net.second.out_features)]
        if "subset" in self.probe.mode:
            return list(self.net.second.parameters())
        return [each for each in self.net.shared() if each.requires_grad]

    # ---- what may not change

    def bits(self) -> list[Tensor | None]:
        """Returns copies of state and gradients; not of heads where these are written while the passes run."""
        state = self.balancer.state_dict()
        mode = self.probe.mode
        writes_heads = mode in ("backward", "scalar", "streaming", "batched")
        grads = [each.grad for each in (self.net.shared() if writes_heads else self.net.used())]
        state_bits = [state[name].clone() for name in sorted(state)]
        return [*state_bits, *[None if g is None else _dense(g).clone() for g in grads]]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Asserts that state, gradients and counts are in the end what they were."""
        before, calls = self.bits(), self.balancer.num_calls
        yield
        assert_equal_bits(self.bits(), before)
        assert self.balancer.num_calls == calls

    # ---- the losses

    def forward(
        self,
        number: int,
        present: list[int],
        events: dict[str, int],
        *,
        net: Net | None = None,
        scale: float = 1.0,
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
        """Returns features, losses and outputs of a step; of the twin where ``net`` is one."""
        probe, is_plain = self.probe, net is not None
        network = self.net if net is None else net
        dtype = torch.float64 if is_plain else probe.dtype
        inputs, words, targets = batch(1000 * probe.seed + number, probe.num_tasks, probe.dtype)
        inputs, targets = inputs.to(dtype), targets.to(dtype)
        z = network.encode(inputs, words, is_plain=is_plain)
        copies = [z] * probe.num_tasks
        if probe.mode == "split" and not is_plain:
            given = {"grad_scale": scale} if scale != 1.0 else {}
            copies = list(self.balancer.split(z, **given))
        outs = network.outputs(copies, words)
        if not is_plain and ("nan" in events or "inf" in events):
            task = events["nan" if "nan" in events else "inf"]
            value = float("nan") if "nan" in events else float("inf")
            outs[task] = SpoiledGradient.apply(outs[task], value)
        losses: list[Tensor | None] = []
        for task, out in enumerate(outs):
            loss = (out - targets[task]).square().mean() * self.units[task]
            if events.get("zero") == task:
                loss = loss * 0.0
            if events.get("no labels") == task:
                loss = out[:0].square().mean() if not is_plain else loss * 0.0
            losses.append(loss if task in present else None)
        return z, losses, outs

    def by_hand(
        self, number: int, present: list[int], events: dict[str, int]
    ) -> tuple[list[Row | None], list[Row | None]]:
        """Returns per task the gradients of all parameters in use, and those that the estimate takes; None: absent."""
        twin = twin_of(self.net)
        z, losses, _ = self.forward(number, present, events, net=twin)
        used = [each for each in twin.used() if each.requires_grad]
        every: list[Row | None] = []
        estimate: list[Row | None] = []
        for loss in losses:
            if loss is None:
                every.append(None)
                estimate.append(None)
                continue
            grads = torch.autograd.grad(loss, [*used, z], retain_graph=True, allow_unused=True)
            found = dict(zip(map(id, used), grads[:-1], strict=True))
            every.append([found.get(id(each)) for each in twin.used()])
            if self.probe.mode in ("features", "split"):
                of_z = grads[-1]
                estimate.append([None if of_z is None else of_z.T @ z.detach()])
            elif "subset" in self.probe.mode:
                estimate.append([found.get(id(each)) for each in twin.second.parameters()])
            else:
                names = [
                    of_twin
                    for of_twin, of_net in zip(twin.shared(), self.net.shared(), strict=True)
                    if any(of_net is each for each in self.given())
                ]
                estimate.append([found.get(id(each)) for each in names])
        return every, estimate

    def given(self) -> list[Tensor]:
        """Returns the shared parameters that the balancer holds state for."""
        assert self.balancer.shared_parameters is not None
        return list(self.balancer.shared_parameters)

    # ---- the verbs

    def verb(self, z: Tensor, losses: list[Tensor | None], scale: float) -> None:
        """Takes a step of the mode; who is given the scale multiplies by it, but for those who give gradients."""
        mode, balancer = self.probe.mode, self.balancer
        if mode in ("split", "given lists", "given matrix"):
            losses = [None if loss is None else loss * scale for loss in losses]
        given: dict[str, Any] = {} if scale == 1.0 else {"grad_scale": scale}
        if mode in ("batched", "features"):
            balancer.backward(losses, features=z, **given)
        elif mode == "split":
            there = [loss for loss in losses if loss is not None]
            sum(there[1:], there[0]).backward()  # type: ignore[no-untyped-call]
        elif mode == "scalar":
            (balancer(losses) * scale).backward()
        elif mode == "streaming":
            there = self.order([task for task, loss in enumerate(losses) if loss is not None])
            for task in there:
                loss = losses[task]
                assert loss is not None
                balancer.accumulate(task, loss, retain_graph=task != there[-1], **given)
            balancer.finish()
        elif mode.startswith("given"):
            self.update_weights(losses, given)
        else:
            balancer.backward(losses, **given)

    def update_weights(self, losses: list[Tensor | None], given: dict[str, Any]) -> None:
        """Hands over gradients, as lists or as a matrix."""
        shared = self.given()
        rows: list[list[Tensor | None]] = []
        trains = [each for each in shared if each.requires_grad]
        for loss in losses:
            found: dict[int, Tensor | None] = {}
            if loss is not None:
                grads = torch.autograd.grad(loss, trains, retain_graph=True, allow_unused=True)
                found = dict(zip(map(id, trains), grads, strict=True))
            rows.append([] if loss is None else [found.get(id(each)) for each in shared])
        is_whole = all(row and all(g is not None and not g.is_sparse for g in row) for row in rows)
        if self.probe.mode == "given matrix" and is_whole:
            flat = [torch.cat([g.reshape(-1) for g in row if g is not None]) for row in rows]
            self.balancer.update_weights(torch.stack(flat), **given)
        else:
            self.balancer.update_weights(rows, **given)

    # ---- a step

    def step(self, number: int) -> None:
        """Takes step ``number`` with its events, and compares everything with the method by hand."""
        probe, balancer = self.probe, self.balancer
        events = dict(probe.events[number])
        for name in ("save", "safetensors", "deepcopy", "pickle"):
            if name in events:
                self.reload(name)
                balancer = self.balancer
        if "unit" in events and not (
            probe.dtype == torch.float32 and "robust_step_size" in probe.options
        ):
            draw = random.Random(f"{probe.seed} {number}")
            self.units[events["unit"]] *= 10.0 ** draw.choice((-6, -3, 3, 6))
        present = self.present(number, events)
        moves = self.calls % probe.options["update_every"] == 0 and "hold" not in events
        for name in ("nan", "inf"):
            if name in events and (not moves or events[name] not in self.inspected(present)):
                del events[name]
        scale = 1024.0 if "loss scale" in events else 1.0
        if "keep grad" not in events:
            for parameter in self.net.used():
                parameter.grad = None
        with self.frozen(events):
            self.look(number, present, events)
            every, estimate = self.by_hand(number, present, events)
            before = [
                None if p.grad is None else _dense(p.grad).double().clone() for p in self.net.used()
            ]
            state = {name: value.clone() for name, value in balancer.state_dict().items()}
            is_bad = "nan" in events or "inf" in events
            try:
                self.take(number, present, events, scale)
                if is_bad and probe.options["nonfinite"] == "raise":
                    raise AssertionError("a gradient that is not finite raised nothing")
            except FloatingPointError:
                assert is_bad
                assert probe.options["nonfinite"] == "raise"
                self.calls -= 1
        if not present:
            return
        if is_bad:
            self.calls += 1
            self.check_skipped(events, present, estimate, state)
            for parameter in self.net.used():
                parameter.grad = None
            return
        if "hold" not in events:
            self.calls += 1
        assert not bool(balancer.found_nonfinite.any())
        factors, head_factors = self.advance(present, estimate, moves=moves)
        self.compare(before, every, factors, head_factors, scale)
        self.descend()

    def present(self, number: int, events: dict[str, int]) -> list[int]:
        tasks = list(range(self.probe.num_tasks))
        late = self.probe.late
        if "nobody" in events:
            return []
        if "alone" in events:
            return [events["alone"]]
        if late is not None and number < late:
            if self.probe.seed % 2:
                tasks.remove(0)
            else:
                events.setdefault("zero", 0)
        if events.get("absent") in tasks:
            tasks.remove(events["absent"])
        return tasks

    def inspected(self, present: list[int]) -> list[int]:
        """Returns the tasks whose gradients the step looks at."""
        if not self.probe.mode.startswith("rotation"):
            return present
        num = self.probe.options["tasks_per_step"]
        turn = [task for task in self.waiting if task in present][:num]
        return turn or present[:num]

    @contextmanager
    def frozen(self, events: dict[str, int]) -> Iterator[None]:
        """Freezes one of the shared parameters for a step."""
        if "freeze" not in events:
            yield
            return
        given = self.given()
        parameter = given[events["freeze"] % len(given)]
        parameter.requires_grad_(False)
        parameter.grad = None
        try:
            yield
        finally:
            parameter.requires_grad_(True)

    def look(self, number: int, present: list[int], events: dict[str, int]) -> None:
        """What reads only, and what is refused."""
        balancer = self.balancer
        if "peek" in events:
            with self.unchanged():
                assert repr(balancer)
                assert balancer.task_weights.sum().item() == pytest.approx(balancer.weight_total)
                assert balancer.effective_num_tasks.item() > 0
                balancer.state_dict()
        if "validate" in events and present:
            with self.unchanged(), torch.no_grad():
                _, losses, _ = self.forward(number, present, {})
                with pytest.raises(ValueError, match="no_grad"):
                    balancer(losses)
        if "error" in events and present:
            _, losses, _ = self.forward(number, present, {})
            first = losses[present[0]]
            assert first is not None
            wrong = self.wrong_calls(losses, first)
            call = wrong[self.probe.seed % len(wrong)]
            with (
                self.unchanged(),
                pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)),
            ):
                call()

    def wrong_calls(self, losses: list[Tensor | None], first: Tensor) -> list[Callable[[], Any]]:
        """Returns calls that are errors."""
        balancer, num = self.balancer, len(losses)
        return [
            lambda: balancer.backward(losses[1:]),
            lambda: balancer.backward([first.detach()] * num),
            lambda: balancer.backward([first.expand(2)] * num),
            lambda: balancer.accumulate(num, first),
            lambda: balancer.update_weights([[torch.ones(3)]] * (num + 1)),
            lambda: balancer.load_state_dict({}),
        ]

    def take(self, number: int, present: list[int], events: dict[str, int], scale: float) -> None:
        """Takes the step on the network, after one that is interrupted where the events say so."""
        mode = self.probe.mode
        if not present and mode in ("split", "streaming"):
            return
        if "interrupt" in events and present and not mode.startswith("given"):
            self.interrupt(number, present, events, scale)
        z, losses, _ = self.forward(number, present, events, scale=scale)
        before = self.bits()
        try:
            with self.balancer.hold_weights() if "hold" in events else nullcontext():
                self.verb(z, losses, scale)
        except ValueError as error:
            if self.probe.graph not in REFUSABLE and not self.may_refuse():
                raise
            assert_equal_bits(self.bits(), before)
            raise Refused(str(error)) from None

    def may_refuse(self) -> bool:
        """Whether the graph cannot be cut at the features, as these modes need."""
        return self.probe.mode in ("features", "batched") and self.probe.graph == "tied"

    def interrupt(
        self, number: int, present: list[int], events: dict[str, int], scale: float
    ) -> None:
        """Ctrl-C, or an error, in the backward pass of a task."""
        task = events["interrupt"] if events["interrupt"] in present else present[0]
        if self.probe.mode == "streaming":
            task = self.order(present)[0]
        kind = KeyboardInterrupt if self.probe.seed % 2 else OSError

        def strike(grad: Tensor) -> None:
            raise kind("in a pass")

        z, losses, outs = self.forward(number, present, events, scale=scale)
        outs[task].register_hook(strike)
        before = self.bits()
        grads = [None if p.grad is None else p.grad.clone() for p in self.net.used()]
        try:
            with pytest.raises(kind):
                self.verb(z, losses, scale)
        except ValueError as error:
            if self.probe.graph not in REFUSABLE and not self.may_refuse():
                raise
            raise Refused(str(error)) from None
        after = self.bits()
        if self.probe.mode == "split":  # whose gradients are written by autograd itself
            num = len(self.balancer.state_dict())
            before, after = before[:num], after[:num]
        assert_equal_bits(after, before)
        for parameter, grad in zip(self.net.used(), grads, strict=True):
            parameter.grad = grad

    # ---- the same by hand

    def advance(
        self, present: list[int], estimate: list[Row | None], *, moves: bool
    ) -> tuple[list[list[float]], list[float]]:
        """Takes the step by hand; returns [T][L] factors of the gradients, and those of heads."""
        hand, mode = self.hand, self.probe.mode
        num_tensors = len(self.given())
        if not moves:
            return [[f] * num_tensors for f in hand.pass_factors()], hand.weights()
        if mode.startswith("rotation"):
            self.rotate(present, estimate)
        else:
            for task in present:
                hand.take(task, estimate[task] or [])
            hand.move(present)
            hand.add_signal()
        factors = hand.tensor_factors()
        if mode in ONE_PASS:
            factors = [[f] * num_tensors for f in hand.pass_factors()]
        head_factors = hand.weights()
        if not mode.startswith("rotation"):
            hand.end_lone_step(present)
        return factors, head_factors

    def rotate(self, present: list[int], estimate: list[Row | None]) -> None:
        hand, num = self.hand, self.probe.options["tasks_per_step"]
        everyone = list(range(self.probe.num_tasks))
        turn = [task for task in self.waiting if task in present][:num]
        served = None
        if not turn:
            served = [task for task in everyone if task not in self.waiting]
            self.waiting = list(everyone)
            turn = present[:num]
        self.waiting = [task for task in self.waiting if task not in turn]
        for task in present:
            is_seen = self.probe.graph not in ("reentrant", "hidden function")
            if is_seen and task not in turn and not any(hand.tasks[task].num_sizes):
                hand.measure(task, estimate[task] or [])
        if served is not None:
            hand.move(served)
        for task in turn:
            hand.take(task, estimate[task] or [])
        if not self.waiting:
            hand.move(everyone)
            self.waiting = list(everyone)
        hand.add_signal()

    # ---- what is asserted

    def check_skipped(
        self,
        events: dict[str, int],
        present: list[int],
        estimate: list[Row | None],
        state: dict[str, Tensor],
    ) -> None:
        """Asserts that a step that does not count has changed nothing."""
        task = events["nan"] if "nan" in events else events["inf"]
        balancer = self.balancer
        assert bool(balancer.found_nonfinite[task])
        if self.probe.options["nonfinite"] == "skip" and not self.probe.mode.startswith("given"):
            grads = [p.grad for p in self.net.shared() if p.grad is not None]
            assert not all(bool(_dense(grad).isfinite().all()) for grad in grads)
        if self.probe.mode == "streaming":
            for other in present:
                if other != task:
                    self.hand.take(other, estimate[other] or [])
                    self.hand.tasks[other].new_signal = 0.0
        else:
            after = balancer.state_dict()
            for name, value in state.items():
                if name in after and after[name].shape == value.shape and not _counts_skips(name):
                    assert_equal_bits([after[name]], [value])
        self.compare_weights()

    def compare(
        self,
        before: list[Tensor | None],
        every: list[Row | None],
        factors: list[list[float]],
        head_factors: list[float],
        scale: float,
    ) -> None:
        """Asserts that weights and gradients are those by hand."""
        self.compare_weights()
        if self.probe.mode.startswith("given"):
            return
        places = {id(each): place for place, each in enumerate(self.given())}
        weighs_heads = self.probe.options.get("head_weighting") == "task_weights"
        is_wide = self.probe.dtype == torch.float64
        there = [grad for row in every if row is not None for grad in row if grad is not None]
        rounding = (1e-14 if is_wide else 1e-6) * scale * max(float(g.abs().max()) for g in there)
        for index, parameter in enumerate(self.net.used()):
            expected = torch.zeros(parameter.shape, dtype=torch.float64)
            largest = 0.0
            for task, row in enumerate(every):
                grad = None if row is None else row[index]
                if grad is None:
                    continue
                factor = head_factors[task] if weighs_heads else 1.0
                if id(parameter) in places:
                    factor = factors[task][places[id(parameter)]]
                expected += scale * factor * grad
                largest = max(largest, float((scale * factor * grad).abs().max()))
            was = before[index]
            if was is not None:
                expected += was
                largest = max(largest, float(was.abs().max()))
            actual = parameter.grad
            actual = torch.zeros_like(expected) if actual is None else _dense(actual).double()
            tolerance = (1e-8 if is_wide else 3e-4) * largest + rounding + 1e-290
            error = float((actual - expected).abs().max())
            assert error <= tolerance, (
                f"`.grad` of parameter {index} is off by {error}: {actual} for {expected}"
            )

    def compare_weights(self) -> None:
        expected = torch.tensor(self.hand.weights(), dtype=torch.float64)
        tolerance = 1e-7 if self.probe.dtype == torch.float64 else 1e-3
        torch.testing.assert_close(self.balancer.task_weights, expected, rtol=tolerance, atol=1e-9)
        assert self.balancer.num_calls == self.calls

    # ---- between steps

    def descend(self) -> None:
        """Moves the parameters against their gradients, not far whatever the units are."""
        with torch.no_grad():
            for parameter in self.net.used():
                if parameter.grad is not None:
                    grad = _dense(parameter.grad)
                    parameter -= 0.05 * grad / (grad.norm() + 1e-30)

    def order(self, present: list[int]) -> list[int]:
        """Returns the order in which a streamed step takes its tasks."""
        order = list(present)
        random.Random(self.probe.seed).shuffle(order)
        return order

    def reload(self, how: str) -> None:
        """Goes on with another object that has the state of this one."""
        before = self.balancer.state_dict()
        if how in ("deepcopy", "pickle"):
            self.net.compiled = None
            pair = (self.net, self.balancer)
            self.net, self.balancer = (
                copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
            )
        else:
            state = self.balancer.state_dict()
            self.balancer = self.made()
            self.balancer.load_state_dict(_THROUGH_A_FILE[how](state))
        after = self.balancer.state_dict()
        assert after.keys() == before.keys()
        assert_equal_bits(list(after.values()), list(before.values()))


def _through_torch_save(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _through_safetensors(state: dict[str, Any]) -> dict[str, Any]:
    safetensors = pytest.importorskip("safetensors.torch")
    return safetensors.load(safetensors.save(state))


_THROUGH_A_FILE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "save": _through_torch_save,
    "safetensors": _through_safetensors,
}


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor


def _counts_skips(name: str) -> bool:
    return name.endswith(("found_nonfinite", "num_skipped_steps", "ticket", "_extra_state"))
