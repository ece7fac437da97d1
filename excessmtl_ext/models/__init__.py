"""Networks with a shared encoder and one head per task. They know nothing of balancing."""

from excessmtl_ext.models.encoder_heads import EncoderHeads
from excessmtl_ext.models.lenet import lenet
from excessmtl_ext.models.mlp import mlp
from excessmtl_ext.models.resnet import resnet18_heads
from excessmtl_ext.models.segnet import segnet
from excessmtl_ext.models.text_bag import text_bag
from excessmtl_ext.models.two_towers import two_towers

__all__ = ["EncoderHeads", "lenet", "mlp", "resnet18_heads", "segnet", "text_bag", "two_towers"]
