"""The benchmark of strong augmentation: which images each size takes."""

import numpy as np

from benchmarks import augmentation


def test_images_are_the_named_ones_or_the_embedded_digits(monkeypatch):
    embedded = augmentation.pictures_of(None)
    assert embedded.x.shape == (3500, 32, 32, 1)
    rows = (np.zeros((4, 28, 28, 1), np.uint8), np.arange(4))
    monkeypatch.setattr(augmentation.data, "load", lambda name, split: rows)
    found = augmentation.pictures_of("fashion_mnist")
    assert found.x.shape == (4, 28, 28, 1) and found.notes == ("Fashion-MNIST, not CIFAR-10",)

    def absent(*args, **options):
        raise FileNotFoundError

    monkeypatch.setattr(augmentation.data, "load", absent)
    assert augmentation.pictures_of("fashion_mnist").notes == embedded.notes
    assert augmentation.pictures_of("cifar10").notes == embedded.notes
