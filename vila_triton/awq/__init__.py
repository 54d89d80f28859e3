"""The quantiser: the linears of a LLaMA to 4 bits, with an eye on what they are given (Lin et al. 2023, AWQ)."""
