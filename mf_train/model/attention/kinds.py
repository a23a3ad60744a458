"""The kinds of attention by their name, `model.attention`."""

from mf_train.config.model import ModelConfig
from mf_train.model.attention.base import Attention
from mf_train.model.attention.cosformer import CosformerAttention
from mf_train.model.attention.ecoformer import EcoformerAttention
from mf_train.model.attention.flow import FlowAttention
from mf_train.model.attention.linformer import LinformerAttention
from mf_train.model.attention.luna import FilteredLunaAttention, LunaAttention
from mf_train.model.attention.performer import PerformerAttention
from mf_train.model.attention.softmax import SoftmaxAttention
from mf_train.model.attention.window import WindowAttention

KINDS: dict[str, type[Attention]] = {
    "softmax": SoftmaxAttention,
    "window": WindowAttention,
    "performer": PerformerAttention,
    "cosformer": CosformerAttention,
    "flow": FlowAttention,
    "linformer": LinformerAttention,
    "luna": LunaAttention,
    "luna_filtered": FilteredLunaAttention,
    "ecoformer": EcoformerAttention,
}


def build_attention(config: ModelConfig, layer: int) -> Attention:
    """The attention of a block: `model.attention`, or softmax in a layer of `model.full_attention_layers`."""
    return KINDS[config.attention_kinds[layer]](config, layer)
