"""Sensitivity of embedding coordinates: how far each travels, and how widely it varies, between checkpoints.

For text n and checkpoint t = 1..T let e[t, n, i] be coordinate i of the text's embedding. The net change is
C[n, i] = sum_{t >= 2} |e[t, n, i] - e[t - 1, n, i]|, the variance V[n, i] is that over t (population), and the
sensitivity their product. A product is cubic in the coordinate's scale, so one with large outliers is always chosen;
`normalise` is the variant that divides each coordinate by its standard deviation over the texts first.
Source: "Hallucination Detox: Sensitivity Dropout", 2024, and its published analysis.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from library.errors import InputError

Selection = Literal["product", "change", "variance"]

SCALE_POWER: dict[Selection, int] = {"product": 3, "change": 1, "variance": 2}
"""Degree in which each score grows with the scale of a coordinate."""


class Record(NamedTuple):
    """What the checkpoints seen so far leave behind, however many they were: 4 N d numbers and a count.

    `count` int64 (); `previous` the last embeddings, `change` the net change, `mean` and `m2` Welford's mean and sum of
    squared deviations over checkpoints, all (N, d) of float32 or float64.
    """

    count: Tensor
    previous: Tensor
    change: Tensor
    mean: Tensor
    m2: Tensor


def empty_record(
    texts: int, features: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Record:
    """The record of `texts` texts before the first checkpoint. Raises InputError for no text or no feature."""
    if texts < 1 or features < 1:
        raise InputError(f"a sensitivity record needs at least one text and one feature, got {texts} and {features}")
    zeros = [torch.zeros(texts, features, dtype=dtype, device=device) for _ in range(4)]
    return Record(torch.zeros((), dtype=torch.int64, device=device), *zeros)


def update(record: Record, embeddings: Tensor) -> Record:
    """The record after one more checkpoint with embeddings (N, d); the given record is left as it was.

    Raises InputError when the shape is not that of the record, an embedding is not finite (naming the texts), or the
    record is held in 16 bits, where sums over checkpoints lose their meaning.
    """
    if embeddings.shape != record.mean.shape:
        raise InputError(
            f"embeddings have shape {tuple(embeddings.shape)} where earlier checkpoints had {tuple(record.mean.shape)}"
        )
    if record.mean.dtype not in (torch.float32, torch.float64):
        raise InputError(f"a sensitivity record must be float32 or float64, got {record.mean.dtype}")
    _require_finite(embeddings)
    now = embeddings.to(record.mean)
    count = record.count + 1
    step = torch.where(record.count > 0, (now - record.previous).abs(), 0.0)
    deviation = now - record.mean
    mean = record.mean + deviation / count
    return Record(count, now.clone(), record.change + step, mean, record.m2 + deviation * (now - mean))


def record_of(embeddings: Tensor) -> Record:
    """The record of all checkpoints at once, from embeddings (T, N, d), in float64.

    Raises InputError for another number of dimensions, an empty one, or embeddings that are not finite.
    """
    if embeddings.ndim != 3 or 0 in embeddings.shape:
        raise InputError(f"embeddings over checkpoints must have shape (T, N, d), got {tuple(embeddings.shape)}")
    _require_finite(embeddings.transpose(0, 1))
    values = embeddings.double()
    mean = values.mean(0)
    return Record(
        count=torch.tensor(len(values), device=values.device),
        previous=values[-1].clone(),
        change=values.diff(dim=0).abs().sum(0),
        mean=mean,
        m2=(values - mean).square().sum(0),
    )


def net_change(record: Record) -> Tensor:
    """C (N, d), the path length of each coordinate. Raises InputError for fewer than two checkpoints."""
    _require_two(record)
    return record.change


def variance(record: Record) -> Tensor:
    """V (N, d), the population variance over checkpoints. Raises InputError for fewer than two checkpoints."""
    _require_two(record)
    return record.m2 / record.count


def per_text(record: Record, selection: Selection = "product") -> Tensor:
    """C V, C or V of every text (N, d), by `selection`: "product", "change" or "variance".

    Raises InputError for fewer than two checkpoints or an unknown selection.
    """
    _check_selection(selection)
    if selection == "product":
        return net_change(record) * variance(record)
    return net_change(record) if selection == "change" else variance(record)


def partial_sums(record: Record, selection: Selection = "product") -> Tensor:
    """This worker's share of the mean over texts: sums over its N texts (d,), then N; shape (d + 1,).

    Add the vectors of all workers (an all-reduce), then `mean_sensitivity`. Raises what `per_text` raises.
    """
    scores = per_text(record, selection)
    return torch.cat([scores.sum(0), scores.new_tensor([len(scores)])])


def mean_sensitivity(sums: Tensor) -> Tensor:
    """The mean over all texts (d,), from partial sums (d + 1,) added over workers."""
    return sums[:-1] / sums[-1]


def scale_sums(record: Record) -> Tensor:
    """This worker's share of the spread over texts of each coordinate's mean over checkpoints, float64 (2, d + 1).

    The rows are the sums of m and of m^2 over its texts, each followed by N. Add them over workers and pass the sum to
    `scale_over_texts`. Raises InputError before the first checkpoint.
    """
    if int(record.count) == 0:
        raise InputError("no checkpoint has been recorded yet")
    mean = record.mean.double()
    count = mean.new_full((2, 1), len(mean))
    return torch.cat([torch.stack([mean.sum(0), mean.square().sum(0)]), count], dim=-1)


def scale_over_texts(sums: Tensor) -> Tensor:
    """Population standard deviation (d,) of each coordinate over all texts, from `scale_sums` added over workers.

    A spread within rounding of the coordinate's magnitude is 0. Raises InputError for fewer than two texts.
    """
    texts = int(sums[0, -1])
    if texts < 2:
        raise InputError(f"normalising needs at least two texts to take a standard deviation over, got {texts}")
    first, second = sums[:, :-1] / texts
    spread = second - first.square()
    return torch.where(spread > texts * torch.finfo(sums.dtype).eps * second, spread, 0.0).sqrt()


def normalised(sensitivity: Tensor, scale: Tensor, selection: Selection = "product") -> Tensor:
    """The sensitivity (d,) of coordinates divided by their `scale` (d,): S / scale^3, C / scale or V / scale^2.

    Coordinates that are the same for every text (scale 0), such as dropped ones, get 0. Raises InputError for shapes
    that differ, and an unknown selection.
    """
    _check_selection(selection)
    if sensitivity.shape != scale.shape:
        raise InputError(
            f"sensitivities of shape {tuple(sensitivity.shape)} do not fit scales of shape {tuple(scale.shape)}"
        )
    divisor = torch.where(scale > 0, scale, 1.0) ** SCALE_POWER[selection]
    return torch.where(scale > 0, sensitivity / divisor, 0.0)


def sensitivity(embeddings: Tensor, selection: Selection = "product", *, normalise: bool = False) -> Tensor:
    """The mean sensitivity of each coordinate, float64 (d,), from embeddings (T, N, d) of T checkpoints and N texts.

    With `normalise`, coordinates are first divided by the standard deviation over texts of their mean over
    checkpoints. Raises InputError for T < 2, embeddings that are not finite, or N < 2 with `normalise`.

    >>> e = torch.tensor([[[0.0, 1.0]], [[2.0, 1.0]]])  # the first coordinate moves by 2, with variance 1
    >>> sensitivity(e)
    tensor([2., 0.], dtype=torch.float64)
    """
    record = record_of(embeddings)
    mean = mean_sensitivity(partial_sums(record, selection))
    return normalised(mean, scale_over_texts(scale_sums(record)), selection) if normalise else mean


def drop_count(fraction: float, features: int) -> int:
    """How many of `features` coordinates a fraction is: k = int(fraction * d), a product in float64, as published.

    So a product that rounding leaves just below a whole number counts one less: 0.29 of 100 is 28. Raises InputError
    for a fraction outside (0, 1) or one so small that k = 0.
    """
    if not 0 < fraction < 1:
        raise InputError(f"drop fraction must lie strictly between 0 and 1, got {fraction}")
    count = int(fraction * features)
    if not 0 < count < features:
        raise InputError(
            f"drop fraction {fraction} of {features} coordinates is {count}; it must be 1 to {features - 1}"
        )
    return count


def top_indices(scores: Tensor, count: int) -> Tensor:
    """The `count` coordinates with the largest scores (d,), by falling score, the smaller index first among equals.

    int64 (count,). Raises InputError for scores of another shape, one that is NaN, or a count outside 1..d - 1.
    """
    if scores.ndim != 1:
        raise InputError(f"scores of coordinates must have shape (d,), got {tuple(scores.shape)}")
    _check_count(count, len(scores))
    if bool(scores.isnan().any()):
        raise InputError(f"sensitivity of coordinate {int(scores.isnan().nonzero()[0])} is NaN")
    return torch.sort(scores, descending=True, stable=True).indices[:count]


def random_indices(features: int, count: int, *, generator: torch.Generator) -> Tensor:
    """`count` of `features` coordinates drawn without replacement: the "random" selection. int64 (count,), rising.

    Raises InputError for a count outside 1..features - 1.
    """
    _check_count(count, features)
    return torch.randperm(features, generator=generator, device=generator.device)[:count].sort().values


def checked_coordinates(index: Tensor | Sequence[int], features: int) -> Tensor:
    """The coordinates `index` as int64 (k,). InputError unless they are whole numbers from 0 to `features` - 1."""
    found = torch.as_tensor(index)
    if found.ndim == 1 and not len(found):
        return found.to(torch.int64)
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if found.ndim != 1 or not whole or not bool(((found >= 0) & (found < features)).all()):
        raise InputError(
            f"coordinates to drop must be whole numbers from 0 to {features - 1} in a row, "
            f"got {found.dtype} {found.flatten().tolist()[:8]} of shape {tuple(found.shape)}"
        )
    return found.to(torch.int64)


def _check_selection(selection: str) -> None:
    if selection not in get_args(Selection):
        raise InputError(f"unknown selection {selection!r}; allowed here: {', '.join(get_args(Selection))}")


def _check_count(count: int, features: int) -> None:
    if not 0 < count < features:
        raise InputError(f"cannot choose {count} of {features} coordinates; allowed: 1 to {features - 1}")


def _require_two(record: Record) -> None:
    if int(record.count) < 2:
        raise InputError(f"sensitivity needs at least 2 checkpoints, got {int(record.count)}")


def _require_finite(embeddings: Tensor) -> None:
    """`embeddings` has texts first."""
    finite = torch.isfinite(embeddings).flatten(1).all(1)
    if not bool(finite.all()):
        texts = (~finite).nonzero().flatten().tolist()
        named = ", ".join(map(str, texts[:5])) + (" ..." if len(texts) > 5 else "")
        raise InputError(f"embeddings of text {named} hold NaN or infinity; a 16-bit model may have overflowed")
