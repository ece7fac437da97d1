"""A balancer inside a module that other tools average, save, move and broadcast keeps its state and its numbers.

Where a tool is not installed its arithmetic is done here: over ``parameters()``, ``buffers()`` or
``state_dict()``.
"""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _asserts import assert_equal_bits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from excessmtl_ext import (
    FAMO,
    MGDA,
    MOML,
    Balancer,
    DualBalancing,
    DynamicWeightAverage,
    ExcessMTL,
    FixedWeights,
    GradNorm,
    GroupDRO,
    InverseNorm,
    SingleTask,
    SmoothTchebycheff,
    UncertaintyWeights,
    Uniform,
)
from excessmtl_ext.functional import ParamLayout

MAKERS: dict[str, Callable[..., Balancer]] = {
    "default": ExcessMTL,
    "official": lambda parameters, **options: ExcessMTL.from_preset(
        "official", parameters, **options
    ),
    "bfloat16": lambda parameters, **options: ExcessMTL(
        parameters, state_dtype=torch.bfloat16, **options
    ),
    "rotation": lambda parameters, **options: ExcessMTL(parameters, tasks_per_step=1, **options),
    "subset": lambda parameters, **options: ExcessMTL(
        parameters := list(parameters), estimate_from=parameters[-1:], **options
    ),
    "update_every": lambda parameters, **options: ExcessMTL(parameters, update_every=2, **options),
    "gradnorm": GradNorm,
    "group_dro": GroupDRO,
    "mgda": MGDA,
    "single_task": lambda parameters, **options: SingleTask(parameters, task=1, **options),
    "uniform": Uniform,
    "fixed": lambda parameters, **options: FixedWeights(parameters, weights=[1, 3], **options),
    "uncertainty": UncertaintyWeights,
    "dwa": DynamicWeightAverage,
    "famo": FAMO,
    "stch": SmoothTchebycheff,
    "dbmtl": DualBalancing,
    "inverse_norm": InverseNorm,
    "uniform_sized": lambda parameters, **options: Uniform(
        parameters, combine="per_tensor", **options
    ),
    "group_dro_sized": lambda parameters, **options: GroupDRO(
        parameters, combine="per_tensor", **options
    ),
}
EVERY_METHOD = pytest.mark.parametrize("name", MAKERS)


class Net(nn.Module):
    """An encoder, two heads and the balancer, as in a LightningModule."""

    def __init__(self, name: str = "default", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(5, 4), nn.Tanh()).to(dtype)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2)).to(dtype)
        self.balancer = MAKERS[name](self.encoder.parameters(), num_tasks=2)
        self.seed = 1

    def losses(self) -> list[Tensor]:
        self.seed += 1
        torch.manual_seed(self.seed)
        parameter = next(self.encoder.parameters())
        features = self.encoder(torch.randn(6, 5).to(parameter))
        return [(head(features) - 1.0).square().mean() for head in self.heads]

    def forward(self) -> Tensor:
        return self.balancer(self.losses())


def train(net: Net, num_steps: int, after: Callable[[Net], object] = lambda net: None) -> Net:
    optimizer = torch.optim.SGD([*net.encoder.parameters(), *net.heads.parameters()], lr=0.1)
    for _ in range(num_steps):
        optimizer.zero_grad()
        net().backward()
        optimizer.step()
        after(net)
    return net


def everything(net: Net) -> list[Tensor]:
    return [*net.parameters(), *net.balancer.state_tensors().values()]


# ---- shape and type


@EVERY_METHOD
def test_every_entry_is_a_tensor_of_a_shape_and_type_that_never_change(name: str) -> None:
    net = Net(name)
    before = {key: (value.shape, value.dtype) for key, value in net.state_dict().items()}
    assert "balancer.task_weights" in before
    train(net, 3)
    after = {key: (value.shape, value.dtype) for key, value in net.state_dict().items()}
    assert after == before
    assert {dtype for _, dtype in after.values()} <= {
        torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8,
    }  # fmt: skip


