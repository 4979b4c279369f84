"""Start a trainer on several ranks of this machine, forked from one process that has imported torch.

    python tests/fork_ranks.py 4 train_gpt.py

It gives them torchrun's variables and no more: no restarts, no signals passed on. Starting each rank, and
torchrun itself, anew takes more than a second of imports each.
"""

import os
import runpy
import socket
import sys

import torch  # noqa: F401  (for the ranks)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main(argv: list[str]) -> int:
    """Return the largest exit code of the ranks; in a rank, never return."""
    num_ranks, script, pids = int(argv[0]), argv[1], []
    shared = dict(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=num_ranks, LOCAL_WORLD_SIZE=num_ranks
    )
    for rank in range(num_ranks):
        pid = os.fork()
        if pid == 0:
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in own.items()})
            sys.argv = [script]
            runpy.run_path(script, run_name="__main__")  # ends in sys.exit
        pids.append(pid)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in pids)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
