"""Data sets: shapes, normalisation, fingerprints, and one clear error for every kind of damage."""

import errno
import gzip
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import warnings
import zlib

import numpy as np
import pytest
import torch
from geodesic import _image_folder, data, experiment
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
    monkeypatch.setattr(_image_folder, "_pixels", lambda *_: pytest.fail("decoded again"))
    assert data.load(f"folder:{folder}").fingerprint == first.fingerprint
    assert len(list(cache.iterdir())) == 1


def test_a_changed_image_is_noticed(folder):
    before = data.load(f"folder:{folder}").fingerprint
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / "train" / "cat" / "0.png")
    assert data.load(f"folder:{folder}").fingerprint != before


def test_other_contents_under_equal_names_sizes_and_times_are_noticed(folder):
    """Two bitmaps of one size and one time, as an archive with fixed times unpacks them: each gives its own set."""
    prints, stats = set(), set()
    for value in (10, 20):
        image = folder / "train" / "cat" / "0.bmp"
        Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(image)
        for file in folder.rglob("*.*"):
            os.utime(file, (0, 0))
        got = data.load(f"folder:{folder}")
        prints.add(got.fingerprint)
        stats.add((image.stat().st_size, image.stat().st_mtime_ns))
    assert len(prints) == 2
    assert len(stats) == 1


def test_a_file_that_moves_to_another_class_is_noticed(folder):
    """The bytes in their order stay; a label changes."""
    before = data.load(f"folder:{folder}")
    (folder / "train" / "dog" / "0.png").rename(folder / "train" / "cat" / "9.png")
    after = data.load(f"folder:{folder}")
    assert after.y_train.sum() == before.y_train.sum() - 1
    assert after.fingerprint != before.fingerprint


def test_a_folder_that_moves_is_not_decoded_again(folder, monkeypatch):
    before = data.load(f"folder:{folder}").fingerprint
    monkeypatch.setattr(_image_folder, "_pixels", lambda *_: pytest.fail("decoded again"))
    assert data.load(f"folder:{folder.rename(folder.parent / 'animals')}").fingerprint == before


def test_what_is_kept_is_named_by_the_bytes_that_were_decoded(folder, cache, monkeypatch):
    """An image that is replaced between the look into the cache and the decoding: the arrays are the new ones'."""
    whole = data.Listing.decode

    def replaced(listing):
        Image.fromarray(np.full((4, 6, 3), 7, np.uint8)).save(folder / "train" / "cat" / "0.png")
        return whole(listing)

    monkeypatch.setattr(data.Listing, "decode", replaced)
    first = data.load(f"folder:{folder}")
    (kept,) = cache.iterdir()
    monkeypatch.undo()
    assert kept.stem == data.Listing.of(folder).digest()
    assert (first.x_train.amin((2, 3)) == first.x_train.amax((2, 3))).all(1).sum() == 1


def test_a_torn_cache_is_made_again(folder, cache):
    before = data.load(f"folder:{folder}").fingerprint
    (cached,) = cache.iterdir()
    cached.write_bytes(cached.read_bytes()[:50])
    assert data.load(f"folder:{folder}").fingerprint == before


@pytest.mark.parametrize("place", [0.5, 0.99])
def test_a_cache_with_a_changed_value_is_made_again(folder, cache, place):
    """The arrays must have the fingerprint that was written beside them."""
    before = data.load(f"folder:{folder}")
    (cached,) = cache.iterdir()
    content = bytearray(cached.read_bytes())
    content[int(place * len(content))] ^= 1
    cached.write_bytes(content)
    assert data.load(f"folder:{folder}").fingerprint == before.fingerprint
    assert cached.read_bytes() != bytes(content)


def test_a_cache_of_another_program_is_passed_over(folder, cache):
    before = data.load(f"folder:{folder}").fingerprint
    (cached,) = cache.iterdir()
    cached.unlink()
    cached.mkdir()
    with pytest.warns(UserWarning, match="are not kept"):
        assert data.load(f"folder:{folder}").fingerprint == before


