import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from library.errors import ArtifactError, InputError
from library.images import image_network, image_splits, load_images
from library.images.data import Images, stacked
from library.images.recipe import ClassifierRecipe, load_classifier, one_cycle
from library.recipe import fit, make_batch


def test_the_sample_is_balanced_and_standardised():
    data = load_images()
    assert data.train.pixels.shape == (10_000, 1, 28, 28)
    assert torch.bincount(data.train.labels).tolist() == [1000] * 10
    assert torch.bincount(data.test.labels).tolist() == [200] * 10
    assert data.mean[0] == pytest.approx(0.2860, abs=1e-3)  # published for all 60 000 images
    assert data.std[0] == pytest.approx(0.3530, abs=1e-3)
    splits = image_splits(data)
    batch = stacked(splits, splits.train)
    assert batch.pixels.mean().abs() < 0.01
    assert batch.pixels.std() == pytest.approx(1, abs=0.01)


def test_splits_share_no_image_and_depend_on_the_seed_alone():
    data = load_images()
    splits = image_splits(data, validation_fraction=0.2, train_images=5000, seed=3)
    train, validation = set(splits.train.indices), set(splits.validation.indices)
    assert (len(train), len(validation), len(splits.test)) == (5000, 2000, 2000)
    assert not train & validation
    again, other = (image_splits(data, validation_fraction=0.2, train_images=5000, seed=seed) for seed in (3, 4))
    assert again.train.indices == splits.train.indices
    assert again.fingerprint == splits.fingerprint != other.fingerprint
    batch = make_batch(splits, splits.train, [4, 7], [0, 0])
    assert batch.labels.tolist() == [splits.train[4][1], splits.train[7][1]]


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"train_images": 9001}, "9001 to training"), ({"validation_fraction": 1e-9}, "cannot give"), ({}, None)],
)
def test_a_split_that_would_be_empty_is_refused(changes, match):
    if match is None:
        assert len(image_splits(load_images()).train) == 9000
        return
    with pytest.raises(InputError, match=match):
        image_splits(load_images(), **changes)


def arrays(count=12, shape=(5, 4)):
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (count, *shape), dtype=np.uint8) for _ in range(2)]
    labels = [np.arange(count) % 3 for _ in range(2)]
    return {"x_train": images[0], "y_train": labels[0], "x_test": images[1], "y_test": labels[1]}


def test_npz_and_idx_files_give_the_same_images(tmp_path):
    made = arrays()
    np.savez(tmp_path / "set.npz", **made)
    folder = tmp_path / "idx"
    folder.mkdir()
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = made[f"x_{part}"], made[f"y_{part}"].astype(np.uint8)
        header = struct.pack(">HBBiii", 0, 8, 3, *images.shape)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = struct.pack(">HBBi", 0, 8, 1, len(labels))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    first, second = load_images(str(tmp_path / "set.npz")), load_images(str(folder))
    assert first.shape == (1, 5, 4)
    assert torch.equal(first.train.pixels[:, 0], torch.from_numpy(made["x_train"]))
    assert first.fingerprint == second.fingerprint
    assert first.classes == second.classes == ("0", "1", "2")


def test_folders_of_classes_are_read_one_image_at_a_time(tmp_path):
    for part in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (40, 30), (50 * label, 10 * i, 7)).save(tmp_path / part / name / f"{i}.png")
    data = load_images(str(tmp_path), size=16)
    assert (len(data.train), len(data.test), data.classes) == (6, 6, ("cat", "dog"))
    pixels, label = data.train[4]
    assert label == 1
    assert pixels.shape == data.shape == (3, 16, 16)
    assert pixels[:, 3, 3].tolist() == [50, 10, 7]
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"0\.png is not an image"):
        data.train[0]


def test_malformed_sources_are_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="no images at 'nowhere'"):
        load_images("nowhere")
    with pytest.raises(InputError, match="no train and val folders"):
        load_images(str(tmp_path))
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match="not an NPZ file"):
        load_images(str(tmp_path / "text.npz"))
    np.savez(tmp_path / "part.npz", x_train=arrays()["x_train"])
    with pytest.raises(InputError, match="lacks x_test, y_test, y_train"):
        load_images(str(tmp_path / "part.npz"))
    np.savez(tmp_path / "real.npz", **(arrays() | {"x_train": np.zeros((12, 5, 4))}))
    with pytest.raises(InputError, match="x_train must be uint8"):
        load_images(str(tmp_path / "real.npz"))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03short")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(InputError, match="not a whole file"):
        load_images(str(tmp_path))


def test_networks_have_the_published_sizes():
    plain = image_network("cnn8")
    assert sum(m.weight.numel() for m in plain.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)) == 79_120
    resnet = image_network("resnet20", 3, 10)
    convolutions = [m for m in resnet.modules() if isinstance(m, torch.nn.Conv2d)]
    assert sum(m.kernel_size == (3, 3) for m in convolutions) == 19
    plain = sum(p.numel() for p in resnet.parameters()) - sum(
        p.numel() for name, p in resnet.named_parameters() if "shortcut" in name
    )
    assert plain == 269_722  # 0.27 M in table 6 of He et al.
    assert resnet(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(InputError, match="unknown network 'vgg'; there are cnn8"):
        image_network("vgg")


def test_the_rate_rises_to_its_peak_and_falls_to_nothing():
    rates = [one_cycle(step, steps=100, warmup=0.3) for step in range(101)]
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == rates[30] == pytest.approx(1)
    assert rates[100] == pytest.approx(0, abs=1e-12)


def test_a_classifier_learns_and_loads(tmp_path):
    recipe = ClassifierRecipe(steps=30, batch_size=64)
    artifact = fit(recipe, path=tmp_path / "artifact", device="cpu")
    assert artifact.metrics["accuracy"] > 0.5
    model, found = load_classifier(artifact)
    splits = found.datasets()
    with torch.no_grad():
        metrics = found.evaluate(model, [stacked(splits, splits.validation)])
    assert metrics["accuracy"] == pytest.approx(artifact.metrics["accuracy"], abs=2e-3)
    assert isinstance(load_images().train, Images)
    broken = artifact.manifest.model_copy(update={"kind": "send"})
    with pytest.raises(ArtifactError, match="not of 'classifier'"):
        load_classifier(type(artifact)(artifact.path, broken))
