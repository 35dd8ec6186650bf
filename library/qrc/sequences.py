"""What a forecaster takes and gives: one series, a batch of equal ones, or several of unequal lengths."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.errors import InputError


@dataclass(frozen=True)
class Batch:
    """Series of numbers as one tensor: `values` float64 (series, time, columns), shorter ones padded at their end.

    `lengths` are the true ones. `single` and `flat` say whether the caller gave one series, and no axis of columns.
    """

    values: Tensor
    lengths: tuple[int, ...]
    single: bool
    flat: bool

    @classmethod
    def of(cls, given: Any, name: str, *, device: str = "cpu") -> "Batch":
        """A batch of (time,), (time, columns) or (series, time, columns), or of a list of the first two.

        Raises InputError for other shapes, no rows, columns that differ, and values that are not finite numbers.
        """
        if isinstance(given, list | tuple) and len(given) and np.ndim(given[0]) > 0 and _unequal(given):
            parts = [cls.of(part, f"{name}[{number}]", device=device) for number, part in enumerate(given)]
            if len({part.values.shape[2] for part in parts}) > 1 or not all(part.single for part in parts):
                raise InputError(f"{name}: its series differ in their columns")
            longest = max(part.lengths[0] for part in parts)
            padded = [torch.cat([p.values[0], p.values[0, -1:].expand(longest - p.lengths[0], -1)]) for p in parts]
            return cls(torch.stack(padded), tuple(p.lengths[0] for p in parts), False, parts[0].flat)
        try:
            values = torch.as_tensor(given if isinstance(given, Tensor) else np.asarray(given, np.float64))
        except (TypeError, ValueError) as error:
            raise InputError(f"{name}: not numbers ({error})") from error
        values = values.to(device, torch.float64)
        single, flat = values.ndim < 3, values.ndim == 1
        if values.ndim not in (1, 2, 3) or not values.numel():
            raise InputError(
                f"{name} has shape {tuple(values.shape)}; allowed are (time,), (time, columns) and "
                "(series, time, columns), none of them 0"
            )
        values = values[:, None] if flat else values
        values = values[None] if values.ndim == 2 else values
        wrong = (~torch.isfinite(values)).nonzero()
        if len(wrong):
            series, row, column = wrong[0].tolist()
            raise InputError(
                f"{name}: {len(wrong)} values are not finite, the first in series {series}, row {row}, column {column}"
            )
        return cls(values, (values.shape[1],) * len(values), single, flat)

    def aligned(self, given: Any, name: str) -> "Batch":
        """A batch of targets for these series: (series, time) is a number for each row of several.

        Raises InputError where the rows are not as many.
        """
        device = str(self.values.device)
        flat = not self.single and len(set(self.lengths)) == 1 and np.ndim(given) == 2
        found = Batch.of(np.asarray(given)[..., None] if flat else given, name, device=device)
        if found.lengths != self.lengths:
            raise InputError(
                f"{name} has series of {found.lengths} rows, X of {self.lengths}; a row for each is needed"
            )
        return replace(found, flat=flat or found.flat)

    def mask(self, first: int, dropped: int = 0) -> Tensor:
        """Which rows count, (series, time): from `first` to the end of each series without its `dropped` last rows."""
        rows = torch.arange(self.values.shape[1], device=self.values.device)
        ends = torch.tensor(self.lengths, device=self.values.device)[:, None] - dropped
        return (rows >= first) & (rows < ends)

    def given_back(self, values: Tensor, *, flat: bool) -> Any:
        """Values (series, time, columns) as the caller gave the series: an array, or a list for unequal lengths."""
        found = values.detach().cpu().numpy()
        found = found[..., 0] if flat else found
        if len(set(self.lengths)) > 1:
            return [each[:length] for each, length in zip(found, self.lengths, strict=True)]
        return found[0] if self.single else found


def _unequal(given: Sequence[Any]) -> bool:
    return len({np.shape(part) for part in given}) > 1 or isinstance(given[0], np.ndarray | Tensor)
