"""Data sets: shapes, normalisation, fingerprints, and one clear error for every kind of damage."""

import hashlib
import io
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from geodesic import data, experiment
from PIL import Image


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GEODESIC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path, cache):
    """Two classes of 4×6 images, three a class for training and two for testing; class 1 is brighter."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            sub = tmp_path / "pets" / part / name
            sub.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 100, (4, 6, 3), dtype=np.uint8) + 150 * label
                Image.fromarray(image.astype(np.uint8)).save(sub / f"{i}.png")
    return tmp_path / "pets"


@pytest.mark.parametrize("name", ["digits", "moons", "circles", "spirals"])
def test_bundled_sets_are_normalised_by_the_training_set(name):
    """Mean 0 and deviation 1 per channel of the training set. Rounding of float32 sums."""
    got = data.load(name)
    axes = [axis for axis in range(got.x_train.ndim) if axis != 1]
    torch.testing.assert_close(got.x_train.mean(axes), torch.zeros(got.x_train.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.x_train.std(axes), torch.ones(got.x_train.shape[1]), atol=1e-5, rtol=0)
    assert got.y_train.dtype == torch.int64
    assert set(got.y_test.tolist()) == set(range(len(got.classes)))


def test_loading_twice_gives_the_same_fingerprint_and_points():
    a, b = data.load("spirals"), data.load("spirals")
    assert a.fingerprint == b.fingerprint
    assert (a.x_train == b.x_train).all()


def test_fingerprints_tell_sets_apart():
    assert len({data.load(name).fingerprint for name in ("digits", "moons", "circles", "spirals")}) == 4


def test_folder_reads_every_image_with_its_label(folder):
    """Class 1 is brighter: labels survive the mixing of the order."""
    got = data.load(f"folder:{folder}")
    assert got.x_train.shape == (6, 3, 4, 6)
    assert got.classes == ("cat", "dog")
    bright = got.x_train.mean((1, 2, 3)) > 0
    assert (bright.long() == got.y_train).all()
    assert sorted(got.y_test.tolist()) == [0, 0, 1, 1]


def test_relative_folder_is_found_under_root(folder):
    """The name in settings and records is the folder's, whatever machine it lies on; an absolute one still works."""
    got = data.load("folder:pets", folder.parent)
    assert got.name == "folder:pets"
    assert got.fingerprint == data.load(f"folder:{folder}").fingerprint


def test_folder_is_decoded_once(folder, cache, monkeypatch):
    first = data.load(f"folder:{folder}")
    monkeypatch.setattr(data, "_read_image", lambda _: pytest.fail("decoded again"))
    assert data.load(f"folder:{folder}").fingerprint == first.fingerprint
    assert len(list(cache.iterdir())) == 1


def test_a_changed_image_is_noticed(folder):
    before = data.load(f"folder:{folder}").fingerprint
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / "train" / "cat" / "0.png")
    assert data.load(f"folder:{folder}").fingerprint != before


def test_a_torn_cache_is_made_again(folder, cache):
    before = data.load(f"folder:{folder}").fingerprint
    (cached,) = cache.iterdir()
    cached.write_bytes(cached.read_bytes()[:50])
    assert data.load(f"folder:{folder}").fingerprint == before


def test_folder_names_the_unreadable_image(folder):
    bad = folder / "test" / "dog" / "0.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cannot read image .*dog/0.png"):
        data.load(f"folder:{folder}")


def test_folder_names_the_image_of_another_size(folder):
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(folder / "train" / "dog" / "1.png")
    with pytest.raises(ValueError, match=r"resize it"):
        data.load(f"folder:{folder}")


def test_folder_refuses_other_classes_in_the_test_set(folder):
    (folder / "test" / "dog").rename(folder / "test" / "wolf")
    with pytest.raises(ValueError, match="class folders differ between train and test: dog, wolf"):
        data.load(f"folder:{folder}")


def test_folder_refuses_an_empty_class(folder):
    for image in (folder / "train" / "cat").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match="cat holds no image"):
        data.load(f"folder:{folder}")


def test_folder_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*train; an image folder needs"):
        data.load(f"folder:{tmp_path}")


