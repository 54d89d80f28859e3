"""The device that commands and models run on."""

import torch


def pick_device(name: str | None = None) -> torch.device:
    """The named device; without a name the GPU if there is one, else the CPU.

    Raises ValueError for a device that this machine does not have.
    """
    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if has_gpu else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cuda" and not has_gpu):
        raise ValueError(f"device {name!r} is not to be had here; there is cpu{' and cuda' if has_gpu else ''}")
    return device
