"""The search over HAWQ-V2: budget, bit sets, metric, quantiser and fine-tuning, along and around the exact frontier."""

import numpy as np

from library.errors import InputError
from library.hawq.layers import quantizable_layers
from library.hawq.recipe import HawqRecipe
from library.images.data import load_images
from library.images.networks import image_network
from tune_spaces.space import Choice, Domain, Real, Space, Whole

FRACTIONS = (0.27, 0.3, 0.34, 0.375, 0.45, 0.55, 0.7)
UNIFORM = (2, 3, 4, 5, 6, 8)
RANDOM_SETTINGS = 8


def space(recipe: HawqRecipe) -> Space:
    """Accuracy after a short fine-tuning against the size on disk and bit operations.

    `fraction` moves along the frontier of a metric, and the exponent of its curvature around it; quantiser, learning
    rate, distillation and stages change how well a setting is reached. All bit sets hold 2, so that every fraction of
    the range can be met. Baselines, fine-tuned by the base job's own settings and never stopped: the frontier of the
    exact Omega at seven budgets, equal bits everywhere, and random bits.

    Raises InputError for a recipe whose bits are chosen already.
    """
    if recipe.chosen:
        raise InputError("chosen: the bits are given, and the search is over them; leave it out")
    data = load_images(recipe.classifier.images, size=recipe.classifier.image_size)
    layers = len(quantizable_layers(image_network(recipe.classifier.network, data.shape[0], len(data.classes))))
    varies: dict[str, Domain] = {
        "recipe.fraction": Real(0.26, 0.7, log=True),
        "recipe.bits": Choice(("2 3 4 5 6 8", "2 3 4 8", "2 4 8")),
        "recipe.curvature": Choice(("hessian", "ggn", "top-eigenvalue")),
        "recipe.power": Real(0.6, 1.4),
        "recipe.quantizer.granularity": Choice(("channel", "tensor")),
        "recipe.quantizer.clipping": Choice(("minmax", "percentile", "mse")),
        "recipe.lr": Real(1e-4, 3e-2, log=True),
        "recipe.distillation": Real(0.0, 0.95),
        "recipe.stages": Whole(1, 3),
    }
    generator = np.random.Generator(np.random.PCG64(recipe.seed))
    drawn = [tuple(generator.choice(recipe.bits, layers).tolist()) for _ in range(RANDOM_SETTINGS)]
    return Space(
        "hawq",
        varies,
        metric="validation_accuracy",
        mode="max",
        others={"validation_kib": "min", "validation_megabops": "min"},
        samples=32,
        baselines={
            "exact Omega": [{"recipe.fraction": fraction} for fraction in FRACTIONS],
            "equal bits": [{"recipe.chosen": (bits,) * layers} for bits in UNIFORM],
            "random bits": [{"recipe.chosen": bits} for bits in drawn],
        },
    )
