"""RQGNN: graphs whose signals' energy sits elsewhere in the spectrum, found among many normal ones.

`RqgnnRecipe` trains a detector, `GraphAnomalyDetector` uses it. The README beside this file says what is where.
"""

from library.rqgnn.data import load_graphs
from library.rqgnn.detector import GraphAnomalyDetector
from library.rqgnn.recipe import RqgnnRecipe

__all__ = ["GraphAnomalyDetector", "RqgnnRecipe", "load_graphs"]
