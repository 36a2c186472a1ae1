"""Named data sets as tensors: bundled digits, MNIST and CIFAR, image folders of the reader's own, planar toy clouds.

Every set comes as one `Dataset`: inputs normalised per channel by the training set's mean and deviation, labels,
class names and a fingerprint of the raw bytes that travels into every record. Nothing is downloaded unless asked.
Used by every chapter that trains.
"""

import gzip
import hashlib
import os
import tarfile
import tempfile
import warnings
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from geodesic._image_folder import Listing

TOYS = ("moons", "circles", "spirals")
NAMES = ("digits", "mnist", "cifar10", "cifar100", *TOYS, "folder:PATH")


@dataclass(frozen=True)
class Dataset:
    """A labelled training and test set on one device."""

    name: str
    x_train: Float[Tensor, "n *shape"]  # mean 0 and deviation 1 per channel over the training set
    y_train: Int64[Tensor, "n"]
    x_test: Float[Tensor, "m *shape"]
    y_test: Int64[Tensor, "m"]
    classes: tuple[str, ...]
    fingerprint: str  # of the raw values and labels, before normalisation: equal iff the data are equal
    source: str  # where the data came from, for people

    def __post_init__(self) -> None:
        """Refuse what no network can learn from, before one is trained on it.

        Raises:
            ValueError: for a set with a value that is not finite.
        """
        for part, x in (("training", self.x_train), ("test", self.x_test)):
            _require_finite(x, f"data set {self.name!r}: {{}} of {len(x)} {part} points")

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.x_train.shape[1:])

    def take(self, n_train: int | None = None, n_test: int | None = None) -> "Dataset":
        """The first points of both sets (nested subsets); None keeps all.

        Raises:
            ValueError: if more points are asked for than there are.
        """
        for name, n, have in (("n_train", n_train, len(self.y_train)), ("n_test", n_test, len(self.y_test))):
            if n is not None and not 1 <= n <= have:
                raise ValueError(f"{name}={n} is not within 1 … {have}, the points that {self.name!r} has")
        return replace(
            self,
            x_train=self.x_train[:n_train],
            y_train=self.y_train[:n_train],
            x_test=self.x_test[:n_test],
            y_test=self.y_test[:n_test],
        )

    def shuffle_labels(self, generator: torch.Generator) -> "Dataset":
        """The control with permuted training labels: nothing is left to learn but the points themselves."""
        order = torch.randperm(len(self.y_train), generator=generator).to(self.y_train.device)
        return replace(self, y_train=self.y_train[order])


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    download: bool = False,
) -> Dataset:
    """Load a data set by name.

    Args:
        name: "digits" (bundled with scikit-learn), "mnist", "cifar10", "cifar100" (torchvision's layout), "moons",
            "circles", "spirals" (planar clouds), or "folder:PATH" with PATH/train/<class>/* and PATH/test/<class>/*.
            A relative PATH is looked for in root first: records then name the folder, not the machine. Images are
            read as RGB, upright by their EXIF orientation and, where transparent, on white (as the transparency alone
            if nothing else is in them); grey images of more than 8 bits keep their values. Hidden files and folders
            are no part of the set. The decoded arrays are kept in $GEODESIC_CACHE, else ~/.cache/geodesic, under a
            digest of the files' contents.
        root: folder of MNIST, CIFAR and relative image folders; None takes $GEODESIC_DATA, else ./data.
        device: where the tensors go.
        download: fetch MNIST or CIFAR from their public addresses if they are not in root.

    Raises:
        ValueError: for an unknown name, files that are truncated, unreadable or mislabelled (the path is named), a
            wrong checksum (MNIST, CIFAR), or values that are not finite.
        FileNotFoundError: if the data are not there.
        OSError: if they cannot be fetched or written.
    """
    root = Path(root or os.environ.get("GEODESIC_DATA") or "data")
    if name == "digits":
        raw = _digits()
    elif name == "mnist":
        raw = _mnist(root, download)
    elif name in _TORCHVISION:
        raw = _torchvision(name, root, download)
    elif name in TOYS:
        raw = _toy(name)
    elif name.startswith("folder:") and len(name) > len("folder:"):
        path = Path(name.removeprefix("folder:")).expanduser()
        raw = _folder(root / path if (root / path).is_dir() else path)
    else:
        raise ValueError(f"data set {name!r} is unknown; choose one of {', '.join(NAMES)}")
    return raw.dataset(name, device)


