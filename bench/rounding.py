"""What in a kernel's PTX is not rounded as it is written: what kernels of `exact` ops may not hold."""

import re

OPCODE = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z]\w*\.[\w.]+)", re.MULTILINE)
# Products contracted with sums, or left for ptxas to contract; approximations; numbers below the normal ones flushed.
# Triton's floor flushes them too, which changes only floors of such numbers: x + 0.5 is none of them.
OTHERWISE = re.compile(r"(?:fma|mad)\..*f\d\d|(?:add|sub|mul)\.f\d\d|(?!cvt\.rmi).*\.(?:approx|full|ftz)")


def otherwise(ptx: str) -> list[str]:
    """The instructions whose results may differ in their bits from those of the operations in the source."""
    return sorted({opcode for opcode in OPCODE.findall(ptx) if OTHERWISE.match(opcode)})
