"""`python -m snac48.torchrun ARGS` is `torchrun ARGS`, but it ends as its processes do: with their exit code,
and without a traceback of its own below what they have said."""

import logging
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from .cli import EXIT_STOPPED


def exit_code(failed: ChildFailedError) -> int:
    """Of the process that failed first; as a shell tells it where a signal killed that one."""
    code = failed.get_first_failure()[1].exitcode
    return code if code > 0 else 128 - code


def in_one_line(record) -> bool:
    """The agents of two machines part in any order; the one that is left alone tells its whole stack."""
    record.exc_info = None
    return True


if __name__ == "__main__":
    logging.getLogger("torch.distributed.elastic.agent.server.api").addFilter(in_one_line)
    try:
        main()
    except ChildFailedError as e:
        sys.exit(exit_code(e))
    except SignalException:  # passed on to all processes, which had time to answer it
        sys.exit(EXIT_STOPPED)