def test_the_state_is_no_buffer_and_no_parameter() -> None:
    net = Net()
    assert not list(net.buffers())
    assert not list(net.balancer.parameters())
    assert {"sq_grad_sum", "task_weights"} <= net.balancer.state_tensors().keys()


def test_a_state_whose_sizes_come_with_the_first_gradients_is_loaded_whole() -> None:
    balancer, other = (ExcessMTL(num_tasks=2) for _ in range(2))
    grads = [[torch.full((3,), 1.0 + step), torch.ones(5)] for step in range(4)]
    for row in grads[:2]:
        balancer.update_weights([row, row])
    other.load_state_dict(balancer.state_dict())
    for each in (balancer, other):
        each.update_weights([grads[2], grads[3]])
    assert_equal_bits(list(other.state_tensors().values()), list(balancer.state_tensors().values()))
    assert other.num_tensor_steps.tolist() == [[3, 3], [3, 3]]


# ---- averages of weights


def swa(net: Net, **options: Any) -> Callable[[Net], object]:
    return AveragedModel(net, **options).update_parameters


class EmaOfStateDict:
    """Walks ``state_dict().values()``, as timm's ModelEmaV2 does."""

    def __init__(self, net: nn.Module) -> None:
        self.module = copy.deepcopy(net)

    @torch.no_grad()
    def __call__(self, net: nn.Module) -> None:
        pairs = zip(self.module.state_dict().values(), net.state_dict().values(), strict=True)
        for average, value in pairs:
            average.copy_(0.9 * average + 0.1 * value)


class EmaOfNamedTensors:
    """Walks names of floating-point parameters and buffers, as ema-pytorch and Lightning do; the rest is copied."""

    def __init__(self, net: nn.Module) -> None:
        self.module = copy.deepcopy(net)

    @torch.no_grad()
    def __call__(self, net: nn.Module) -> None:
        for walk in (nn.Module.named_parameters, nn.Module.named_buffers):
            for (_, average), (_, value) in zip(walk(self.module), walk(net), strict=True):
                if average.is_floating_point():
                    average.lerp_(value, 0.1)
                else:
                    average.copy_(value)


