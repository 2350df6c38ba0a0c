"""Images as sequences of pixels, row by row, for classifiers: the original CIFAR-10, a folder of images, or a container."""

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from torch import Tensor

ORIGINAL = "cifar-10-batches-py"  # the folder inside the archive of CIFAR-10's authors
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
RGB_TO_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


class ImageError(ValueError):
    """Images that cannot be used; the message says why and what to do."""


class Images(NamedTuple):
    """A set of images with labels."""

    pixels: Tensor  # (n, 3, height * width) uint8
    labels: Tensor  # (n,) int64
    classes: tuple[str, ...]


class ImageSequences(lightning.LightningDataModule):
    """Batches (u, label): u (B, channels, height * width) in [0, 1], pixel by pixel, and label (B,).

    All images are decoded once and kept; on a GPU with room for them, batches are cut there.

    Args:
        root: a folder with `train` and `test` in one of three forms: the original CIFAR-10 (`cifar-10-batches-py`), a
            folder of images for each class, or containers `train.npz` and `test.npz` (`jpeg`: all files end to end, uint8;
            `offsets`: n + 1 places in it; `labels`).
        size: height and width of the images.
        grey: one channel in place of three.
        fraction: share of the training images to use.
        balanced: whether the share is of each class, rather than of all images.
        valid_images: training images that are held out, drawn before `fraction` is taken.
        batch_size: images in a batch.
        augment: `none`; or `crop_flip`: shifted by up to 4 pixels and mirrored, at random.
        seed: of the split, the share, the order and the augmentation.
        download: fetch the original CIFAR-10 into `root` if it is not there (needs torchvision and a network).

    Raises:
        ValueError: an argument outside its range.
        ImageError: the images are missing, damaged or of another size, or a label has no class.
    """

    def __init__(
        self,
        root: str,
        size: int = 32,
        grey: bool = False,
        fraction: float = 1.0,
        balanced: bool = False,
        valid_images: int = 5000,
        batch_size: int = 64,
        augment: str = "none",
        seed: int = 0,
        download: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction}; wanted above 0 and at most 1, the share of the training images.")
        if min(size, batch_size, valid_images) < 1:
            raise ValueError(f"size {size}, batch_size {batch_size} and valid_images {valid_images} must be at least 1.")
        if augment not in ("none", "crop_flip"):
            raise ValueError(f"augment is {augment!r}; choose none or crop_flip.")
        self.root, self.size, self.grey, self.fraction, self.balanced = root, size, grey, fraction, balanced
        self.valid_images, self.batch_size, self.augment = valid_images, batch_size, augment
        self.seed, self.download = seed, download
        self.sets: dict[str, Images] = {}

    def setup(self, stage: str | None = None) -> None:
        """Reads the images of both splits, and divides the training images."""
        if self.sets:
            return
        train = read_images(self.root, "train", self.size, self.download)
        if self.valid_images >= len(train.labels):
            raise ImageError(
                f"{self.root} has {len(train.labels)} training images and valid_images holds out {self.valid_images}; "
                "hold out fewer."
            )
        order = np.random.default_rng([self.seed, 0]).permutation(len(train.labels))
        held_out, rest = order[: self.valid_images], order[self.valid_images :]
        chosen = share(train.labels.numpy()[rest], self.fraction, self.balanced)
        if not len(chosen):
            raise ImageError(f"fraction {self.fraction} of {len(rest)} training images is none; take a larger share.")
        self.sets = {"train": _pick(train, rest[chosen]), "valid": _pick(train, held_out)}
        self.sets["test"] = read_images(self.root, "test", self.size)
        if self.sets["test"].classes != train.classes:
            odd = set(self.sets["test"].classes) ^ set(train.classes)
            how = f"only one has {min(odd)}" if odd else "they stand in another order"
            raise ImageError(f"the test images in {self.root} have other classes than the training images: {how}.")

    @property
    def channels(self) -> int:
        """Of a pixel."""
        return 1 if self.grey else 3

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over the training images, (channels,) each."""
        u = self.sequence(self.sets["train"].pixels)
        return u.mean((0, 2)), u.std((0, 2))

    def describe(self) -> dict[str, object]:
        """What was read, for people and for config.json."""
        return {
            "classes": list(self.sets["train"].classes), "size": self.size, "grey": self.grey, "fraction": self.fraction,
            "augment": self.augment, **{f"{name}_images": len(images.labels) for name, images in self.sets.items()},
        }  # fmt: skip

    def sequence(self, pixels: Tensor) -> Tensor:
        """(n, 3, L) uint8 -> (n, channels, L) in [0, 1]"""
        u = pixels.float() / 255
        return (u * u.new_tensor(RGB_TO_GREY).unsqueeze(-1)).sum(1, keepdim=True) if self.grey else u

    def train_dataloader(self) -> Any:
        """Whole batches without end, from where the trainer stands; each pass in an order drawn from (seed, pass)."""
        return _Training(self._on_device("train"), self)

    def val_dataloader(self) -> Any:
        """The held-out images."""
        return _Scoring(self._on_device("valid"), self)

    def test_dataloader(self) -> Any:
        """The test images."""
        return _Scoring(self._on_device("test"), self)

    def _on_device(self, name: str) -> Images:
        images = self.sets[name]
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if device.type == "cuda" and images.pixels.nbytes > torch.cuda.mem_get_info(device)[0] / 4:
            return images
        return images._replace(pixels=images.pixels.to(device), labels=images.labels.to(device))

    def position(self) -> int:
        """How many batches the trainer has used."""
        return self.trainer.global_step * self.trainer.accumulate_grad_batches if self.trainer else 0


class _Training:
    """Batches of training images, as Lightning iterates over them."""

    def __init__(self, images: Images, data: ImageSequences) -> None:
        self.images, self.data = images, data

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size, number = self.data.batch_size, len(self.images.labels)
        each = max(1, number // size)  # batches in a pass; what is left over has its chance in the next
        drawn = -1
        for batch in itertools.count(self.data.position()):
            this, place = divmod(batch, each)
            if this != drawn:
                drawn, (order, flips, shifts) = this, self._draw(this)
            part = slice(place * size, (place + 1) * size)
            pixels, labels = self.images.pixels[order[part]], self.images.labels[order[part]]
            if self.data.augment == "crop_flip":
                pixels = crop_flip(pixels, self.data.size, flips[part], shifts[:, part])
            yield self.data.sequence(pixels), labels

    def _draw(self, this: int) -> list[Tensor]:
        """The order of a pass, and how each image is mirrored and moved."""
        labels = self.images.labels
        generator = torch.Generator().manual_seed(int(np.random.default_rng([self.data.seed, 1, this]).integers(2**63)))
        order = torch.randperm(len(labels), generator=generator)
        flips = torch.rand(len(order), generator=generator) < 0.5
        shifts = torch.randint(9, (2, len(order)), generator=generator)
        return [v.to(labels.device) for v in (order, flips, shifts)]


class _Scoring:
    """Batches of images in their order, as Lightning iterates over them."""

    def __init__(self, images: Images, data: ImageSequences) -> None:
        self.images, self.data = images, data

    def __len__(self) -> int:
        return -(-len(self.images.labels) // self.data.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = (v.split(self.data.batch_size) for v in (self.images.pixels, self.images.labels))
        return ((self.data.sequence(pixels), labels) for pixels, labels in zip(*parts, strict=True))


def crop_flip(pixels: Tensor, size: int, flip: Tensor, shift: Tensor) -> Tensor:
    """Images (n, 3, size * size) mirrored where `flip` (n,), and moved by 4 - shift pixels, shift (2, n) in 0 to 8."""
    n = len(pixels)
    image = torch.nn.functional.pad(pixels.unflatten(-1, (size, size)), (4, 4, 4, 4))
    image = torch.where(flip.view(n, 1, 1, 1), image.flip(-1), image)
    place = torch.arange(size, device=pixels.device)
    rows, columns = shift[0, :, None] + place, shift[1, :, None] + place  # (n, size)
    image = image[torch.arange(n, device=pixels.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return image.permute(0, 3, 1, 2).flatten(-2)


def share(labels: np.ndarray, fraction: float, balanced: bool) -> np.ndarray:
    """Places of the first share of the images, or of the first share of each class; in order."""
    if not balanced:
        return np.arange(round(fraction * len(labels)))
    parts = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.sort(np.concatenate([part[: round(fraction * len(part))] for part in parts]))


def _pick(images: Images, places: np.ndarray) -> Images:
    index = torch.from_numpy(places)
    return images._replace(pixels=images.pixels[index], labels=images.labels[index])


def read_images(root: str | Path, split: str, size: int, download: bool = False) -> Images:
    """All images of a split, in one of the three forms.

    Raises:
        ImageError: as ImageSequences.
    """
    root = Path(root)
    if download or (root / ORIGINAL).is_dir():
        images = _read_original(root, split, download)
    elif (root / f"{split}.npz").is_file():
        images = _read_container(root / f"{split}.npz")
    elif (root / split).is_dir():
        images = _read_folder(root / split)
    else:
        what = "does not exist" if not root.exists() else "holds no data set of images"
        raise ImageError(
            f"{root} {what}; give --root FOLDER with {split}.npz, a folder {split} or {ORIGINAL} in it, or fetch CIFAR-10 "
            "into it with --data.init_args.download true."
        )
    pixels, labels, classes = images
    height, width = pixels.shape[-2:]
    if (height, width) != (size, size):
        raise ImageError(
            f"the images in {root} are {width} x {height} pixels; wanted {size} x {size} (data.init_args.size)."
        )
    outside = (labels < 0) | (labels >= len(classes))
    if outside.any():
        raise ImageError(
            f"image {int(outside.nonzero()[0])} of the {split} images in {root} has the label {int(labels[outside][0])}; "
            f"there are {len(classes)} classes, 0 to {len(classes) - 1}."
        )
    return Images(pixels.flatten(-2), labels, classes)


def _read_original(root: Path, split: str, download: bool) -> Images:
    try:
        from torchvision.datasets import CIFAR10 as Original
    except ImportError as error:
        raise ImageError("the original CIFAR-10 is read by torchvision: pip install torchvision.") from error
    try:
        data = Original(root, train=split == "train", download=download)
    except (RuntimeError, OSError) as error:
        raise ImageError(f"{root / ORIGINAL} cannot be read or fetched: {error}") from error
    return Images(
        torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets), tuple(data.classes)
    )


def _read_container(file: Path) -> Images:
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as content:
            jpeg, offsets, labels = content["jpeg"], content["offsets"].astype(np.int64), content["labels"].astype(np.int64)
    except Exception as error:  # whatever a damaged file makes of the readers
        raise ImageError(
            f"{file} is damaged or no container of images ({error}); wanted arrays jpeg, offsets and labels."
        ) from error
    if not jpeg.ndim == offsets.ndim == labels.ndim == 1 or jpeg.dtype != np.uint8:
        raise ImageError(
            f"{file} is no container of images: jpeg must be a row of uint8, offsets and labels rows of numbers."
        )
    if len(offsets) != len(labels) + 1 or len(labels) == 0 or (np.diff(offsets) <= 0).any() or offsets[-1] > len(jpeg):
        raise ImageError(
            f"{file} is truncated: {len(labels)} labels, {len(offsets)} offsets up to {offsets[-1] if len(offsets) else 0}, "
            f"{len(jpeg)} bytes; wanted one offset more than labels, rising, within the bytes."
        )
    content = memoryview(jpeg)
    sources = (content[start:end] for start, end in itertools.pairwise(offsets))
    names = CIFAR10 if labels.max() < 10 and labels.min() >= 0 else tuple(map(str, range(10)))
    return Images(_decode(sources, str(file)), torch.from_numpy(labels), names)


def _read_folder(folder: Path) -> Images:
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = [
        (file, label)
        for label, path in enumerate(classes)
        for file in sorted(path.iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise ImageError(f"{folder} has no images; wanted a folder for each class with files {', '.join(SUFFIXES)}.")
    pixels = _decode((file.read_bytes() for file, _ in files), str(folder))
    return Images(pixels, torch.tensor([label for _, label in files]), tuple(path.name for path in classes))


def _decode(sources: Iterator[Any], where: str) -> Tensor:
    """(n, 3, height, width) uint8, images of one size."""
    from PIL import Image

    images: list[np.ndarray] = []
    for source in sources:
        try:
            with Image.open(io.BytesIO(source)) as image:
                images.append(np.asarray(image.convert("RGB")))
        except Exception as error:  # whatever a damaged file makes of the decoders
            raise ImageError(f"image {len(images)} of {where} cannot be read ({error}).") from error
        if images[-1].shape != images[0].shape:
            (height, width), (first_height, first_width) = images[-1].shape[:2], images[0].shape[:2]
            raise ImageError(
                f"image {len(images) - 1} of {where} is {width} x {height} pixels and the first "
                f"{first_width} x {first_height}; make them one size."
            )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
