"""Runs compiled Triton kernels on the CPU: the PTX that Triton emits for a GPU, executed and checked in numpy."""

from .launch import emulating as emulating
from .report import Fault as Fault
from .report import KernelFault as KernelFault
from .report import Launch as Launch
from .report import Report as Report