AVERAGES: dict[str, Callable[[Net], Callable[[Net], object]]] = {
    "swa": swa,
    "swa_with_buffers": lambda net: swa(net, use_buffers=True),
    "ema": lambda net: swa(net, avg_fn=get_ema_avg_fn(0.9)),
    "ema_with_buffers": lambda net: swa(net, avg_fn=get_ema_avg_fn(0.9), use_buffers=True),
    "ema_of_lists": lambda net: swa(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "ema_of_the_state_dict": EmaOfStateDict,
    "ema_of_named_tensors": EmaOfNamedTensors,
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("num_steps_before", [0, 2])
@EVERY_METHOD
def test_an_average_of_the_weights_changes_no_number_of_the_training(
    name: str, num_steps_before: int, average: str
) -> None:
    net, plain = train(Net(name), num_steps_before), train(Net(name), num_steps_before)
    train(net, 3, AVERAGES[average](net))
    assert_equal_bits(everything(net), everything(train(plain, 3)))


def test_the_average_is_that_of_the_parameters() -> None:
    net = Net()
    averaged = AveragedModel(net, use_buffers=True)
    seen: list[list[Tensor]] = []

    def record(net: Net) -> None:
        averaged.update_parameters(net)
        seen.append([parameter.detach().double() for parameter in net.encoder.parameters()])
        seen[-1] = [each.clone() for each in seen[-1]]

    train(net, 4, record)
    for index, parameter in enumerate(averaged.module.encoder.parameters()):
        mean = torch.stack([each[index] for each in seen]).mean(0)
        torch.testing.assert_close(parameter.double(), mean, rtol=1e-5, atol=1e-7)
    copied = averaged.module.balancer.shared_parameters
    assert [id(each) for each in copied] == [
        id(each) for each in averaged.module.encoder.parameters()
    ]


@EVERY_METHOD
def test_a_mean_over_clients_of_whole_state_dicts_loads_and_trains_on(name: str) -> None:
    clients = [train(Net(name), num_steps) for num_steps in (2, 4)]
    states = [client.state_dict() for client in clients]
    mean = {key: (states[0][key] + states[1][key]) / 2 for key in states[0]}
    clients[0].load_state_dict(mean)
    assert clients[0].balancer.num_calls == 3
    loaded = clients[0].state_dict()
    for key in ("balancer.task_weights", "encoder.0.weight"):
        assert_equal_bits([loaded[key]], [mean[key]])
    train(clients[0], 1)
    assert clients[0].balancer.num_calls == 4
    assert bool(clients[0].balancer.task_weights.isfinite().all())


def test_ema_pytorch_averages_and_copies() -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch", reason="ema-pytorch is not installed")
    net, plain = Net(), Net()
    ema = ema_pytorch.EMA(net, beta=0.9, update_after_step=0, update_every=1)
    train(net, 3, lambda net: ema.update())
    assert_equal_bits(everything(net), everything(train(plain, 3)))


@pytest.mark.filterwarnings("ignore")  # of Lightning
def test_lightnings_weight_averaging_leaves_the_balancer_alone(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "WeightAveraging"):
        pytest.skip("this Lightning has no WeightAveraging")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any) -> Tensor:
            return self.net()

        def configure_optimizers(self) -> Any:
            parameters = [*self.net.encoder.parameters(), *self.net.heads.parameters()]
            return torch.optim.SGD(parameters, lr=0.1)

    def trained(*extra: Any) -> Module:
        module = Module()
        trainer = lightning.Trainer(
            max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=list(extra), default_root_dir=tmp_path,
            enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader([0.0] * 3))
        return module

    averaged, plain = trained(callbacks.WeightAveraging(use_buffers=True)), trained()
    assert_equal_bits(
        list(averaged.net.balancer.state_tensors().values()),
        list(plain.net.balancer.state_tensors().values()),
    )


# ---- savers


def goes_on_alike(name: str, save_and_load: Callable[[Net, Net], object]) -> None:
    """A fresh net that took what ``save_and_load`` brought over trains to the bits of the one that was saved."""
    net, fresh = train(Net(name), 3), Net(name)
    save_and_load(net, fresh)
    fresh.seed = net.seed
    assert_equal_bits(everything(train(fresh, 3)), everything(train(net, 3)))
    assert fresh.balancer.num_calls == 6


@EVERY_METHOD
def test_torch_save(name: str) -> None:
    def through_a_file(net: Net, fresh: Net) -> None:
        file = io.BytesIO()
        torch.save(net.state_dict(), file)
        file.seek(0)
        fresh.load_state_dict(torch.load(file, weights_only=True))

    goes_on_alike(name, through_a_file)


@EVERY_METHOD
def test_safetensors(name: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

    def through_a_file(net: Net, fresh: Net) -> None:
        safetensors.save_model(net, str(tmp_path / "model.safetensors"))
        safetensors.load_model(fresh, str(tmp_path / "model.safetensors"))

    goes_on_alike(name, through_a_file)
    net = train(Net(name), 1)
    safetensors.save_file(net.state_dict(), tmp_path / "state.safetensors")
    Net(name).load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))


@EVERY_METHOD
@pytest.mark.filterwarnings("ignore")  # of torch.distributed, about running without ranks
def test_distributed_checkpoints_of_one_process(name: str, tmp_path: Path) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    def through_a_folder(net: Net, fresh: Net) -> None:
        dcp.save(get_model_state_dict(net), checkpoint_id=tmp_path / "dcp")
        state = get_model_state_dict(fresh)
        dcp.load(state, checkpoint_id=tmp_path / "dcp")
        set_model_state_dict(fresh, state)

    goes_on_alike(name, through_a_folder)


