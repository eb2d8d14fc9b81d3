"""Flower's SuperLink or SuperNode as a child of fedzo: ``python -m fedzo.runtime.net.daemons KIND PARENT_PID ...``.

The program is Flower's own. Added is that it ends with its parent, and that a SuperNode asks for work every 0.1 s.
"""

from __future__ import annotations

import sys

from fedzo.runtime.net.processes import watch_parent

SUPERNODE_POLL_S = 0.1


def main() -> None:
    """Become the daemon that the command line names."""
    kind, parent_pid, *arguments = sys.argv[1:]
    watch_parent(int(parent_pid))
    sys.argv = [f"flower-{kind}", *arguments]
    if kind == "superlink":
        from flwr.superlink.cli.flower_superlink import flower_superlink

        flower_superlink()
    else:
        from flwr.supernode.cli.flower_supernode import flower_supernode

        from fedzo.runtime.net._flower_http import poll_often

        poll_often(SUPERNODE_POLL_S)
        flower_supernode()


if __name__ == "__main__":
    main()
