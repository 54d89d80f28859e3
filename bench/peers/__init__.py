"""Other libraries' kernels as implementations of our ops, to time ours against. Only the bench imports them.

    from bench.peers import discover_peers
    unusable = discover_peers()       # registers what is installed and can run; returns why the others cannot
    python -m bench.peers             # the same as a table, with the verdict of the property test on each

A library has one file, whose docstring gives the pip command. The libraries are no extra of pyproject.toml, as most pin
versions of torch, triton or transformers that contradict ours and each other's: install them with `--no-deps`, best
into a folder of their own that PYTHONPATH names. These files contain calls and no code of the libraries. Where a
package would import half a serving engine on its way to a kernel, only the file of the kernel is imported.

A peer is an implementation like any other: the gate refuses to time it if its numbers are wrong, and a call that it
does not support raises `Unsupported` before anything is launched. A weight or batch that it needs in a layout of its
own is converted once, at the first call, and so is not timed.

    _awq                 our int4 weight in AutoAWQ's layout, and the calls that int4 peers are compared in
    _cached_conversion   conversions to a library's layout, remembered for the tensors they came from
    _import_file         one module of a library, imported without its packages
    _offline             a library's launchers on a machine without a GPU
    _paged               our KV pages as the pages of another size
"""

import importlib
import pkgutil

from ..correctness.failure_report import exception_line
from ._import_file import PeerUnavailable

__all__ = ["PeerUnavailable", "discover_peers", "peer_names"]


def peer_names() -> list[str]:
    """The libraries that have a file here; each name is also that of its implementations."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def discover_peers() -> dict[str, str]:
    """Import every peer, which registers its implementations; {peer: reason} of those that cannot be used here."""
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