@pytest.mark.filterwarnings("ignore")  # of Accelerate
def test_accelerates_savers(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    from accelerate.state import AcceleratorState, GradientState

    def through_its_folder(net: Net, fresh: Net) -> None:
        for each, verb in ((net, "save_state"), (fresh, "load_state")):
            accelerator = accelerate.Accelerator(cpu=True)
            accelerator.prepare(each)
            getattr(accelerator, verb)(str(tmp_path / "state"))
            accelerator.save_model(each, str(tmp_path / "model"))
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()

    goes_on_alike("default", through_its_folder)


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_save_pretrained_and_from_pretrained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    class Config(transformers.PretrainedConfig):
        model_type = "toy"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.encoder, self.heads = (
                nn.Linear(5, 4),
                nn.ModuleList(nn.Linear(4, 1) for _ in range(2)),
            )
            self.balancer = ExcessMTL(self.encoder.parameters(), num_tasks=2)
            self.post_init()

        def losses(self) -> list[Tensor]:
            return [head(self.encoder(torch.ones(2, 5))).square().mean() for head in self.heads]

    model = Model(Config())
    model.balancer.backward(model.losses())
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path)
    assert_equal_bits([loaded.encoder.weight], [model.encoder.weight])
    # transformers makes the module without memory, and gives it other parameters afterwards.
    with pytest.raises(ValueError, match=r"on the meta device.*balancer\.shared_parameters = list"):
        loaded.balancer.backward(loaded.losses())
    loaded.balancer.shared_parameters = list(loaded.encoder.parameters())
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    loaded.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert_goes_on(model, loaded)


def assert_goes_on(model: Any, loaded: Any) -> None:
    for each in (model, loaded):
        each.zero_grad()
        each.balancer.backward(each.losses())
    assert_equal_bits(
        list(loaded.balancer.state_tensors().values()),
        list(model.balancer.state_tensors().values()),
    )


def test_the_mixin_of_the_hugging_face_hub(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    pytest.importorskip("safetensors", reason="safetensors is not installed")

    class Model(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.encoder = nn.Linear(5, width)
            self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(2))
            self.balancer = ExcessMTL(self.encoder.parameters(), num_tasks=2)

        def losses(self) -> list[Tensor]:
            return [head(self.encoder(torch.ones(2, 5))).square().mean() for head in self.heads]

    model = Model(4)
    for _ in range(3):
        model.zero_grad()
        model.balancer.backward(model.losses())
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path)
    assert loaded.balancer.num_calls == 3
    assert_goes_on(model, loaded)


# ---- devices, types and modes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_leaves_the_state_alone(dtype: torch.dtype) -> None:
    net = train(Net(), 2)
    before = [tensor.clone() for tensor in net.balancer.state_tensors().values()]
    net.to(dtype)
    assert_equal_bits(list(net.balancer.state_tensors().values()), before)
    train(net, 2)
    assert int(net.balancer.num_steps) == 4


@pytest.mark.parametrize("num_steps_before", [0, 2])
@pytest.mark.parametrize("name", ["default", "official", "rotation", "subset"])
def test_double_widens_the_state_without_loss(name: str, num_steps_before: int) -> None:
    net = train(Net(name), num_steps_before)
    before = net.balancer.sq_grad_sum.double().clone()
    net.double()
    train(net, 1)
    assert net.balancer.sq_grad_sum.dtype == torch.float64
    assert bool((net.balancer.sq_grad_sum >= before).all())
    train(net, 2)
    twin = Net(name, torch.float64)  # the same numbers, all along in float64
    train(twin, num_steps_before + 3)
    torch.testing.assert_close(
        net.balancer.task_weights, twin.balancer.task_weights, rtol=1e-5, atol=1e-6
    )


def test_float64_beside_a_narrow_state_is_refused() -> None:
    with pytest.raises(ValueError, match="Leave `state_dtype` out"):
        Net("bfloat16", torch.float64)
    net = Net("bfloat16").double()
    with pytest.raises(ValueError, match="Leave `state_dtype` out"):
        train(net, 1)


