# ruff: noqa: F401
"""What every rank of a test needs: imported once, by the server they are forked from."""

import atexit
import gc
import os

import matplotlib.pyplot
import sklearn.datasets  # of the digits

import tests.ranks.jobs

gc.freeze()  # else the first collection of every rank would write to, and so copy, all pages of these modules
SERVER = os.getpid()
# it ends without finalisation: what is frozen lives to the end, and Triton would list it as leaked
atexit.register(lambda: os._exit(0) if os.getpid() == SERVER else None)
