# ruff: noqa: F401
"""What every rank of a test needs: imported once, by the server they are forked from."""

import gc

import matplotlib.pyplot
import sklearn.datasets  # of the digits

import tests.ranks.jobs

gc.freeze()  # else the first collection of every rank would write to, and so copy, all pages of these modules