@dataclass(frozen=True)
class _Raw:
    """Values as they were stored: bytes for images, floats for clouds, channels first."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]
    source: str

    def dataset(self, name: str, device: str | torch.device) -> Dataset:
        x_train, x_test = self.x_train.to(device).float(), self.x_test.to(device).float()
        for part, x in (("training", x_train), ("test", x_test)):
            _require_finite(x, f"data set {name!r}: {{}} of {len(x)} {part} points")
        # One mean and deviation per channel; a cloud's coordinates are its channels.
        axes = [axis for axis in range(x_train.ndim) if axis != 1]
        mean, sd = x_train.mean(axes, keepdim=True), x_train.std(axes, keepdim=True)
        constant = x_train.amin(axes, keepdim=True) == x_train.amax(axes, keepdim=True)
        if constant.any():  # zero in training, for there is nothing to learn; in the units of the others in the test
            mean = x_train[:1].amax(axes, keepdim=True).where(constant, mean)
            sd = sd.where(~constant, 1.0 if constant.all() else sd[~constant].max())
        return Dataset(
            name,
            x_train.sub_(mean).div_(sd),
            self.y_train.to(device),
            x_test.sub_(mean).div_(sd),
            self.y_test.to(device),
            self.classes,
            self.fingerprint,
            self.source,
        )

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()[:16]


def _require_finite(x: Float[Tensor, "n *shape"], place: str) -> None:
    """One sum says whether anything is wrong, short of an overflow; only then is every number looked at."""
    if not x.sum().isfinite() and (bad := int((~x.flatten(1).isfinite()).any(1).sum())):
        raise ValueError(f"{place.format(bad)} hold values that are not finite; mend or remove them")


def _digits() -> _Raw:
    """1,797 images of 8×8 grey values 0 … 16; the last fifth is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images.astype(np.uint8))[:, None]
    y = torch.from_numpy(bunch.target.astype(np.int64))
    n = len(y) * 4 // 5
    return _Raw(x[:n], y[:n], x[n:], y[n:], tuple("0123456789"), "scikit-learn's bundled digits")