def test_a_default_device_moves_nothing_of_a_balancer() -> None:
    plain = train(Net(), 3)
    torch.set_default_device("meta")  # as "cuda" would, and without a GPU
    try:
        with torch.device("cpu"):
            encoder, heads = Net().encoder, Net().heads
        balancer = ExcessMTL(encoder.parameters(), num_tasks=2)
        layout = ParamLayout([3])
    finally:
        torch.set_default_device(None)
    assert layout.param_numels.device.type == "cpu"
    net = Net()
    net.encoder, net.heads, net.balancer = encoder, heads, balancer
    assert_equal_bits(everything(train(net, 3)), everything(plain))


@EVERY_METHOD
def test_made_reset_and_loaded_in_inference_mode(name: str) -> None:
    plain = train(Net(name), 3)
    net = Net(name)
    with torch.inference_mode():
        net.balancer = MAKERS[name](net.encoder.parameters(), num_tasks=2)
        net.balancer.reset()
        net.balancer.load_state_dict(Net(name).balancer.state_dict())
        net.balancer.to("cpu")
    assert_equal_bits(everything(train(net, 3)), everything(plain))


def test_a_dry_run_with_fake_tensors_is_refused_and_spoils_nothing() -> None:
    plain = train(Net(), 3)
    with FakeTensorMode(), pytest.raises(ValueError, match="FakeTensorMode"):
        ExcessMTL(nn.Linear(5, 4).parameters(), num_tasks=2)
    net = Net()
    with pytest.raises(ValueError, match="FakeTensorMode"), FakeTensorMode():
        fake = [[torch.ones(3)], [torch.ones(3)]]
        ExcessMTL(num_tasks=2).update_weights(fake)
    assert_equal_bits(everything(train(net, 3)), everything(plain))


def test_a_module_made_without_memory_says_when_to_make_the_balancer() -> None:
    with torch.device("meta"):
        net = Net()
    assert not any(key.startswith("balancer") for key in net.state_dict())
    net.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"after from_pretrained\(\) or to_empty\(\)"):
        train(net, 1)
    net.load_state_dict(Net().state_dict())
    net.balancer.shared_parameters, net.seed = list(net.encoder.parameters()), 1
    assert_equal_bits(everything(train(net, 3)), everything(train(Net(), 3)))


def test_to_empty_and_meta_keep_the_state() -> None:
    net = train(Net(), 2)
    before = [tensor.clone() for tensor in net.balancer.state_tensors().values()]
    net.balancer.to("meta")
    net.balancer.to_empty(device="cpu")
    assert_equal_bits(list(net.balancer.state_tensors().values()), before)


def test_parameters_without_a_shape_are_refused_by_name() -> None:
    layer = nn.LazyLinear(3)
    with pytest.raises(ValueError, match=r"shared_parameters\[0\].*LazyLinear.*Run one batch"):
        ExcessMTL(layer.parameters(), num_tasks=2)
    layer(torch.ones(1, 2))
    assert ExcessMTL(layer.parameters(), num_tasks=2).sq_grad_sum.shape[0] == 2


@EVERY_METHOD
def test_copies_and_pickles_go_on_alike(name: str) -> None:
    net = train(Net(name), 2)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for twin in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        again = copy.deepcopy(net)
        assert_equal_bits(everything(train(twin, 2)), everything(train(again, 2)))
    assert all(
        a is not b for a, b in itertools.product(everything(net), everything(copy.deepcopy(net)))
    )


def test_moml_is_covered_by_its_own_verb() -> None:
    net = Net()
    balancer = MOML(net.encoder.parameters(), num_tasks=2)
    shapes = {key: value.shape for key, value in balancer.state_dict().items()}
    balancer.observe_validation(net.losses())
    other = MOML(net.encoder.parameters(), num_tasks=2)
    other.load_state_dict(balancer.state_dict())
    assert {key: value.shape for key, value in other.state_dict().items()} == shapes
    other.backward(net.losses())
