"""Shape contracts: every op states its axes once, and a call that breaks them fails before anything runs."""

from torch import Tensor


def axes(where: str, **tensors: tuple[Tensor, str]) -> dict[str, int]:
    """Match each tensor against its axis letters, which must mean the same size everywhere; returns the sizes.

    ``axes("rms_norm", x=(x, "... e"), weight=(weight, "e"))``; a leading ``...`` stands for any axes.
    Errors: ValueError naming the op, the argument, its shape and what was expected; also if devices differ.
    """
    sizes: dict[str, int] = {}
    first = next(iter(tensors.values()))[0]
    for name, (x, pattern) in tensors.items():
        letters = pattern.split()
        shape = list(x.shape)
        if letters[0] == "...":
            letters, shape = letters[1:], shape[len(shape) - len(letters) + 1 :]
        expected = [sizes.get(a, a) for a in letters]
        if len(shape) != len(letters) or any(isinstance(want, int) and want != n for want, n in zip(expected, shape)):
            expected_text = ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in letters)
            raise ValueError(f"{where}: {name} has shape {list(x.shape)}, expected [{expected_text}]")
        if x.device != first.device:
            raise ValueError(f"{where}: {name} is on {x.device}, expected {first.device} like the first argument")
        sizes.update(zip(letters, shape))
    return sizes


def same_dtype(where: str, **tensors: Tensor) -> None:
    """ValueError unless all the tensors have the dtype of the first."""
    (first, x), *rest = tensors.items()
    for name, y in rest:
        if y.dtype != x.dtype:
            raise ValueError(f"{where}: {name} is {y.dtype}, expected {x.dtype} like {first}")
