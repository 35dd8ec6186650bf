"""Spectra of the Hessian of over-parametrised networks: bulk, outliers and what makes them.

`hessian.analyze(model, loss, data)` is the front door; the README beside this file says which module holds what.
"""

from library.hessian.analysis import analyze
from library.hessian.interpolation import Line, interpolate
from library.hessian.report import HessianReport

__all__ = ["HessianReport", "Line", "analyze", "interpolate"]
