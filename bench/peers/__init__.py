"""Other libraries' kernels as implementations of our ops, to time ours against. Nothing but the bench imports them.

    from bench.peers import discover
    unusable = discover()             # registers what is installed and can run; says why the others cannot
    python -m bench.peers             # the same as a table, with what the property test says of each

One file a library; its docstring gives the pip command. The libraries are no extra of pyproject.toml: most pin versions
of torch, triton or transformers that contradict ours and each other's, so they are installed with `--no-deps`, best
into a folder of their own that PYTHONPATH names. No code of theirs is here, only calls. Where a library imports half a
serving engine on its way to a kernel, only the file of the kernel is imported (`borrow`).

A peer is an implementation like any other: the gate refuses it a time if its numbers are wrong, and what it cannot do
raises `Unsupported` before anything is launched. What it needs in a layout of its own is converted once for each weight
or batch (`prepared`), at the first call, and so is not timed.
"""

import importlib
import pkgutil

from ..correctness.failure_report import exception_line
from ._import_file import PeerUnavailable

__all__ = ["PeerUnavailable", "discover_peers", "peer_names"]


def peer_names() -> list[str]:
    """The libraries there are files for; each is also the name of its implementations."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def discover_peers() -> dict[str, str]:
    """Import every peer, so that it attaches its implementations; {peer: why not} of those that cannot be used here."""
    unusable = {}
    for name in peer_names():
        try:
            importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            unusable[name] = f"{error}; bench/peers/{name}.py says how to install it"
        except PeerUnavailable as reason:
            unusable[name] = str(reason)
        except Exception as error:  # a library may fail to import in any way; the reason is what is asked for
            unusable[name] = f"import fails: {exception_line(error)}"
    return unusable
