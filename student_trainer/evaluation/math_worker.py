"""The process that compares mathematics: one question at a time, each with its share of CPU time.

A question that takes more of it ends the process by a signal that no code can catch, the library's
or sympy's, in a long multiplication neither; so does one that takes too much memory. Whoever asked
sees the end of the connection and starts another. It ends with the process that started it, whose
end of the connection is closed then. Run: python -m student_trainer.evaluation.math_worker FD CPU_S
"""

from __future__ import annotations

import logging
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import NoReturn

MAX_MEMORY_BYTES = 4 << 30
MEMORY_SHARE = 0.75
"""Of the memory, from which on a comparison may have gone wrong for the want of it: the library
takes a MemoryError for an answer."""
READY = "ready"


def serve(connection: Connection, *, cpu_s: float) -> NoReturn:
    """Answers questions, each the name of a function of math_answers and its arguments."""
    import math_verify  # noqa: F401 - takes seconds, before the first question counts

    from student_trainer.evaluation import math_answers

    logging.disable(logging.WARNING)
    connection.send(READY)
    while True:
        try:
            name, *texts = connection.recv()
        except EOFError:
            sys.exit(0)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        try:
            verdict = bool(getattr(math_answers, name)(*texts))
        # Whatever sympy makes of a formula: it says nothing about the answer.
        except Exception:  # noqa: BLE001
            verdict = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if used > MEMORY_SHARE * MAX_MEMORY_BYTES:
            sys.exit(1)
        connection.send(verdict)


if __name__ == "__main__":
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    serve(Connection(int(sys.argv[1])), cpu_s=float(sys.argv[2]))
