"""Types of PTX and the numpy types that hold their values in generated code."""

import re
from dataclasses import dataclass
from functools import lru_cache

from .ptx import UnknownPTX

NATURAL = {  # of scalars whose numpy type is not the unsigned one
    "s": {8: "i1", 16: "i2", 32: "i4", 64: "i8"},
    "f": {32: "f4", 64: "f8"},
}
UNSIGNED = {8: "u1", 16: "u2", 32: "u4", 64: "u8"}
SIGNED = NATURAL["s"]
SMALL = ("e4m3", "e5m2", "e2m1", "e2m3", "e3m2", "ue8m0")


@dataclass(frozen=True)
class Kind:
    """A type: `letter` u, s, b, f, bf, tf, pred or one of SMALL; `bits` of all its lanes together."""

    text: str
    letter: str
    bits: int
    lanes: int = 1

    @property
    def lane(self) -> "Kind":
        """The type of one of its lanes."""
        return self if self.lanes == 1 else kind_of(self.text.rpartition("x")[0])

    @property
    def dtype(self) -> str:
        """The numpy type of its values: of f16, bf16, tf32 and packed types the unsigned one that holds the bits."""
        if self.letter == "pred":
            return "bool"
        if self.lanes > 1:
            return self.unsigned
        return NATURAL.get(self.letter, UNSIGNED).get(self.bits, UNSIGNED[self.bits])

    @property
    def unsigned(self) -> str:
        return UNSIGNED[self.bits]

    @property
    def is_float(self) -> bool:
        return self.letter not in ("u", "s", "b", "pred")


@lru_cache(None)
def kind_of(text: str) -> Kind:
    """The type of a name such as "s32", "bf16x2" or "pred"."""
    if text == "pred":
        return Kind(text, "pred", 1)
    if scalar := re.fullmatch(r"([usbf]|bf|tf)(8|16|32|64)(x\d)?", text):
        lanes = int(scalar[3][1:]) if scalar[3] else 1
        return Kind(text, scalar[1], int(scalar[2]) * lanes, lanes)
    if small := re.fullmatch(rf"({'|'.join(SMALL)})(x\d)?", text):
        lanes = int(small[2][1:]) if small[2] else 1
        return Kind(text, small[1], 8 * lanes, lanes)
    raise UnknownPTX(f"type {text}")


def is_kind(text: str) -> bool:
    """True for a modifier that is a type."""
    try:
        kind_of(text)
    except UnknownPTX:
        return False
    return True
