"""EigenScore: how many directions the sampled answers to one prompt spread in, as a log-determinant.

Embeddings have shape (..., K, d): K answers to a prompt, d features each; leading dimensions are prompts. A larger
score means that the answers differ more, which goes with hallucination. Everything is computed in float64.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from library.errors import InputError
from library.send.sensitivity import checked_coordinates

Convention = Literal["inside", "inside-code", "svd"]
"""Published forms of the score, whose numbers differ.

"inside": (1/K) sum log of the K eigenvalues of Z J Z^T + alpha I, where the rows of Z are answers and J removes each
answer's mean over its features (Chen et al., "INSIDE", 2024, equation 6).
"inside-code": the same matrix divided by d - 1 before alpha is added, and the logarithm to base 10.
"svd": (1/K) sum log(s^2 / (K - 1) + alpha) over the min(K, d) singular values s of Z with each feature's mean over
the answers removed.
"""

ALPHA = 1e-3
"""The regulariser of INSIDE (Chen et al., 2024, section 4.1)."""

PIVOT_PRECISION = 1e-8
"""Largest relative rounding error of a Cholesky pivot before singular values are taken instead."""

RATIO_PRECISION = 1e-6
"""Smallest ratio of determinants that the update is trusted with; rounding leaves it about ten digits."""


def eigenscore(embeddings: Tensor, *, convention: Convention = "inside", alpha: float = ALPHA) -> Tensor:
    """The score of each prompt: float64 of the leading shape, for embeddings (..., K, d). See `Convention`.

    The determinant is taken on the smaller of the K and d sides by Cholesky, at the cost d K^2 (or K d^2). Prompts
    whose pivots lose more than about eight digits, because embeddings are large and nearly dependent, go through
    singular values instead.

    Raises InputError for K < 2, d < 2, alpha <= 0, an unknown convention, embeddings that are not a real tensor or
    whose squares overflow float64, or non-finite ones, naming the prompt.

    >>> z = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])  # orthogonal, of squared norm 2
    >>> eigenscore(z, alpha=1.0)  # log(2 + 1)
    tensor(1.0986, dtype=torch.float64)
    """
    centred = _centred(embeddings, convention, alpha)
    answers, features = centred.shape[-2:]
    gram = centred @ centred.mT if answers <= features else centred.mT @ centred
    gram.diagonal(dim1=-2, dim2=-1).add_(alpha)
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    total = 2 * pivots.log().sum(-1)
    cancellation = (gram.diagonal(dim1=-2, dim2=-1) / pivots.square()).amax(-1) * torch.finfo(gram.dtype).eps
    imprecise = (failed != 0) | ~(cancellation < PIVOT_PRECISION)
    if bool(imprecise.any()):
        total = total.masked_scatter(imprecise, (_squared_singular_values(centred[imprecise]) + alpha).log().sum(-1))
    total = total + _null_directions(convention, answers, features) * math.log(alpha)
    return _finite(total / (answers * _unit(convention)))


def eigenvalues(embeddings: Tensor, *, convention: Convention = "inside", alpha: float = ALPHA) -> Tensor:
    """The eigenvalues whose logarithms the score sums, alpha included, descending: float64 (..., K).

    The "svd" convention has min(K, d) of them. Raises what `eigenscore` raises.
    """
    centred = _centred(embeddings, convention, alpha)
    missing = _null_directions(convention, *centred.shape[-2:])
    return _finite(torch.nn.functional.pad(_squared_singular_values(centred), (0, missing)) + alpha)


def leave_one_out(embeddings: Tensor, *, convention: Convention = "inside", alpha: float = ALPHA) -> Tensor:
    """The score after setting one feature to zero in all answers, for each of the d features: float64 (..., d).

    Let z be the feature's values on the K answers, y those of the centred C = Z J, and w = J e_i, so that y = C w.
    Zeroing the feature changes C by -z w^T, so by the determinant lemma, with S = C C^T + alpha I,
    det S' / det S = (1 - q)^2 + r t, with q = y^T S^-1 z, r = z^T S^-1 z, t = |w|^2 - y^T S^-1 y.
    In the "svd" convention the change is -y y^T, and the factor 1 - y^T S^-1 y. For K >= d, where z leaves the range
    of C and r is as large as |z|^2 / alpha, t = alpha w^T (C^T C + alpha I)^-1 w is taken from the singular vectors.
    O(d K max(K, d)) for all features. Features that carry nearly the whole determinant (there are at most about K) are
    scored anew, since their factor is lost to cancellation.

    Raises what `eigenscore` raises.
    """
    centred = _centred(embeddings, convention, alpha)
    answers, features = centred.shape[-2:]
    u, singular, vt = torch.linalg.svd(_square_factor(centred), full_matrices=answers > features)
    spectrum = torch.nn.functional.pad(singular**2, (0, answers - singular.shape[-1])) + alpha
    whiten = (u * spectrum.rsqrt().unsqueeze(-2)).mT
    kept = 1 - (whiten @ centred).square().sum(-2)
    lost = RATIO_PRECISION
    if convention == "svd":
        ratio = kept
    else:
        z = whiten @ (embeddings.double() / _divisor(convention, answers, features) ** 0.5)
        r = z.square().sum(-2)
        if answers < features:
            q, t = ((whiten @ centred) * z).sum(-2), kept - 1 / features
            lost = RATIO_PRECISION * r.clamp(min=1)
        else:
            w = (vt - vt.mean(-1, keepdim=True)) * spectrum[..., :features, None].rsqrt()
            q = (w * singular[..., None] * z[..., :features, :]).sum(-2)
            t = alpha * w.square().sum(-2)
        ratio = (1 - q) ** 2 + r * t
    counted = spectrum.shape[-1] if convention != "svd" else min(answers, features)
    total = spectrum[..., :counted].log().sum(-1, keepdim=True) + ratio.clamp(min=RATIO_PRECISION).log()
    scores = total / (answers * _unit(convention))
    cancelled = (ratio < lost).nonzero(as_tuple=True)
    if len(cancelled[-1]):
        zeroed = embeddings[cancelled[:-1]]
        zeroed = zeroed.expand(len(cancelled[-1]), answers, features)
        zeroed = zeroed.masked_fill(torch.nn.functional.one_hot(cancelled[-1], features).bool().unsqueeze(-2), 0)
        scores[cancelled] = eigenscore(zeroed, convention=convention, alpha=alpha)
    return _finite(scores)


def eigenscore_after_drop(
    embeddings: Tensor, dropped: Tensor, *, convention: Convention = "inside", alpha: float = ALPHA
) -> Tensor:
    """The score after setting a set of features to zero in all answers: float64 of the leading shape.

    `dropped` holds feature numbers, whole numbers (k,). The feature count d of the formulas stays the same. Raises what
    `eigenscore` raises, and InputError for a feature number outside 0..d - 1.
    """
    values = checked_answers(embeddings)
    index = checked_coordinates(dropped, values.shape[-1]).to(values.device)
    return eigenscore(values.index_fill(-1, index, 0), convention=convention, alpha=alpha)


def checked_answers(embeddings: Tensor) -> Tensor:
    """Embeddings (..., K, d) in float64, K and d at least 2 and all finite; InputError otherwise, naming the prompt."""
    if not isinstance(embeddings, Tensor) or embeddings.is_complex():
        got = embeddings.dtype if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise InputError(f"embeddings must be a tensor of real numbers, got {got}")
    if embeddings.ndim < 2:
        raise InputError(f"answers of a prompt must have shape (..., K, d), got {tuple(embeddings.shape)}")
    answers, features = embeddings.shape[-2:]
    if answers < 2:
        raise InputError(f"a score needs at least K = 2 answers per prompt, got {answers}")
    if features < 2:
        raise InputError(f"a score needs at least d = 2 features per answer, got {features}")
    values = embeddings.double()
    finite = torch.isfinite(values.sum((-2, -1)))  # NaN and infinity survive a sum, which is cheaper than testing all
    if not bool(finite.all()):
        prompts = [tuple(index) for index in (~finite).nonzero().tolist()]
        named = ", ".join(str(p[0] if len(p) == 1 else p) for p in prompts[:5]) + (" ..." if len(prompts) > 5 else "")
        where = f"of prompt {named}" if embeddings.ndim > 2 else "of the prompt"
        raise InputError(f"embeddings {where} hold NaN or infinity; a 16-bit model may have overflowed")
    return values


def check_alpha(alpha: float) -> None:
    """InputError unless alpha is a positive finite number."""
    if not (alpha > 0 and math.isfinite(alpha)):
        raise InputError(f"alpha must be a positive finite number, got {alpha}")


def _centred(embeddings: Tensor, convention: Convention, alpha: float) -> Tensor:
    """The factor whose Gram matrix, plus alpha I, the convention scores."""
    if convention not in get_args(Convention):
        raise InputError(f"unknown convention {convention!r}; allowed: {', '.join(get_args(Convention))}")
    check_alpha(alpha)
    values = checked_answers(embeddings)
    centred = values - values.mean(-2 if convention == "svd" else -1, keepdim=True)
    divisor = _divisor(convention, *values.shape[-2:])
    return centred if divisor == 1 else centred.div_(divisor**0.5)


def _finite(values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise InputError("the embeddings are so large that their squares overflow float64; divide them by a constant")
    return values


def _divisor(convention: Convention, answers: int, features: int) -> int:
    return {"inside": 1, "inside-code": features - 1, "svd": answers - 1}[convention]


def _unit(convention: Convention) -> float:
    return math.log(10) if convention == "inside-code" else 1.0


def _null_directions(convention: Convention, answers: int, features: int) -> int:
    """How many eigenvalues equal to alpha the score counts beyond the min(K, d) of the factor."""
    return 0 if convention == "svd" else max(answers - features, 0)


def _squared_singular_values(centred: Tensor) -> Tensor:
    return torch.linalg.svdvals(_square_factor(centred)) ** 2


def _square_factor(centred: Tensor) -> Tensor:
    """(K, K) with the singular values and left vectors of a wide (K, d), by QR; a tall one as it is."""
    answers, features = centred.shape[-2:]
    return torch.linalg.qr(centred.mT, mode="r").R.mT if features > answers else centred
