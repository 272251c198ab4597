"""The benchmark of strong augmentation: which images each size takes."""

import numpy as np
import pytest

from benchmarks import augmentation


def test_images_are_the_named_ones_or_an_error_never_silently_the_embedded_digits(monkeypatch):
    embedded = augmentation.pictures_of(None)
    assert embedded.x.shape == (3500, 32, 32, 1)
    rows = (np.zeros((4, 28, 28, 1), np.uint8), np.arange(4))
    monkeypatch.setattr(augmentation.data, "load", lambda name, split: rows)
    found = augmentation.pictures_of("fashion_mnist")
    assert found.x.shape == (4, 28, 28, 1) and found.notes == ("Fashion-MNIST, not CIFAR-10",)

    def absent(*args, **options):
        raise FileNotFoundError("prepare it")

    monkeypatch.setattr(augmentation.data, "load", absent)
    for name in ("fashion_mnist", "cifar10"):
        with pytest.raises(FileNotFoundError, match="prepare it"):
            augmentation.pictures_of(name)
    assert augmentation.images(fallback=True).notes == embedded.notes
