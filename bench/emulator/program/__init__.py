"""Reads PTX and turns it into Python: operands, checks of registers, a function for each basic block."""
