"""The arithmetic of a GPU in numpy: rounding, conversions, integers, products of tensor cores."""
