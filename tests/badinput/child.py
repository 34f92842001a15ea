"""A warm process that has imported the engine and forks for every case: a crash, a bomb or a hang costs that case alone.

It reads requests as lines of JSON and answers each with one. It never computes anything itself, so that its children
start with clean locks and threads.
"""

import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

TRACES = 1  # the exit code that an uncaught error gives a process


def virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def run_case(request: dict) -> None:
    """In the child: limits, then the command line; ends the process."""
    code = TRACES
    try:
        os.setsid()
        cap = virtual_bytes() + request["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if request.get("file_bytes"):  # a disk that is full: writes beyond fail with EFBIG, once the signal is ignored
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
        os.chdir(request["cwd"])
        sys.path.insert(0, request["cwd"])  # what a payload would import
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        if request.get("user"):
            os.setgroups([])
            os.setgid(request["user"])
            os.setuid(request["user"])
        if request.get("before"):
            runpy.run_path(request["before"])
        from manyscale.cli import main

        main(request["words"])
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(child: int, seconds: float) -> tuple[int, bool, int]:
    """Exit code (negative: the signal), whether it was killed for hanging, and its peak resident bytes."""
    deadline, hung = time.monotonic() + seconds, False
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), hung, usage.ru_maxrss * 1024
        if time.monotonic() > deadline and not hung:
            hung = True
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.003)


def serve() -> None:
    import multiprocessing.popen_fork  # what another user's case may not be able to read

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot
    import sklearn.datasets
    import torch

    torch.set_num_threads(1)
    import manyscale.cli
    import manyscale.ship.convert
    import manyscale.ship.evaluate
    import manyscale.ship.export
    import manyscale.ship.fewshot
    import manyscale.ship.predict
    import manyscale.train.branches

    assert multiprocessing and sklearn and manyscale  # they were imported for the children
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if not child:
            run_case(request)
        code, hung, peak = wait_for(child, request["seconds"])
        print(json.dumps({"code": code, "hung": hung, "peak": peak, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    serve()
    os._exit(0)  # taking the engine down would take seconds
