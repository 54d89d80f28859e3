"""List the peers, their implementations, and the verdict of the property test on each on this machine.

python -m bench.peers                          # TRITON_INTERPRET=1 before it where there is no GPU
python -m bench.peers gemlite sglang           # only these
"""

import argparse
import sys
from importlib import metadata

from vila_triton.registry import OPS, Impl

from .._tool import tool
from ..correctness.gate import gate
from . import discover_peers, peer_names


def installed_version(peer: str) -> str:
    """Of the installed distribution whose name or top-level module the peer's name is; "" if there is none."""
    for distribution in (peer, *metadata.packages_distributions().get(peer, ())):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return ""


def peer_impls(peer: str) -> list[Impl]:
    """Returns the implementations, of any op, that a module of this folder registers."""
    return [impl for op in OPS.values() for impl in op.impls.values() if impl.fn.__module__ == f"{__package__}.{peer}"]


@tool
def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(peer_names())} (default: all)")
    selected = parser.parse_args().peers or peer_names()
    if unknown := set(selected) - set(peer_names()):
        parser.error(f"no peer {', '.join(sorted(unknown))}; there are: {', '.join(peer_names())}")
    unusable = discover_peers()
    for peer in selected:
        print(f"{peer} {installed_version(peer)}".rstrip())
        if peer in unusable:
            print(f"  {unusable[peer]}")
        for impl in peer_impls(peer):
            for config in impl.configs:
                name = " ".join([impl.op, impl.name, *(f"{key}={value}" for key, value in config.items())])
                print(f"  {name}: ", end="", flush=True)
                print(gate(impl, config) or "right", flush=True)


if __name__ == "__main__":
    sys.exit(main())
