"""The published experiments: networks, optimisers and batches of the released configuration files."""

from typing import Any


def _experiment(
    eigenpairs: int,
    *,
    phi: dict[str, Any],
    rho: tuple[int, int, str],
    backbone: dict[str, Any],
    batch_size: int,
    lr: float,
    weight_decay: float,
    warmup: int | None,
) -> dict[str, Any]:
    """One column of the table of configurations; rho is layers, width, norm."""
    layers, hidden, norm = rho
    encoding = {"method": "spe", "eigenpairs": eigenpairs, "split": "keep", "masked": False, "rho": "gin"}
    encoding |= {"rho_layers": layers, "rho_hidden": hidden, "mlp_hidden": hidden, "norm": norm} | phi
    return {
        "encoding": encoding,
        "backbone": {"norm": "batch", "inject": "input"} | backbone,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "warmup": warmup,
    }


MLP_16 = {"phi": "mlp", "phi_layers": 3, "phi_hidden": 16, "channels": 16}
DRUGOOD = {"hidden": 64, "layers": 4, "join": "concat"}
PRESETS: dict[str, dict[str, Any]] = {
    "zinc-full": _experiment(
        37,
        phi=MLP_16,
        rho=(8, 128, "batch"),
        backbone={"hidden": 128, "layers": 4, "pooling": "mean"},
        batch_size=128,
        lr=1e-3,
        weight_decay=3e-6,
        warmup=100,
    ),
    "zinc-8": _experiment(
        8,
        phi={"phi": "deepsets", "phi_layers": 4, "phi_hidden": 16, "channels": 6},
        rho=(8, 128, "batch"),
        backbone={"hidden": 128, "layers": 4, "pooling": "mean"},
        batch_size=128,
        lr=1e-3,
        weight_decay=3e-6,
        warmup=100,
    ),
    "alchemy": _experiment(
        12,
        phi=MLP_16 | {"channels": 12},
        rho=(8, 128, "batch"),
        backbone={"hidden": 128, "layers": 16, "pooling": "add"},
        batch_size=128,
        lr=1e-3,
        weight_decay=1e-6,
        warmup=100,
    ),
    "drugood-assay": _experiment(
        32,
        phi={"phi": "one", "channels": 16},
        rho=(3, 64, "none"),
        backbone=DRUGOOD | {"pooling": "mean"},
        batch_size=64,
        lr=1e-4,
        weight_decay=1e-4,
        warmup=None,
    ),
    "drugood-scaffold": _experiment(
        32,
        phi=MLP_16,
        rho=(3, 64, "layer"),
        backbone=DRUGOOD | {"pooling": "mean"},
        batch_size=32,
        lr=1e-4,
        weight_decay=1e-4,
        warmup=None,
    ),
    "drugood-size": _experiment(
        32,
        phi=MLP_16,
        rho=(3, 64, "layer"),
        backbone=DRUGOOD | {"pooling": "add"},
        batch_size=32,
        lr=1e-4,
        weight_decay=1e-4,
        warmup=None,
    ),
    "counting": _experiment(
        30,
        phi={"phi": "mlp", "phi_layers": 4, "phi_hidden": 80, "channels": 8},
        rho=(4, 80, "batch"),
        backbone={"hidden": 80, "layers": 4, "pooling": "add"},
        batch_size=128,
        lr=1e-3,
        weight_decay=1e-4,
        warmup=100,
    ),
}
