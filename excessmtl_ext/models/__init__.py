"""Networks with a shared encoder and one head per task. They know nothing of balancing."""

from excessmtl_ext.models.encoder_heads import EncoderHeads
from excessmtl_ext.models.lenet import lenet
from excessmtl_ext.models.mlp import mlp

__all__ = ["EncoderHeads", "lenet", "mlp"]
