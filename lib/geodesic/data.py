"""Named data sets as tensors: bundled digits, MNIST and CIFAR, image folders of the reader's own, planar toy clouds.

Every set comes as one `Dataset`: inputs normalised per channel by the training set's mean and deviation, labels,
class names and a fingerprint of the raw bytes that travels into every record. Nothing is downloaded unless asked.
Used by every chapter that trains.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

TOYS = ("moons", "circles", "spirals")
NAMES = ("digits", "mnist", "cifar10", "cifar100", *TOYS, "folder:PATH")
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


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
            A relative PATH is looked for in root first: records then name the folder, not the machine.
        root: folder of MNIST, CIFAR and relative image folders; None takes $GEODESIC_DATA, else ./data.
        device: where the tensors go.
        download: fetch MNIST or CIFAR from their public addresses if they are not in root.

    Raises:
        ValueError: for an unknown name, or files that are truncated, unreadable or mislabelled (the path is named).
        FileNotFoundError: if the data are not there.
    """
    root = Path(root or os.environ.get("GEODESIC_DATA") or "data")
    if name == "digits":
        raw = _digits()
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
        # One mean and deviation per channel; a cloud's coordinates are its channels.
        axes = [axis for axis in range(x_train.ndim) if axis != 1]
        mean, sd = x_train.mean(axes, keepdim=True), x_train.std(axes, keepdim=True)
        return Dataset(
            name,
            x_train.sub_(mean).div_(sd),
            self.y_train.to(device),
            x_test.sub_(mean).div_(sd),
            self.y_test.to(device),
            self.classes,
            self.fingerprint(),
            self.source,
        )

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()[:16]


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
    from sklearn.datasets import make_circles, make_moons

    n = n_train + n_test
    if name == "moons":
        points, labels = make_moons(n, noise=0.1, random_state=0)
    elif name == "circles":
        points, labels = make_circles(n, noise=0.1, factor=0.4, random_state=0)
    else:
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 2, n)
        angle = 3 * np.pi * np.sqrt(rng.random(n))
        points = angle[:, None] * np.stack([np.cos(angle + np.pi * labels), np.sin(angle + np.pi * labels)], 1) / np.pi
        points += 0.1 * rng.standard_normal(points.shape)
    x, y = torch.from_numpy(points).float(), torch.from_numpy(labels.astype(np.int64))
    return _Raw(x[:n_train], y[:n_train], x[n_train:], y[n_train:], ("0", "1"), f"generated {name}")


# torchvision's class, and the sizes of its training and test sets.
_TORCHVISION = {
    "mnist": ("MNIST", 60_000, 10_000),
    "cifar10": ("CIFAR10", 50_000, 10_000),
    "cifar100": ("CIFAR100", 50_000, 10_000),
}


def _torchvision(name: str, root: Path, download: bool) -> _Raw:
    import torchvision

    kind, *sizes = _TORCHVISION[name]
    parts = []
    for train, size in zip((True, False), sizes, strict=True):
        try:
            parts.append(getattr(torchvision.datasets, kind)(root, train=train, download=download))
        except (RuntimeError, ValueError, TypeError, EOFError, OSError) as error:
            if "not found" in str(error):  # torchvision's words for a missing file or a wrong checksum
                raise FileNotFoundError(
                    f"no intact {kind} under {root.absolute()}; set GEODESIC_DATA or root to the folder that holds it, "
                    f"or pass download=True ({error})"
                ) from error
            raise ValueError(f"{kind} under {root.absolute()} is damaged ({error}); download it again") from error
        if len(parts[-1].data) != size or len(parts[-1].targets) != size:
            raise ValueError(
                f"{kind} under {root.absolute()} holds {len(parts[-1].data)} points, not {size}; download it again"
            )
    images = [torch.as_tensor(part.data) for part in parts]
    images = [x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous() for x in images]
    labels = [torch.as_tensor(part.targets, dtype=torch.int64) for part in parts]
    return _Raw(images[0], labels[0], images[1], labels[1], tuple(parts[0].classes), f"torchvision {kind}")


def _folder(path: Path) -> _Raw:
    """Decode an image folder once, in parallel, and keep the arrays in the user's cache."""
    files = {part: _list_images(path / part) for part in ("train", "test")}
    if files["train"].keys() != files["test"].keys():
        odd = sorted(files["train"].keys() ^ files["test"].keys())
        raise ValueError(f"{path}: class folders differ between train and test: {', '.join(odd)}; give both the same")
    cached = _cache_folder() / f"{_listing_digest(path, files)}.safetensors"
    try:
        arrays = load_file(cached)
    except (FileNotFoundError, SafetensorError):
        arrays = {f"{what}_{part}": array for part in files for what, array in _decode(files[part]).items()}
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}.partial")
        save_file(arrays, partial)
        os.replace(partial, cached)
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise ValueError(f"{path}: training images are {tuple(arrays['x_train'].shape[1:])}, test images "
                         f"{tuple(arrays['x_test'].shape[1:])}; resize them to one size")  # fmt: skip
    return _Raw(**arrays, classes=tuple(files["train"]), source=f"image folder {path.name}")


def _list_images(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; an image folder needs train/<class>/* and test/<class>/*")
    classes = {}
    for sub in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        classes[sub.name] = sorted(file for file in sub.iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES)
        if not classes[sub.name]:
            raise ValueError(f"{sub} holds no image ({', '.join(sorted(_IMAGE_SUFFIXES))}); fill it or remove it")
    if len(classes) < 2:
        raise ValueError(f"{folder} holds {len(classes)} class folder(s); a classifier needs at least 2")
    return classes


def _cache_folder() -> Path:
    return Path(os.environ.get("GEODESIC_CACHE") or Path.home() / ".cache" / "geodesic")


def _listing_digest(path: Path, files: dict[str, dict[str, list[Path]]]) -> str:
    """Changes whenever a file is added, removed, renamed or rewritten."""
    digest = hashlib.sha256()
    for classes in files.values():
        for images in classes.values():
            for image in images:
                stat = image.stat()
                digest.update(f"{image.relative_to(path)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _decode(classes: dict[str, list[Path]]) -> dict[str, Tensor]:
    """Images in an order that mixes the classes, the same on every machine, so that nested subsets are fair."""
    files = [(file, label) for label, images in enumerate(classes.values()) for file in images]
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    with ThreadPoolExecutor() as pool:  # PIL releases the interpreter lock while it decodes
        images = list(pool.map(_read_image, [files[i][0] for i in order]))
    for i, image in zip(order, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(f"{files[i][0]} is {tuple(image.shape)}, others are {tuple(images[0].shape)}; resize it")
    return {"x": torch.stack(images), "y": torch.tensor([files[i][1] for i in order])}


def _read_image(path: Path) -> UInt8[Tensor, "3 height width"]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except (OSError, SyntaxError) as error:  # PIL raises SyntaxError for some broken PNGs
        raise ValueError(f"cannot read image {path} ({error}); replace or remove it") from error