def _toy(name: str, n_train: int = 2000, n_test: int = 1000) -> _Raw:
    """Two planar classes with Gaussian noise 0.1, the same points on every machine."""
    n = n_train + n_test
    if name == "spirals":
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 2, n)
        angle = 3 * np.pi * np.sqrt(rng.random(n))
        points = angle[:, None] * np.stack([np.cos(angle + np.pi * labels), np.sin(angle + np.pi * labels)], 1) / np.pi
        points += 0.1 * rng.standard_normal(points.shape)
    else:  # the points of scikit-learn's make_moons and make_circles(factor=0.4), drawn as they draw them
        angle = np.linspace(0, np.pi, n // 2) if name == "moons" else np.linspace(0, 2 * np.pi, n // 2, endpoint=False)
        outer = np.stack([np.cos(angle), np.sin(angle)], 1)
        inner = np.array([1, 0.5]) - outer if name == "moons" else 0.4 * outer
        rng = np.random.RandomState(0)  # their stream
        order = np.arange(n)
        rng.shuffle(order)
        points, labels = np.concatenate([outer, inner])[order], np.repeat([0, 1], n // 2)[order]
        points += rng.normal(scale=0.1, size=points.shape)
    x, y = torch.from_numpy(points).float(), torch.from_numpy(labels.astype(np.int64))
    return _Raw(x[:n_train], y[:n_train], x[n_train:], y[n_train:], ("0", "1"), f"generated {name}")


# The four files of MNIST, the bytes of their headers and the MD5 of each.
_MNIST = {
    "train-images-idx3-ubyte": (16, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (8, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (16, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (8, "27ae3e4e09519cfbb04c329615203637"),
}


def _mnist(root: Path, download: bool) -> _Raw:
    """MNIST's own files, plain or zipped, in torchvision's place for them; torchvision is asked only to fetch them."""
    raw = root / "MNIST" / "raw"
    found = {name: _mnist_file(raw / name) for name in _MNIST}
    absent = [name for name, values in found.items() if values is None]
    if absent and download:
        _read_torchvision("MNIST", root, True, True)
        return _mnist(root, False)
    if absent:
        raise FileNotFoundError(
            f"no intact MNIST under {root.absolute()}; set GEODESIC_DATA or root to the folder that holds it, "
            f"or pass download=True ({', '.join(absent)} not found in MNIST/raw)"
        )
    images, labels, test_images, test_labels = (torch.from_numpy(values) for values in found.values())
    return _Raw(
        images.view(-1, 1, 28, 28), labels.long(), test_images.view(-1, 1, 28, 28), test_labels.long(),
        tuple("0123456789"), "MNIST, original files",
    )  # fmt: skip


def _mnist_file(path: Path) -> np.ndarray | None:
    """The bytes behind the header of one file, or None if it is not there."""
    header, md5 = _MNIST[path.name]
    zipped = path.with_name(f"{path.name}.gz")
    try:
        content = path.read_bytes() if path.exists() or not zipped.exists() else gzip.decompress(zipped.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"MNIST under {path.parent} is damaged ({path.name}: {error}); replace the file") from error
    if (seen := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
        raise ValueError(
            f"MNIST under {path.parent} is damaged: {path.name} has {len(content)} bytes with MD5 {seen}, not {md5}; "
            "remove the file and download it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).copy()


# torchvision's class, and the sizes of its training and test sets.
_TORCHVISION = {
    "cifar10": ("CIFAR10", 50_000, 10_000),
    "cifar100": ("CIFAR100", 50_000, 10_000),
}


def _torchvision(name: str, root: Path, download: bool) -> _Raw:
    kind, *sizes = _TORCHVISION[name]
    parts = []
    for train, size in zip((True, False), sizes, strict=True):
        parts.append(_read_torchvision(kind, root, train, download))
        if len(parts[-1].data) != size or len(parts[-1].targets) != size:
            raise ValueError(
                f"{kind} under {root.absolute()} holds {len(parts[-1].data)} points, not {size}; download it again"
            )
    images = [torch.as_tensor(part.data) for part in parts]
    images = [x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous() for x in images]
    labels = [torch.as_tensor(part.targets, dtype=torch.int64) for part in parts]
    return _Raw(images[0], labels[0], images[1], labels[1], tuple(parts[0].classes), f"torchvision {kind}")


def _read_torchvision(kind: str, root: Path, train: bool, download: bool) -> Any:
    """One part of a set of torchvision's, fetched first if asked for."""
    import torchvision

    place = f"{kind} under {root.absolute()}"
    try:
        return getattr(torchvision.datasets, kind)(root, train=train, download=download)
    except (RuntimeError, ValueError, TypeError, EOFError, OSError, tarfile.TarError) as error:
        if "not found" in str(error):  # torchvision's words for a missing file or a wrong checksum
            raise FileNotFoundError(
                f"no intact {place}; set GEODESIC_DATA or root to the folder that holds it, "
                f"or pass download=True ({error})"
            ) from error
        if isinstance(error, OSError) or download:  # a full disk, a folder without rights, a network that is down
            raise OSError(f"{place} cannot be {'fetched' if download else 'read'} ({error})") from error
        raise ValueError(f"{place} is damaged ({error}); download it again") from error


def _folder(path: Path) -> _Raw:
    """An image folder, decoded once; its arrays are kept in the user's cache under the digest of the files."""
    listing = Listing.of(path)

    def raw(arrays: dict[str, Tensor]) -> _Raw:
        return _Raw(**arrays, classes=listing.classes, source=f"image folder {path.name}")

    try:
        with safe_open(_cached(listing.digest()), "pt") as file:
            found = raw({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
            if file.metadata() == {"fingerprint": found.fingerprint}:
                return found
    except (OSError, RuntimeError, TypeError, SafetensorError):  # nothing kept, or nothing that can be used
        pass
    digest, arrays = listing.decode()
    found = raw(arrays)
    try:
        _keep(arrays, {"fingerprint": found.fingerprint}, _cached(digest))
    except (OSError, RuntimeError, SafetensorError) as error:  # without rights, full, or no home folder at all
        warnings.warn(f"the decoded images of {path} are not kept ({error}); set GEODESIC_CACHE", stacklevel=3)
    return found


def _cached(digest: str) -> Path:
    folder = os.environ.get("GEODESIC_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "geodesic") / f"{digest}.safetensors"


def _keep(arrays: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write all or nothing, beside others who may write the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as folder:
        partial = Path(folder) / path.name
        save_file(arrays, partial, metadata)
        os.replace(partial, path)
