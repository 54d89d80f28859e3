"""Faults planted in compiled kernels: edits of their PTX, each of which the emulator is to find."""
