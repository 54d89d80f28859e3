"""Products and roundings of a compiled kernel that are less precise than its source asks for, read from TTIR and
assembly.

Tensor cores that round float32 to TF32 err by 1e-3 where float32 errs by 1e-6, and a register narrower than a number
keeps half of it; both compile silently. So do a product contracted with a sum and an approximate quotient, which change
the last bit: kernels of ops that are exact bit by bit may contain neither.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

TF32 = r"\b(?:mma|wgmma|tcgen05)\.\S*tf32\S*|\bv_mfma\w*_xf32\w*"
HALF_SUM = r"\b(?:mma|wgmma)\.\S*k\d+(?:\.(?:row|col))*\.f16\.\S*"  # the first type is that of the sum
DOT = r"\btt\.dot .* -> tensor<(?:\d+x)*(\w+)>"
ASSEMBLY = r'\btt\.elementwise_inline_asm ".*?" \{constraints = "(.*?)", packed_element = (\d+).*?\} .*? : (.*) -> (.*)'
REGISTER = {"h": 16, "r": 32, "f": 32, "l": 64, "d": 64}  # bits, by the last letter of a constraint

OPCODE = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z]\w*\.[\w.]+)", re.MULTILINE)
# Products contracted with sums, or left for ptxas to contract; approximations; numbers below the normal ones flushed.
# Triton's floor flushes them too, which changes only floors of such numbers: x + 0.5 is none of them.
INEXACT = re.compile(r"(?:fma|mad)\..*f\d\d|(?:add|sub|mul)\.f\d\d|(?!cvt\.rmi).*\.(?:approx|full|ftz)")


def find_imprecision(asm: Mapping[str, Any], exact: bool = False) -> list[str]:
    """Returns a sentence for each computation of a kernel in fewer bits than its source says. `kernel.asm` is Triton's.

    exact: every operation must round as the one in the source does; this is read from PTX only.
    """
    code = asm["ptx"] if "ptx" in asm else asm["amdgcn"]
    findings = [*tf32_products(asm["ttir"], code), *narrow_sums(asm["ttir"], code), *narrow_registers(asm["ttir"])]
    if exact and (inexact := inexact_instructions(asm.get("ptx", ""))):
        findings.append(f"is not rounded as it is written: {', '.join(inexact)}")
    return findings


def tf32_products(ttir: str, code: str) -> Iterator[str]:
    """Yields a sentence if products are in TF32 that did not ask for it."""
    match = re.search(TF32, code)
    if match and "inputPrecision = tf32" not in ttir:
        yield f"multiplies in TF32 unasked: {match[0]}"


def narrow_sums(ttir: str, code: str) -> Iterator[str]:
    """Yields a sentence if products are summed in float16 or bfloat16."""
    narrow = [dtype for dtype in re.findall(DOT, ttir) if dtype in ("f16", "bf16")]
    if narrow or re.search(HALF_SUM, code):
        yield f"sums products in {narrow[0] if narrow else 'f16'}"


def narrow_registers(ttir: str) -> Iterator[str]:
    """Yields a sentence for inline assembly whose registers are narrower than the numbers they carry."""
    for constraints, pack, operands, results in re.findall(ASSEMBLY, ttir):
        value_bits = [int(pack) * int(bits) for bits in re.findall(r"tensor<[^>]*?(\d+)>", f"{results} {operands}")]
        if [REGISTER.get(letter[-1]) for letter in constraints.split(",")] != value_bits:
            yield f"inline assembly holds numbers of {', '.join(map(str, value_bits))} bits in registers {constraints}"


def inexact_instructions(ptx: str) -> list[str]:
    """Returns the instructions whose results may differ in some bit from those of the operations in the source."""
    return sorted({opcode for opcode in OPCODE.findall(ptx) if INEXACT.match(opcode)})
