"""Curvature matrices of a model's loss as operators on blocks of vectors; no matrix is formed.

For a loss L(w) = sum_b n_b l_b(w) / sum_b n_b over batches of n_b units, with outputs s = f(w, x):

Hessian               H = d^2 L / dw^2 = G + R
GaussNewton           G = J^T S J, with J = ds/dw and S = d^2 l / ds^2 (the Fisher matrix for cross-entropy)
GradientCovariance    C = (1/N) sum_i g_i g_i^T over samples, g_i = dl_i/dw

An operator A maps a block V of column vectors (n, p) to A V, so it goes wherever `library.spectral` takes one. One
forward and backward pass per batch serves the whole block. Every worker of a distributed run may hold other batches:
products and counts are summed over the workers, so all of them must ask for the same products in the same order.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from library import collective
from library.errors import InputError, NonFiniteError, PrismError
from library.recipe import to_device
from library.spectral.differentiation import batched_grad, evaluation_mode, require_twice_differentiable
from library.spectral.layout import Layout
from library.spectral.trace import Operator, product, random_probes

Loss = Callable[[Any, Any], Tensor]
CHUNK = 8  # backward passes that run as one
DENSE_BYTES = 4 << 30  # the largest matrix that `dense_matrix` forms
FLOOR = 32  # roundings by which the loss may differ between two passes, however small it is


class CurvatureOperator(ABC):
    """A symmetric matrix of second derivatives of a model's mean loss, acting on blocks of vectors.

    `model(input)` gives the output, and `loss(output, target)` the mean loss of the batch's `count(target)` units (by
    default its rows). `data` holds pairs (input, target), or is one such pair of tensors; it is read anew for each
    product and must stay the same.
    `parameters` names those that w consists of, in the model's order: all that require gradients by default; fewer
    give a diagonal block of the matrix. Tied parameters count once. `chunk` bounds how many vectors are differentiated
    at once, and with it the memory: each of them takes about as much as one backward pass. By default 8; 1 for a model
    with convolutions on a CPU, where a batch of them takes longer than one after the other.

    The forward passes run in evaluation mode; each module is put back as it was. float32 products carry rounding
    errors of about 1e-6 of the largest eigenvalue: use a float64 model where signs of small ones matter.

    Raises InputError for data that can be read only once, are empty or do not fit the model or the loss (shapes,
    dtypes, labels out of range), unknown parameters, a block of another length, operations that cannot be
    differentiated twice, and a loss or outputs that change between two passes over the data (augmentation, a shuffling
    loader that drops samples, dropout): the products would be of different matrices.
    Raises NonFiniteError for a loss or product that is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Iterable[tuple[Any, Any]],
        *,
        parameters: Iterable[str] | None = None,
        count: Callable[[Any], int] = len,
        chunk: int | None = None,
    ) -> None:
        if isinstance(data, Iterator):
            raise InputError("data: a generator or iterator can be read only once; give a list or a data loader")
        data = as_batches(data)
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk must be at least 1, got {chunk}")
        trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
        wanted = set(trainable) if parameters is None else set(parameters)
        if not wanted or not wanted <= trainable.keys():
            unknown = ", ".join(sorted(wanted - trainable.keys())) or "none"
            raise InputError(
                f"parameters: {unknown} asked; those that require gradients are {_listed(list(trainable))}"
            )
        self.model, self.loss, self.data, self.count = model, loss, data, count
        self._parameters = {name: value for name, value in trainable.items() if name in wanted}
        self.layout = Layout(tuple(self._parameters), tuple(value.shape for value in self._parameters.values()))
        self.chunk = chunk or (1 if self.device.type == "cpu" and _convolves(model) else CHUNK)
        self._seen: tuple[float, float] | None = None

    @property
    def size(self) -> int:
        """The number of rows n: entries of all parameters."""
        return sum(self.layout.sizes)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, which vectors must have too."""
        return next(iter(self._parameters.values())).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters; results are there."""
        return next(iter(self._parameters.values())).device

    def point(self) -> Tensor:
        """A copy of the parameters w as one vector (n,)."""
        return torch.cat([value.detach().flatten() for value in self._parameters.values()])

    def restrict(self, *names: str) -> Self:
        """The diagonal block of these parameters, as an operator of its own whose products are cheaper."""
        return type(self)(self.model, self.loss, self.data, parameters=names, count=self.count, chunk=self.chunk)

    def probes(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Rademacher probes (n, count) that fit this operator; the same on all workers when their seeds are."""
        options = {"generator": generator, "dtype": self.dtype, "device": self.device}
        return random_probes(count, self.size, **options).mT  # one vector after the other in memory, as parameters are

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """The batches of this worker on the operator's device."""
        for source, target in map(as_pair, self.data):
            yield to_device((source, target), self.device)

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """L(w) and its gradient (n,), over all batches of all workers."""
        value, images = self._sum(lambda _, loss: self._first_derivative(loss, graph=False).unsqueeze(-1), 1)
        return value, images.squeeze(-1)

    def __call__(self, block: Tensor) -> Tensor:
        """A times the columns of `block` (n, p)."""
        if block.ndim != 2 or block.shape[0] != self.size or not block.shape[1]:
            raise InputError(f"a block of shape {tuple(block.shape)} does not fit: ({self.size}, p) is needed, p >= 1")
        block = block.to(device=self.device, dtype=self.dtype)
        return self._finish(self._sum(lambda batch, loss: self._product(batch, loss, block), block.shape[1])[1], block)

    __matmul__ = __call__

    @abstractmethod
    def _product(self, batch: "_Batch", loss: Tensor, block: Tensor) -> Tensor:
        """The batch's mean matrix times the block (n, p)."""

    def _finish(self, image: Tensor, block: Tensor) -> Tensor:
        """What is to be done with a product once it has been summed over all batches."""
        return image

    def _sum(self, term: "Callable[[_Batch, Tensor], Tensor]", columns: int) -> tuple[float, Tensor]:
        """The mean loss and mean of `term` (n, columns) over all units of all workers."""
        total = torch.zeros(3, dtype=torch.float64, device=self.device)
        images: Tensor | None = None
        with evaluation_mode(self.model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            for source, target in self.batches():
                units = self.count(target)
                output, loss = output_and_loss(self.model, self.loss, source, target)
                sums = (
                    units * loss.detach().double(),
                    loss.new_tensor(units, dtype=torch.float64),
                    _energy(output, loss),
                )
                total += torch.stack(sums)
                try:
                    found = term(_Batch(output, target), loss)
                    images = found.mul_(units) if images is None else images.add_(found, alpha=units)
                except RuntimeError as error:
                    if "not implemented" in str(error) or "does not require grad" in str(error):
                        raise InputError(f"the model cannot be differentiated twice: {_first(error)}") from error
                    raise
        mean, units, energy = collective.all_sum(total).tolist()
        if units == 0:
            raise InputError("data: there are no samples")
        value = mean / units
        self._check_same(value, energy / units)
        if images is None:  # this worker holds no batch
            images = torch.zeros(columns, self.size, dtype=self.dtype, device=self.device).mT
        images = (collective.all_sum(images) if collective.active() else images).div_(units)
        if not all(torch.isfinite(end) for end in torch.aminmax(images.mT)):
            raise NonFiniteError("a product with the curvature matrix is not finite")
        return value, images

    def _check_same(self, value: float, energy: float) -> None:
        """Loss and outputs of this pass are those of the first one, or these are not products of one matrix.

        A small loss is mostly rounding, so that the outputs' mean square tells whether it is still of the same data.
        """
        if not value - value == 0:
            raise NonFiniteError(f"the loss is {value}; its derivatives mean nothing")
        if self._seen is None:
            self._seen = value, energy
        before, known = self._seen
        eps = torch.finfo(self.dtype).eps
        if abs(value - before) > eps**0.5 * abs(before) + FLOOR * eps or abs(energy - known) > eps**0.5 * known:
            raise InputError(
                f"the loss changed from {before:.6g} to {value:.6g} between two passes over the data, or the outputs "
                "did, so this is not one symmetric operator: the data are augmented or not always the same, the model "
                "is random (dropout), or its parameters were changed"
            )

    def _first_derivative(self, value: Tensor, *, graph: bool = True) -> Tensor:
        """d value / dw as one vector (n,), differentiable when `graph`."""
        return torch.cat([piece.flatten() for piece in self._grad(value, None, graph=graph)])

    def _grad(self, value: Tensor, seed: Tensor | None, *, graph: bool) -> list[Tensor]:
        parameters = tuple(self._parameters.values())
        if not value.requires_grad:
            return [torch.zeros_like(parameter) for parameter in parameters]
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        found = list(torch.autograd.grad(value, parameters, seed, create_graph=graph, **options))
        if graph and self._seen is None:
            require_twice_differentiable(found)
        return found

    def _pulled_back(self, outputs: Sequence[Tensor], seeds: Sequence[Tensor]) -> Tensor:
        """Columns (n, p) of J^T times each of p seeds, for outputs that depend on w; seeds are (p, *output)."""
        columns = torch.empty(len(seeds[0]), self.size, dtype=self.dtype, device=self.device)
        rows = columns.split(self.chunk)
        for into, chunk in zip(rows, zip(*(seed.split(self.chunk) for seed in seeds), strict=True), strict=True):
            found = batched_grad(outputs, tuple(self._parameters.values()), chunk)
            torch.cat([piece.flatten(1) for piece in found], 1, out=into)
        return columns.mT


class Hessian(CurvatureOperator):
    """The Hessian H of a model's mean loss: products H v = d(g^T v)/dw, a block of them on one graph of the gradient.

    >>> model = nn.Linear(2, 1, bias=False).double()
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    >>> hessian = Hessian(model, nn.functional.mse_loss, [(x, torch.zeros(2, 1, dtype=torch.float64))])
    >>> hessian @ torch.eye(2, dtype=torch.float64)  # (2/N) X^T X
    tensor([[1., 0.],
            [0., 4.]], dtype=torch.float64)

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", 1994. See `CurvatureOperator` for the arguments.
    """

    def _product(self, batch: "_Batch", loss: Tensor, block: Tensor) -> Tensor:
        return self._pulled_back(self._grad(loss, None, graph=True), self.layout.split(block))


class GaussNewton(CurvatureOperator):
    """The generalised Gauss-Newton matrix G = J^T S J: positive semi-definite for a loss that is convex in the output.

    S = d^2 l / ds^2 comes from the loss by differentiation, so any loss will do: diag(p) - p p^T for cross-entropy.
    The model's output must be one tensor. H - G = R is small where the residuals dl/ds are.
    Source: Schraudolph, "Fast curvature matrix-vector products", 2002. See `CurvatureOperator` for the arguments.
    """

    def _product(self, batch: "_Batch", loss: Tensor, block: Tensor) -> Tensor:
        output = _single(batch.output)
        tangents = self._pushed_forward(output, block)
        free = output.detach().requires_grad_()
        slope = torch.autograd.grad(self.loss(free, batch.target), free, create_graph=True)[0]
        curved = batched_grad([slope], (free,), (tangents,))[0]
        return self._pulled_back([output], [curved])

    def pull_back(self, seeds: Callable[[Tensor, Any], Tensor], count: int) -> Tensor:
        """(1/N) sum of J^T a over all units, (n, count), for cotangents `seeds(output, target)` (count, *output).

        Class means of logit gradients are of this form.
        """

        def term(batch: _Batch, loss: Tensor) -> Tensor:
            output = _single(batch.output)
            return self._pulled_back([output], [seeds(output.detach(), batch.target)]) / self.count(batch.target)

        return self._sum(term, count)[1]

    def _pushed_forward(self, output: Tensor, block: Tensor) -> Tensor:
        """J V as (p, *output), through the derivative of J^T a, which is linear in a."""
        dual = torch.zeros_like(output, requires_grad=True)
        pulled = self._grad(output, dual, graph=True)
        seeds = self.layout.split(block)
        parts = zip(*(seed.split(self.chunk) for seed in seeds), strict=True)
        return torch.cat([batched_grad(pulled, (dual,), part)[0] for part in parts])


class GradientCovariance(CurvatureOperator):
    """The covariance of per-sample gradients, C = (1/N) sum_i g_i g_i^T; with `centred`, C - g g^T.

    `loss` must be the mean over the rows of the batch, each row being one sample that the others do not influence.
    Its expectation is the Fisher matrix G when labels are drawn from the model; with the given labels C is the
    "empirical Fisher" matrix. See `CurvatureOperator` for the other arguments.
    """

    def __init__(self, *arguments: Any, centred: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.centred = centred
        self._mean: Tensor | None = None

    def restrict(self, *names: str) -> Self:
        """The diagonal block of these parameters, as an operator of its own whose products are cheaper."""
        block = super().restrict(*names)
        block.centred = self.centred
        return block

    def _product(self, batch: "_Batch", loss: Tensor, block: Tensor) -> Tensor:
        output = _single(batch.output)
        losses = torch.func.vmap(self.loss)(output.unsqueeze(1), batch.target.unsqueeze(1))
        dual = torch.zeros_like(losses, requires_grad=True)
        pulled = self._grad(losses, dual, graph=True)
        parts = zip(*(seed.split(self.chunk) for seed in self.layout.split(block)), strict=True)
        slopes = torch.cat([batched_grad(pulled, (dual,), part)[0] for part in parts])
        return self._pulled_back([losses], [slopes / len(losses)])

    def _finish(self, image: Tensor, block: Tensor) -> Tensor:
        if not self.centred:
            return image
        if self._mean is None:
            self._mean = self.loss_and_gradient()[1]
        return image - torch.outer(self._mean, self._mean @ block)


def dense_matrix(operator: CurvatureOperator) -> Tensor:
    """The whole matrix (n, n), symmetrised, by n products in one block.

    Raises InputError when it would take more than 4 GiB, or when A and A^T differ by more than rounding.
    """
    size = operator.size
    if size * size * operator.dtype.itemsize > DENSE_BYTES:
        raise InputError(
            f"a dense matrix of {size} x {size} entries takes {size * size * operator.dtype.itemsize / 2**30:.1f} GiB, "
            f"more than {DENSE_BYTES >> 30}; ask for top eigenvalues, traces or a density instead"
        )
    matrix = operator(torch.eye(size, dtype=operator.dtype, device=operator.device))
    if not bool(((matrix - matrix.mT).abs() <= torch.finfo(matrix.dtype).eps ** 0.5 * matrix.abs().max()).all()):
        raise InputError("the operator is not symmetric: its dense matrix and the transpose differ")
    return (matrix + matrix.mT) / 2


def require_symmetric(operator: Operator, probes: Tensor) -> None:
    """Raise InputError unless u^T (A v) = v^T (A u), to rounding, for the first two columns of `probes` (n, p).

    The two products are made one after the other, so that an operator that changes between products is found out.
    """
    u, v = probes[..., :1], probes[..., 1:2]
    image_v, image_u = product(operator, v), product(operator, u)
    difference = float(((u * image_v).sum() - (v * image_u).sum()).abs())
    size = float(u.norm() * image_v.norm() + v.norm() * image_u.norm())
    if not difference <= torch.finfo(probes.dtype).eps ** 0.5 * size:
        raise InputError(
            "the operator is not symmetric: u^T (A v) and v^T (A u) differ; it changes between products, or is not "
            "a matrix of second derivatives"
        )


def as_batches(data: Iterable[tuple[Any, Any]]) -> Iterable[tuple[Any, Any]]:
    """A single pair (input, target) of tensors as a list of one batch; anything else as it is."""
    return [data] if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor) else data


def as_pair(batch: Any) -> tuple[Any, Any]:
    """A batch as (input, target). Raises InputError when it is not a pair."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise InputError(f"data: a batch must be a pair (input, target), got {type(batch).__name__}")
    return batch[0], batch[1]


def output_and_loss(model: nn.Module, loss: Loss, source: Any, target: Any) -> tuple[Any, Tensor]:
    """Output and loss of one batch. Raises InputError when it does not fit the model, or the loss is no scalar."""
    try:
        output = model(source)
        value = loss(output, target)
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, PrismError | torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise
        raise InputError(f"data: a batch does not fit the model or the loss: {_first(error)}") from error
    if not isinstance(value, Tensor) or value.ndim != 0:
        raise InputError("loss must return a scalar tensor, the mean over the batch")
    return output, value


def _energy(output: Any, like: Tensor) -> Tensor:
    """The sum of squares of a tensor of outputs; 0 for any other output."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return like.new_zeros((), dtype=torch.float64)
    return torch.linalg.vector_norm(output.detach()).double().square()


@dataclass(frozen=True)
class _Batch:
    output: Any
    target: Any


def _single(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise InputError(f"the model's output must be one tensor, got {type(output).__name__}; wrap the model")
    return output


def _convolves(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"
