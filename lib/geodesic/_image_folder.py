"""Image folders as arrays: which files are read, a digest of their contents, and their pixels.

Used by `geodesic.data`. The digest says whether arrays kept from before are those of the files at hand; names, sizes
and times cannot, for reproducible archives give all files one time.
"""

import hashlib
import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Num
from torch import Tensor

PARTS = ("train", "test")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
_DECODING = b"decoding 2\n"  # another number forgets the arrays that were decoded by other rules
_CHUNK = 64  # files a task: one file alone costs less than handing it to a thread

T = TypeVar("T")


@dataclass(frozen=True)
class Listing:
    """The images of a folder: for each part and class, in order, the names of its files."""

    path: Path
    files: dict[str, dict[str, list[str]]]

    @staticmethod
    def of(path: Path) -> "Listing":
        """List the classes and files; a warning counts what lies there and is not read.

        Hidden files and folders are no part of a data set: programs leave them (.ipynb_checkpoints, ._copies).

        Raises:
            FileNotFoundError: without train/ or test/.
            ValueError: for fewer than two classes, a class without images, or classes that differ between the parts.
        """
        left_out: Counter[str] = Counter()
        files = {part: _classes(path / part, left_out) for part in PARTS}
        if files["train"].keys() != files["test"].keys():
            odd = sorted(files["train"].keys() ^ files["test"].keys())
            raise ValueError(
                f"{path}: class folders differ between train and test: {', '.join(odd)}; give both the same"
            )
        if left_out:
            counts = ", ".join(f"{count} × {what}" for what, count in sorted(left_out.items()))
            warnings.warn(f"image folder {path}: not read: {counts}", stacklevel=4)
        return Listing(path, files)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; the place of a name is its label."""
        return tuple(self.files["train"])

    def names(self) -> Iterator[str]:
        """Every file, relative to the folder."""
        for part, classes in self.files.items():
            for name, images in classes.items():
                yield from (f"{part}/{name}/{image}" for image in images)

    def digest(self) -> str:
        """Of the names and contents of all files, wherever the folder lies."""
        return self._combine(_in_chunks(self._read, self.names()))

    def decode(self) -> tuple[str, dict[str, Tensor]]:
        """The digest of the bytes that were decoded, and the arrays x_train, y_train, x_test and y_test.

        Both parts are in an order that mixes the classes, the same on every machine, so that nested subsets are fair.

        Raises:
            ValueError: for an image that cannot be read or differs in size or kind from the others; it is named.
        """

        def read(names: list[str]) -> tuple[bytes, list[np.ndarray]]:
            images: list[np.ndarray] = []
            digest = self._read(names, lambda name, content: images.append(_pixels(self.path / name, content)))
            return digest, images

        digests, chunks = zip(*_in_chunks(read, self.names()), strict=True)
        images = _alike(self.path, list(self.names()), [image for chunk in chunks for image in chunk])
        arrays, start = {}, 0
        for part, classes in self.files.items():
            labels = [label for label, files in enumerate(classes.values()) for _ in files]
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
            arrays[f"x_{part}"] = torch.from_numpy(np.stack([images[start + i] for i in order]))
            arrays[f"y_{part}"] = torch.tensor([labels[i] for i in order])
            start += len(labels)
        return self._combine(digests), arrays

    def _read(self, names: list[str], use: Callable[[str, bytes], None] | None = None) -> bytes:
        """Digest of some files; `use` gets the name and the content of each."""
        digest = hashlib.blake2b()
        for name in names:
            try:
                with open(os.path.join(self.path, name), "rb", buffering=0) as file:
                    content = file.read()
            except OSError as error:
                raise ValueError(f"cannot read image {self.path / name} ({error}); replace or remove it") from error
            digest.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape"))
            digest.update(content)
            if use:
                use(name, content)
        return digest.digest()

    @staticmethod
    def _combine(digests: Iterable[bytes]) -> str:
        return hashlib.blake2b(_DECODING + b"".join(digests), digest_size=16).hexdigest()


def _classes(folder: Path, left_out: Counter[str]) -> dict[str, list[str]]:
    """The image files of each class of a part."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; an image folder needs train/<class>/* and test/<class>/*")
    classes = {}
    for entry in _visible(folder):
        if not entry.is_dir():
            left_out[f"file outside the class folders of {folder.name}/"] += 1
            continue
        classes[entry.name] = images = []
        for file in _visible(entry.path):
            suffix = os.path.splitext(file.name)[1].lower()
            if file.is_dir():
                left_out["nested folder"] += 1
            elif not (file.is_file() or file.is_symlink()):  # a broken link is an error, not left out
                left_out["pipe or device"] += 1
            elif suffix in SUFFIXES:
                images.append(file.name)
            else:
                left_out[f"file *{suffix}"] += 1
        if not images:
            raise ValueError(f"{entry.path} holds no image ({', '.join(sorted(SUFFIXES))}); fill it or remove it")
    if len(classes) < 2:
        raise ValueError(f"{folder} holds {len(classes)} class folder(s); a classifier needs at least 2")
    return classes


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _in_chunks(work: Callable[[list[str]], T], names: Iterator[str]) -> list[T]:
    """`work` on all names, a chunk at a time, in threads: reading, hashing and decoding release the interpreter."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, iter(lambda: list(islice(names, _CHUNK)), [])))


def _pixels(path: Path, content: bytes) -> Num[np.ndarray, "3 height width"]:
    """One image: uint8 or uint16 in the range of its type, or float32 without a range."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as image:
            values = _values(ImageOps.exif_transpose(image), str(image.format))
    except Exception as error:  # a damaged header can make PIL raise anything
        reason = str(error) or type(error).__name__
        raise ValueError(f"cannot read image {path} ({reason}); replace or remove it") from error
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"image {path} holds non-finite values; replace or remove it")
    planes = values.transpose(2, 0, 1) if values.ndim == 3 else np.broadcast_to(values, (3, *values.shape))
    return np.ascontiguousarray(planes)


def _values(image: Any, kind: str) -> Num[np.ndarray, "height width *rgb"]:
    """Colours as (height, width, 3) bytes; grey values of more than 8 bits as (height, width)."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):  # Pillow's "I" of 16 bits
        return np.asarray(image).astype(np.uint16)
    if image.mode in ("I", "F"):
        return np.asarray(image).astype(np.float32)
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    from PIL import Image

    image = image.convert("RGBA")
    values = np.array(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
    # A white drawing on white is nothing: then the transparency is the picture.
    return values if np.ptp(values) else np.array(image.getchannel("A").convert("RGB"))


def _alike(path: Path, names: list[str], images: list[np.ndarray]) -> list[np.ndarray]:
    """The images in one type: bytes stay bytes, and become 16-bit values beside images of 16 bits."""
    for name, image in zip(names, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(f"{path / name} is {image.shape}, {names[0]} is {images[0].shape}; resize it")
    example = {image.dtype: name for name, image in zip(names, images, strict=True)}
    if len(example) == 1 and np.dtype(np.uint8) in example:
        return images
    if len(example) > 1 and np.dtype(np.float32) in example:
        shown = ", ".join(f"{name} {dtype}" for dtype, name in example.items())
        raise ValueError(f"{path}: images of float or 32-bit values have no range in common with others ({shown}); "
                         "convert them to one kind")  # fmt: skip
    widen = len(example) > 1
    return [image.astype(np.float32) * (257 if widen and image.dtype == np.uint8 else 1) for image in images]
