"""The quantiser: the linears of a LLaMA to 4 bits, with an eye on what they are given (Lin et al. 2023, AWQ).

tokens, calibration   what the model is shown, and what that gives each linear
moments               what rounding needs to know of it
scales                which inputs to make louder
grid                  where a group's sixteen levels lie
compensate            which of them each weight takes
ours                  all of that, for a layer
upstream, cachefile   llm-awq's way instead, and its files
run, report           a checkpoint, layer by layer
"""
