"""One file per job that runs on the cluster, and the one distributed training loop.

What there is stands in the tables below, which can be read without importing anything heavy; `job_class` imports one
job when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, NamedTuple

from library.errors import InputError

if TYPE_CHECKING:
    from jobs.job import Job


class Method(NamedTuple):
    """A published method: what it does, and the paper that it is from."""

    summary: str
    paper: str


class JobEntry(NamedTuple):
    """A job of a method: where its class is, and what it does."""

    method: str
    place: str
    summary: str


METHODS = {
    "send": Method("Sensitivity Dropout against hallucinations, EigenScore and EES to detect them", "arXiv 2410.15460"),
    "hawq": Method("HAWQ-V2: bits for each layer from the curvature of the loss, chosen exactly", "arXiv 1911.03852"),
    "hessian": Method("spectra of the loss's Hessian: bulk, outliers and the classes behind them", "arXiv 1706.04454"),
    "farms": Method("FARMS: spectra of layers free of their shapes, for pruning and rates", "arXiv 2506.06280"),
    "spe": Method("SPE: positional encodings of graphs that are stable and know all eigenspaces", "arXiv 2310.02579"),
    "rqgnn": Method("RQGNN: anomalous graphs, told by the energy of their signals", "arXiv 2310.02861"),
    "diffspectra": Method("DiffSpectra: molecules from UV-Vis, IR and Raman spectra, by diffusion", "arXiv 2507.06853"),
    "qrc": Method("onions of quantum reservoirs, their memory read off a channel's spectrum", "arXiv 2505.22837"),
}

JOBS = {
    "send": JobEntry("send", "jobs.send:SendJob", "train a causal language model with Sensitivity Dropout"),
    "send-analysis": JobEntry(
        "send", "jobs.send_analysis:SendAnalysis", "compare checkpoints: which coordinates move, how the scores swing"
    ),
    "tokenize": JobEntry("send", "jobs.tokenize:TokenizeJob", "turn a large corpus into token stores to train on"),
    "hawq": JobEntry("hawq", "jobs.hawq:HawqJob", "choose each layer's bits, fine-tune and pack an image classifier"),
    "hawq-lm": JobEntry(
        "hawq", "jobs.hawq_lm:HawqLanguageJob", "choose the bits of a causal language model's layers, and pack it"
    ),
    "hawq-classifier": JobEntry("hawq", "jobs.hawq:ClassifierJob", "train the image classifier that is quantised"),
    "hessian": JobEntry(
        "hessian", "jobs.hessian:HessianJob", "measure Hessian spectra: the paper's experiments, or an artifact's loss"
    ),
    "farms": JobEntry(
        "farms", "jobs.farms:FarmsJob", "analyse every layer of a model: how heavy its spectrum's tail is"
    ),
    "farms-balance": JobEntry(
        "farms", "jobs.farms_balance:FarmsBalanceJob", "train an image classifier, each layer at its spectrum's rate"
    ),
    "farms-prune": JobEntry(
        "farms", "jobs.farms_prune:FarmsPruneJob", "prune a causal language model, layers by their spectra"
    ),
    "spe": JobEntry("spe", "jobs.spe:SpeJob", "train positional encodings and a graph network on molecules or graphs"),
    "spe-eigenpairs": JobEntry(
        "spe", "jobs.spe_eigenpairs:SpeEigenpairsJob", "compute eigenpairs of many graphs or molecules into Parquet"
    ),
    "rqgnn": JobEntry("rqgnn", "jobs.rqgnn:RqgnnJob", "train a detector of anomalous graphs among many normal ones"),
    "rqgnn-features": JobEntry(
        "rqgnn", "jobs.rqgnn_features:RqgnnFeaturesJob", "compute Rayleigh features of many graphs into Parquet"
    ),
    "diffspectra": JobEntry(
        "diffspectra", "jobs.diffspectra:DiffSpectraJob", "train the diffusion that finds molecules from spectra"
    ),
    "diffspectra-pretrain": JobEntry(
        "diffspectra", "jobs.diffspectra_pretrain:DiffSpectraPretrainJob", "pre-train its encoder of spectra"
    ),
    "diffspectra-sample": JobEntry(
        "diffspectra", "jobs.diffspectra_sample:DiffSpectraSampleJob", "find ranked candidates for many spectra"
    ),
    "diffspectra-simulate": JobEntry(
        "diffspectra", "jobs.diffspectra_simulate:DiffSpectraSimulateJob", "compute spectral lines of your molecules"
    ),
    "qrc": JobEntry("qrc", "jobs.qrc:QrcJob", "fit a forecaster of corrosion, or of your own series, and measure it"),
}

SEARCHES = {
    "send": "how much SeND drops, when and chosen how: the least EigenScore within 1 % of plain training's loss",
    "hawq": "bits, metric, quantiser and fine-tuning of HAWQ-V2: accuracy against size and bit operations",
    "farms": "how far layers' learning rates differ, by which map of their exponents: the best accuracy",
    "spe": "eigenpairs, functions on eigenvalues, outer network, depth and rates of SPE: the least validation error",
    "rqgnn": "quotients, filters, pooling, sizes, loss and rates of RQGNN: the best macro-F1 on held-out graphs",
    "diffspectra": "rates, sizes, averages and what is hidden of DiffSpectra: the least loss on held-out molecules",
    "qrc": "angles, sizes and encodings of quantum reservoirs, then onions of the best: the least error elsewhere",
}


def job_class(name: str) -> "type[Job]":
    """The class of the job of that name. Raises InputError that lists the jobs when there is none.

    >>> job_class("send").job
    'send'
    """
    if name not in JOBS:
        raise InputError(f"there is no job {name!r}; there are {', '.join(JOBS)}")
    module, _, attribute = JOBS[name].place.partition(":")
    return getattr(importlib.import_module(module), attribute)
