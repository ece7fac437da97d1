"""Several processes: the joined batch balanced under DistributedDataParallel or fully_shard, saved and resumed.

torchrun --nproc-per-node 2 examples/several_processes.py ddp
torchrun --nproc-per-node 2 examples/several_processes.py fsdp

Each process takes a GPU if there are enough, otherwise all compute on the CPU. docs/distributed.md explains the steps.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from excessmtl_ext import ExcessMTL

KIND = sys.argv[1] if len(sys.argv) > 1 else "ddp"
has_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpus else torch.device("cpu")
# gloo beside NCCL: the balancer's exchanges before and after the passes are on the CPU, and no GPU waits for them.
dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpus else "gloo")
rank, num_ranks = dist.get_rank(), dist.get_world_size()


class Net(nn.Module):
    """An encoder and a head for each of three tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(64, 1) for _ in range(3)])

    def forward(self, inputs: Tensor) -> list[Tensor]:
        z = self.encoder(inputs)
        return [head(z) for head in self.heads]


def make_training() -> tuple[nn.Module, torch.optim.Optimizer, ExcessMTL]:
    """Makes a model over all processes, its optimizer, and a balancer with their process group."""
    torch.manual_seed(0)  # the same parameters everywhere
    net = Net().to(device)
    if KIND == "fsdp":
        fully_shard(net.encoder)
        model = fully_shard(net)
        balancer = ExcessMTL(net.encoder.parameters(), num_tasks=3)
    else:
        model = DistributedDataParallel(net)
        balancer = ExcessMTL(net.encoder.parameters(), num_tasks=3, model=model)
    return model, torch.optim.Adam(model.parameters(), lr=1e-3), balancer


generator = torch.Generator().manual_seed(1)
x = torch.randn(500, 20, generator=generator)
y = x[:, :3].square() + torch.tensor([0.0, 0.0, 2.0]) * torch.randn(500, 3, generator=generator)


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, balancer: ExcessMTL) -> None:
    """Trains one epoch on this process's part of every batch."""
    for batch in torch.arange(len(x)).split(64):
        part = batch.tensor_split(num_ranks)[rank]
        inputs, targets = x[part].to(device), y[part].to(device)
        outputs = model(inputs)
        losses = [
            (out - targets[:, task : task + 1]).square().mean() for task, out in enumerate(outputs)
        ]
        optimizer.zero_grad()
        balancer.backward(losses, num_samples=len(part))  # the last batch has parts of unequal size
        if not balancer.found_nonfinite.any():  # equal on all ranks
            optimizer.step()


training = make_training()
for _ in range(3):
    train_epoch(*training)

# Every process writes its shard; any number of processes can read the checkpoint.
model, optimizer, balancer = training
names = [tempfile.mkdtemp()] if rank == 0 else [None]
dist.broadcast_object_list(names)
model_state, optimizer_state = get_state_dict(model, optimizer)
saved = {"model": model_state, "optimizer": optimizer_state, "balancer": balancer.state_dict()}
dcp.save(saved, checkpoint_id=names[0])

resumed = make_training()
model, optimizer, balancer = resumed
model_state, optimizer_state = get_state_dict(model, optimizer)
state = {"model": model_state, "optimizer": optimizer_state, "balancer": balancer.state_dict()}
dcp.load(state, checkpoint_id=names[0])
set_state_dict(
    model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
)
balancer.load_state_dict(state["balancer"])

for each in (training, resumed):
    train_epoch(*each)
weights = [each[2].task_weights for each in (training, resumed)]
assert torch.equal(*weights)

everywhere = [torch.empty_like(weights[0]) for _ in range(num_ranks)]
dist.all_gather(everywhere, weights[0])
assert all(torch.equal(weights[0], other) for other in everywhere)
if rank == 0:
    print(f"{KIND}, {num_ranks} processes: weights {[round(w, 6) for w in weights[0].tolist()]}")
    print("equal on all of them, and resumed bit for bit")
# The group's threads end with the last reference to it, and have to end before Python does.
del training, resumed, model, optimizer, balancer, each
gc.collect()
dist.destroy_process_group()
