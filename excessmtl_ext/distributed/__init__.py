"""What is reduced across ranks, and when: one balanced step of several processes.

``reduce="grads"`` computes what one process would on the joined batch. Every task's gradient is
averaged before it is squared: a reduce-scatter hands each of the W ranks its P / W coordinates of
the mean, S and the momentum exist only for those, T partial risks are summed in float64, each rank
combines its own coordinates, and an all-gather hands out the result. A rank sends
(W - 1) / W * (T + 1) * P elements and some hundred bytes, holds 1 / W of the state, and every rank
ends with the same bits.

``reduce="risks"`` keeps the whole state of the rank's own gradients and averages T risks: E of a
small batch's gradient, averaged, is not E of the average (its noise part is W times larger).

``fully_shard`` parameters (DTensor) arrive averaged and sharded from the backward pass: the state
lies as they do, and T risks are all that is left to sum.

Two small exchanges frame a step, on the CPU where the group has a backend for it: before, whether
every rank is ready, and how many samples each has of each task; after the passes, whether any has
failed, and which parameters were reached. So an error on one rank is an error on all, and absent
tasks and uneven batches are weighted as in the joined batch.
"""

from excessmtl_ext.distributed.checkpoints import full_state_dict
from excessmtl_ext.distributed.collectives import Ranks
from excessmtl_ext.distributed.data_parallel import DataParallel
from excessmtl_ext.distributed.partition import Partition, Reduce
from excessmtl_ext.step import NumSamples

__all__ = ["DataParallel", "NumSamples", "Partition", "Ranks", "Reduce", "full_state_dict"]