def test_a_cache_folder_that_cannot_be_written_is_passed_over(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("GEODESIC_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=r"decoded images of .*pets are not kept \(.*file.*\); set GEODESIC_CACHE"):
        assert len(data.load(f"folder:{folder}").y_train) == 6


def test_a_full_disk_leaves_no_part_of_a_cache(folder, cache, monkeypatch):
    def full(arrays, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(data, "save_file", full)
    with pytest.warns(UserWarning, match=r"not kept \(.*No space left on device"):
        assert len(data.load(f"folder:{folder}").y_train) == 6
    assert list(cache.iterdir()) == []


def save_all(folder, make):
    """Replace every image of the folder by make(number, label)."""
    for k, path in enumerate(sorted(folder.rglob("*.png"))):
        path.unlink()
        make(k, int("dog" in path.parts)).save(path)


def test_a_channel_that_is_constant_in_training_is_zero(folder):
    """Nothing can be learned from it; in the test set it counts in the units of the others, so it stays of their size.

    Blue is 90 in training and 0 … 5 in the test set; the others are noise.
    """
    rng = np.random.default_rng(1)

    def make(k, label):
        image = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
        image[..., 2] = 90 if k >= 4 else k  # test comes before train
        return Image.fromarray(image)

    save_all(folder, make)
    got = data.load(f"folder:{folder}")
    assert (got.x_train[:, 2] == 0).all()
    assert got.x_test.isfinite().all()
    assert 0.5 < got.x_test[:, 2].abs().max() < 5
    torch.testing.assert_close(got.x_train[:, 0].std(), torch.tensor(1.0))


def test_a_set_without_any_difference_is_zero(folder):
    save_all(folder, lambda k, label: Image.new("RGB", (6, 4), (0, 7, 255)))
    got = data.load(f"folder:{folder}")
    assert (got.x_train == 0).all()
    assert (got.x_test == 0).all()


@pytest.mark.parametrize(("suffix", "scale", "dtype"), [
    (".png", 16, np.uint16), (".tif", 16, np.uint16), (".tif", 1e-3, np.float32), (".tif", 1e4, np.float32),
    (".tif", 4e6, np.int32),
])  # fmt: skip
def test_grey_values_of_more_than_eight_bits_are_kept(folder, suffix, scale, dtype):
    """Twelve bits in sixteen, small and large floats, 32-bit integers: the set of 8-bit values up to a scale."""
    grey = np.random.default_rng(2).integers(0, 256, (10, 4, 6))
    save_all(folder, lambda k, label: Image.fromarray(grey[k].astype(np.uint8)))
    want = data.load(f"folder:{folder}")
    for k, path in enumerate(sorted(folder.rglob("*.png"))):
        path.unlink()
        Image.fromarray((grey[k] * scale).astype(dtype)).save(path.with_suffix(suffix))
    got = data.load(f"folder:{folder}")
    assert got.x_train.shape == (6, 3, 4, 6)
    torch.testing.assert_close(got.x_train, want.x_train, rtol=1e-4, atol=1e-4)


def test_eight_and_sixteen_bits_meet_in_the_range_of_their_types(folder):
    """255 of 8 bits is 65,535 of 16: a folder of both is the folder of 8 bits alone."""
    rng = np.random.default_rng(2)
    save_all(folder, lambda k, label: Image.fromarray(rng.integers(0, 256, (4, 6), dtype=np.uint8)))
    want = data.load(f"folder:{folder}")
    for path in sorted((folder / "train" / "dog").iterdir()):
        wide = np.array(Image.open(path)).astype(np.uint16) * 257
        Image.fromarray(wide).save(path)
    torch.testing.assert_close(data.load(f"folder:{folder}").x_test, want.x_test, rtol=1e-5, atol=1e-5)


def test_floats_and_bytes_are_not_mixed(folder):
    (folder / "train" / "cat" / "0.png").unlink()
    Image.fromarray(np.zeros((4, 6), np.float32)).save(folder / "train" / "cat" / "0.tif")
    with pytest.raises(ValueError, match=r"no range in common .*train/cat/0.tif float32.*; convert them"):
        data.load(f"folder:{folder}")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_folder_names_the_image_that_is_not_finite(folder, bad):
    for path in folder.rglob("*.png"):
        path.unlink()
        values = np.ones((4, 6), np.float32)
        values[0, 0] = bad if path.parts[-3:] == ("train", "dog", "1.png") else 2
        Image.fromarray(values).save(path.with_suffix(".tif"))
    with pytest.raises(ValueError, match=r"image .*train/dog/1.tif holds non-finite values"):
        data.load(f"folder:{folder}")


def test_any_set_with_a_value_that_is_not_finite_is_refused():
    """Whoever makes it: the reader's own set is refused as it is made, and says how many points are at fault."""
    x, y = torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)
    x[3, 1] = torch.nan
    with pytest.raises(ValueError, match="data set 'mine': 1 of 5 test points hold values that are not finite"):
        data.Dataset("mine", torch.zeros(5, 2), y, x, y, ("a",), "", "")
    with pytest.raises(ValueError, match="data set 'mine': 1 of 5 training points hold"):
        data._Raw(x, y, torch.zeros(5, 2), y, ("a",), "").dataset("mine", "cpu")
    huge = torch.full((5, 2), 3e38)  # the sum overflows, the values are finite
    data.Dataset("mine", huge, y, huge, y, ("a",), "", "")


def decoded(path, image, **options):
    image.save(path, **options)
    return _image_folder._pixels(path, path.read_bytes())


def test_transparency_is_laid_on_white(tmp_path):
    """Red at full, half and no opacity: red, pink, white; also from a palette. Half is 128/255."""
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((255, 128, 0)):
        image.putpixel((x, 0), (200, 0, 0, alpha))
    got = decoded(tmp_path / "a.png", image)
    assert got[:, 0, 0].tolist() == [200, 0, 0]
    assert abs(got[:, 0, 1].astype(int) - [227, 127, 127]).max() <= 1
    assert got[:, 0, 2].tolist() == [255, 255, 255]
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    got = decoded(tmp_path / "b.png", palette, transparency=1)
    assert got[:, 0].T.tolist() == [[200, 0, 0], [255, 255, 255]]


def test_a_drawing_in_transparency_alone_is_kept(tmp_path):
    """White on nothing: laid on white, no picture would be left."""
    image = Image.new("LA", (2, 1), (255, 0))
    image.putpixel((1, 0), (255, 180))
    got = decoded(tmp_path / "a.png", image)
    assert got[:, 0].T.tolist() == [[0, 0, 0], [180, 180, 180]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(tmp_path, orientation):
    """The eight EXIF orientations of a 2×3 pattern, by what the standard says of its first row and column."""
    pattern = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    stored = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
              5: lambda a: a.T, 6: lambda a: a.T[::-1], 7: lambda a: a.T[::-1, ::-1],
              8: lambda a: a.T[:, ::-1]}[orientation](pattern)  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = decoded(tmp_path / "a.png", Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert got[0].tolist() == pattern.tolist()


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("quiet")
def test_hidden_files_and_folders_are_no_classes(folder):
    before = data.load(f"folder:{folder}")
    for part in ("train", "test"):
        (folder / part / ".ipynb_checkpoints").mkdir()
        (folder / part / ".DS_Store").write_text("")
        (folder / part / "cat" / "._0.png").write_text("no image")
    after = data.load(f"folder:{folder}")
    assert (after.classes, after.fingerprint) == (before.classes, before.fingerprint)


def test_what_is_not_read_is_counted(folder):
    (folder / "train" / "cat" / "more").mkdir()
    (folder / "train" / "README").write_text("")
    for k in range(3):
        (folder / "test" / "dog" / f"{k}.gif").write_text("")
    os.mkfifo(folder / "test" / "dog" / "pipe.png")  # to open it would wait for ever
    with pytest.warns(
        UserWarning,
        match=r"pets: not read: 3 × file \*\.gif, 1 × file outside the class folders of train/, 1 × nested folder, "
        r"1 × pipe or device$",
    ):
        data.load(f"folder:{folder}")


def damage_header(path):
    """A PNG whose header says 2³⁰ × 2³⁰ pixels, with the right checksum."""
    content = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", 2**30, 2**30) + content[24:29]
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])


@pytest.mark.parametrize(
    "damage",
    [
        damage_header,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_bytes(b"BM" + bytes(60)),
        lambda path: path.write_bytes(b"II*\0\x08\0\0\0\xff\xff" + bytes(range(256))),
        lambda path: path.write_bytes(b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(30)),
        lambda path: (path.unlink(), path.symlink_to("nowhere")),
    ],
)
def test_every_damage_is_one_line_with_the_path(folder, damage):
    damage(folder / "test" / "dog" / "0.png")
    with pytest.raises(ValueError, match=r"^cannot read image .*test/dog/0.png \(.+\); replace or remove it$"):
        data.load(f"folder:{folder}")


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


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """MNIST's own file format, filled with its index; big-endian headers. Its checksums are taken for the true ones."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 60_000), ("t10k", 10_000)):
        images = np.zeros((n, 28, 28), np.uint8)
        images[:, 0, 0] = np.arange(n) % 251
        labels = (np.arange(n) % 10).astype(np.uint8)
        for name, header, values in (
            (f"{part}-images-idx3-ubyte", struct.pack(">IIII", 2051, n, 28, 28), images),
            (f"{part}-labels-idx1-ubyte", struct.pack(">II", 2049, n), labels),
        ):
            (raw / name).write_bytes(header + values.tobytes())
            monkeypatch.setitem(data._MNIST, name, (len(header), hashlib.md5((raw / name).read_bytes()).hexdigest()))
    return raw


def test_mnist_reads_its_own_format(mnist, tmp_path, monkeypatch):
    """As torchvision reads it: the same values, labels and order."""
    import torchvision

    monkeypatch.setenv("GEODESIC_DATA", str(tmp_path))
    got = data.load("mnist")
    assert got.x_train.shape == (60_000, 1, 28, 28)
    assert got.y_test[:12].tolist() == [*range(10), 0, 1]
    theirs = [torchvision.datasets.MNIST(tmp_path, train=train) for train in (True, False)]
    parts = [part for each in theirs for part in (each.data[:, None], each.targets)]
    assert got.fingerprint == data._Raw(*parts, (), "").fingerprint


def test_mnist_is_read_zipped_and_without_torchvision_or_scikit_learn(mnist, tmp_path):
    """In a process of its own, in which neither can be imported."""
    for path in list(mnist.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        path.unlink()
    sums = dict(data._MNIST)
    script = (
        "import sys; sys.modules.update(torchvision=None, sklearn=None)\n"
        "from geodesic import data\n"
        f"data._MNIST.update({sums!r})\n"
        f"print(data.load('mnist', {str(tmp_path)!r}).y_test[:3].tolist(), len(data.load('moons').y_test))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "[0, 1, 2] 1000\n", done.stderr


def test_mnist_with_blank_images_is_refused(mnist, tmp_path):
    """The header is whole and the size is right: only the checksum knows."""
    images = mnist / "train-images-idx3-ubyte"
    content = bytearray(images.read_bytes())
    content[16 : 16 + 1000 * 784] = bytes(1000 * 784)
    images.write_bytes(content)
    with pytest.raises(ValueError, match=r"MNIST under .* is damaged: train-images-idx3-ubyte has 47040016 bytes with"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_cut_short_is_refused(mnist, tmp_path, zipped):
    images = mnist / "train-images-idx3-ubyte"
    content = images.read_bytes()
    images.unlink()
    if zipped:
        images.with_name(f"{images.name}.gz").write_bytes(gzip.compress(content, 1)[:10_000])
    else:
        images.write_bytes(content[:100_000])
    with pytest.raises(ValueError, match=r"MNIST under .* is damaged.*train-images-idx3-ubyte"):
        data.load("mnist", tmp_path)


def test_mnist_that_is_not_there_is_fetched_only_when_asked(mnist, tmp_path, monkeypatch):
    import torchvision

    labels = mnist / "t10k-labels-idx1-ubyte"
    content = labels.read_bytes()
    labels.unlink()
    monkeypatch.setattr(torchvision.datasets, "MNIST", lambda root, train, download: labels.write_bytes(content))
    with pytest.raises(FileNotFoundError, match=r"no intact MNIST under .* \(t10k-labels-idx1-ubyte not found"):
        data.load("mnist", tmp_path)
    assert data.load("mnist", tmp_path, download=True).y_test[:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_full_disk_is_not_taken_for_damaged_files(name, tmp_path, monkeypatch):
    import torchvision

    def full(root, train, download):
        raise OSError(errno.ENOSPC, "No space left on device", str(root))

    monkeypatch.setattr(torchvision.datasets, name.upper(), full)
    with pytest.raises(OSError, match=rf"{name.upper()} under {tmp_path} cannot be fetched \(.*No space left"):
        data.load(name, tmp_path, download=True)


@pytest.mark.parametrize("name", ["moons", "circles"])
def test_toys_are_those_of_scikit_learn(name):
    """The same bits, though scikit-learn is not asked: records that name these sets keep their fingerprints."""
    from sklearn import datasets

    options = {"noise": 0.1, "random_state": 0} | ({"factor": 0.4} if name == "circles" else {})
    points, labels = getattr(datasets, f"make_{name}")(3000, **options)
    raw = data._toy(name)
    assert (torch.cat([raw.x_train, raw.x_test]) == torch.from_numpy(points).float()).all()
    assert torch.cat([raw.y_train, raw.y_test]).tolist() == labels.tolist()


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
    theorem1 = record["final"]["test"]["stages"][0]["theorem1"]
    assert theorem1["pairs"] > 0
    assert theorem1["by_class"] is None  # the table of a hundred classes would be most of the record


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
