"""Registers our attention and our int4 linears with transformers, for its own models."""

from transformers import AttentionInterface, AttentionMaskInterface
from . import attention_interface as ours
def install():
    AttentionInterface.register(ours.NAME, ours.attention)
    AttentionMaskInterface.register(ours.NAME, ours.key_mask)