def write_mnist(root, n_train=60_000, n_test=10_000):
    """MNIST's own file format, filled with its index; big-endian headers."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", n_train), ("t10k", n_test)):
        images = np.zeros((n, 28, 28), np.uint8)
        images[:, 0, 0] = np.arange(n) % 251
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes())
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())
    return raw


def test_mnist_reads_its_own_format(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setenv("GEODESIC_DATA", str(tmp_path))
    got = data.load("mnist")
    assert got.x_train.shape == (60_000, 1, 28, 28)
    assert got.y_test[:12].tolist() == [*range(10), 0, 1]


def test_mnist_cut_short_is_refused(tmp_path):
    raw = write_mnist(tmp_path)
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"MNIST under .* is damaged"):
        data.load("mnist", tmp_path)


def test_mnist_of_another_size_is_refused(tmp_path):
    write_mnist(tmp_path, n_train=500)
    with pytest.raises(ValueError, match="holds 500 points, not 60000"):
        data.load("mnist", tmp_path)


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """A small archive in CIFAR-100's layout, as it is downloaded; sizes and checksums are told to torchvision."""
    import torchvision

    kind = torchvision.datasets.CIFAR100
    rng = np.random.default_rng(0)
    parts = {"meta": {"fine_label_names": [f"class {k}" for k in range(100)], "coarse_label_names": ["odd", "even"]}}
    for name, n in (("train", 60), ("test", 40)):
        labels = [(3 * k + 40) % 100 for k in range(n)]
        images = rng.integers(0, 60, (n, 3, 32, 32), dtype=np.uint8)
        images[:, 2, 0, :] = 200 + np.arange(32)  # blue, top row, brighter to the right
        parts[name] = {
            "data": images.reshape(n, 3072), "fine_labels": labels, "coarse_labels": [k % 2 for k in labels],
            "filenames": [f"{k}.png" for k in range(n)], "batch_label": f"{name} batch 1 of 1",
        }  # fmt: skip
    sums = {}
    with tarfile.open(tmp_path / kind.filename, "w:gz") as archive:
        for name, content in parts.items():
            packed = pickle.dumps(content, protocol=2)
            sums[name] = hashlib.md5(packed).hexdigest()
            member = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            member.size = len(packed)
            archive.addfile(member, io.BytesIO(packed))
    monkeypatch.setattr(kind, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(kind, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums["meta"]})
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5((tmp_path / kind.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(kind, "url", "http://127.0.0.1:9/nothing-is-fetched")
    monkeypatch.setitem(data._TORCHVISION, "cifar100", ("CIFAR100", 60, 40))
    return tmp_path, kind, parts


def test_cifar100_reads_its_own_archive(cifar100):
    """The archive at hand is unpacked, nothing is fetched; labels are the fine ones, images channels first."""
    root, _, parts = cifar100
    got = data.load("cifar100", root, download=True)
    assert (got.x_train.shape, got.x_test.shape) == ((60, 3, 32, 32), (40, 3, 32, 32))
    assert got.y_train.tolist() == parts["train"]["fine_labels"]
    assert got.classes[99] == "class 99"
    raw = torch.from_numpy(parts["test"]["data"]).view(40, 3, 32, 32).double()
    for channel in range(3):  # normalised, so an increasing line of the values as stored; float32
        x, y = raw[:, channel].flatten(), got.x_test[:, channel].flatten().double()
        assert torch.corrcoef(torch.stack([x, y]))[0, 1] > 1 - 1e-6
    assert data.load("cifar100", root).fingerprint == got.fingerprint  # from the unpacked files


def test_cifar100_with_a_wrong_checksum_is_refused(cifar100):
    """One byte of the unpacked test set is turned; torchvision sees it, and the reader learns where and what to do."""
    root, kind, _ = cifar100
    data.load("cifar100", root, download=True)
    path = root / kind.base_folder / "test"
    packed = bytearray(path.read_bytes())
    packed[len(packed) // 2] ^= 1
    path.write_bytes(packed)
    with pytest.raises(FileNotFoundError, match=f"no intact CIFAR100 under {root}; .* pass download=True"):
        data.load("cifar100", root)


@pytest.mark.parametrize("stages", [1, 4])
def test_cifar100_runs_through_the_experiment(cifar100, stages):
    """One epoch of a tiny network, scored: a hundred classes need nothing that ten do not."""
    root, _, _ = cifar100
    data.load("cifar100", root, download=True)
    settings = experiment.Settings(
        dataset="cifar100", stages=stages, depth=1, width=2, epochs=1, batch_size=20, learning_rate=1e-3,
        norm="batch", augment="crop-flip", ots_points=(40,), eval_points=20, plane_points=5,
    )  # fmt: skip
    record = experiment.run(settings, root=root)
    assert record["status"] in ("ok", "collapsed")
    assert record["provenance"]["data"] == "torchvision CIFAR100"
    assert len(record["final"]["test"]["stages"]) == stages
    assert len(record["final"]["test"]["stages"][0]["theorem1"]["by_class"]) == 100


def test_missing_sets_name_the_folder_and_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no intact CIFAR10 under {tmp_path}; set GEODESIC_DATA"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["imagenet", "folder:", ""])
def test_refuses_unknown_names(name):
    with pytest.raises(ValueError, match="is unknown; choose one of digits, mnist"):
        data.load(name)


def test_subsets_are_nested():
    whole = data.load("digits")
    small = whole.take(10, 5)
    assert (small.x_train == whole.x_train[:10]).all()
    assert len(small.y_test) == 5
    assert small.fingerprint == whole.fingerprint


@pytest.mark.parametrize("n", [0, 1438])
def test_refuses_more_points_than_there_are(n):
    with pytest.raises(ValueError, match=f"n_train={n} is not within 1 … 1437, the points that 'digits' has"):
        data.load("digits").take(n)


def test_shuffled_labels_keep_their_counts_and_lose_their_points(generator):
    """A permutation: the same histogram; about a tenth of ten balanced classes stays in place."""
    true = data.load("digits")
    shuffled = true.shuffle_labels(generator)
    assert (torch.bincount(true.y_train) == torch.bincount(shuffled.y_train)).all()
    assert (true.y_train == shuffled.y_train).float().mean() < 0.2
    assert (true.y_test == shuffled.y_test).all()
