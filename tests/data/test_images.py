"""Images as sequences: three forms of the same images, shares of them, and what is refused."""

import io
import itertools
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from s4audio.data import ImageError, ImageSequences, read_images
from s4audio.data.images import Images, crop_flip, share

SIZE, CLASSES = 8, ("airplane", "bird")


def picture(label: int, index: int) -> np.ndarray:
    """Its first channel says the class, and its first pixel which image it is."""
    pixels = np.full((SIZE, SIZE, 3), (200 * label, 50, 100), dtype=np.uint8)
    pixels[0, 0] = index
    return pixels


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=100)
    return buffer.getvalue()


def make_container(file: Path, of_images: list[int], **changes) -> None:
    files = [encoded(picture(label, index), "JPEG") for index, label in enumerate(of_images)]
    offsets = np.cumsum([0, *map(len, files)]).astype(np.uint32)
    content = {"jpeg": np.frombuffer(b"".join(files), np.uint8), "offsets": offsets, "labels": np.array(of_images, np.uint8)}
    np.savez(file, **{**content, **changes})


def make_folder(folder: Path, number: int) -> None:
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(number):
            (folder / name / f"{index}.png").write_bytes(encoded(picture(label, index), "PNG"))


@pytest.fixture
def root(tmp_path) -> Path:
    make_folder(tmp_path / "train", 20)
    make_folder(tmp_path / "test", 3)
    return tmp_path


def test_a_folder_of_images_becomes_sequences_of_pixels(root):
    images = read_images(root, "test", SIZE)
    assert images.classes == CLASSES and images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.pixels.shape == (6, 3, SIZE * SIZE)
    assert images.pixels[:, 0, 0].tolist() == [0, 1, 2] * 2 and images.pixels[4, :, 9].tolist() == [200, 50, 100]


def test_hidden_folders_are_no_classes_and_an_odd_class_is_named(root):
    (root / "train" / ".ipynb_checkpoints").mkdir()
    data = ImageSequences(str(root), SIZE, valid_images=4)
    data.setup()
    assert data.sets["train"].classes == CLASSES
    (root / "test" / "other").mkdir()
    with pytest.raises(ImageError, match="have other classes than the training images: only one has other"):
        ImageSequences(str(root), SIZE, valid_images=4).setup()


def test_classes_in_another_order_are_refused(root, monkeypatch):
    def read(folder, split, *options):
        images = read_images(folder, split, *options)
        return images if split == "train" else images._replace(classes=images.classes[::-1])

    monkeypatch.setattr("s4audio.data.images.read_images", read)
    with pytest.raises(ImageError, match="they stand in another order"):
        ImageSequences(str(root), SIZE, valid_images=4).setup()


def test_a_container_holds_the_same_images(tmp_path):
    make_container(tmp_path / "train.npz", [0, 1, 1])
    images = read_images(tmp_path, "train", SIZE)
    assert images.labels.tolist() == [0, 1, 1] and len(images.classes) == 10
    assert (images.pixels[:, 0, -1].int() - torch.tensor([0, 200, 200])).abs().max() <= 3  # a JPEG
    assert not images.pixels.is_inference() and images.pixels.dtype == torch.uint8


def test_batches_are_the_same_every_time_and_no_image_is_in_two_sets(root):
    def labels_and_pixels(data: ImageSequences) -> list[tuple[list[int], torch.Tensor]]:
        data.setup()
        return [(label.tolist(), u) for u, label in itertools.islice(data.train_dataloader(), 8)]

    first, second = (labels_and_pixels(ImageSequences(str(root), SIZE, valid_images=8, batch_size=8)) for _ in range(2))
    assert all(a == b and torch.equal(u, v) for (a, u), (b, v) in zip(first, second, strict=True))
    passes = [sorted(itertools.chain.from_iterable(u[:, :, 0].tolist() for _, u in part)) for part in (first[:4], first[4:])]
    assert passes[0] == passes[1] and not torch.equal(first[0][1], first[4][1])  # each image once in each, in another order
    data = ImageSequences(str(root), SIZE, valid_images=8, batch_size=5)
    data.setup()
    known = {name: {tuple(pixels.flatten().tolist()) for pixels in images.pixels} for name, images in data.sets.items()}
    assert not known["train"] & known["valid"] and len(known["train"]) + len(known["valid"]) == 40
    assert [len(label) for _, label in data.val_dataloader()] == [5, 3] and len(data.val_dataloader()) == 2
    u, _ = next(iter(data.train_dataloader()))
    assert u.shape == (5, 3, SIZE * SIZE) and u.min() >= 0 and u.max() <= 1


def test_grey_images_have_one_channel_and_known_moments(root):
    data = ImageSequences(str(root), SIZE, grey=True, valid_images=1)
    data.setup()
    u = data.sequence(data.sets["test"].pixels)
    assert u.shape == (6, 1, SIZE * SIZE) and u[5, 0, -1].item() == pytest.approx((0.299 * 200 + 0.587 * 50 + 11.4) / 255)
    mean, std = data.moments()
    everything = data.sequence(data.sets["train"].pixels)
    torch.testing.assert_close((mean[0], std[0]), (everything.mean(), everything.std()))


def test_a_share_of_the_images_or_of_each_class():
    labels = np.array([0] * 30 + [1] * 10)
    assert share(labels, 0.5, False).tolist() == list(range(20))
    assert labels[share(labels, 0.5, True)].tolist() == [0] * 15 + [1] * 5
    assert len(share(labels, 1.0, True)) == 40


def test_crops_and_mirrors_move_whole_pixels():
    image = torch.arange(3 * SIZE * SIZE, dtype=torch.uint8).view(1, 3, -1).repeat(3, 1, 1)
    shift = torch.tensor([[4, 4, 6], [4, 4, 3]])
    same, mirrored, moved = crop_flip(image, SIZE, torch.tensor([False, True, False]), shift).unflatten(-1, (SIZE, SIZE))
    square = image[0].unflatten(-1, (SIZE, SIZE))
    assert torch.equal(same, square) and torch.equal(mirrored, square.flip(-1))
    assert torch.equal(moved[:, :-2, 1:], square[:, 2:, :-1]) and not moved[:, -2:].any() and not moved[..., 0].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0}, "fraction is 0; wanted above 0"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"augment": "rotate"}, "augment is 'rotate'; choose none or crop_flip"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImageSequences("nowhere", **options)


def test_what_cannot_be_read_is_refused_with_a_sentence(tmp_path, root):
    def refused(match: str, where: Path = tmp_path / "bad", split: str = "train", size: int = SIZE, **options) -> None:
        with pytest.raises(ImageError, match=match):
            read_images(where, split, size, **options)

    refused("does not exist; give --root FOLDER")
    (tmp_path / "bad").mkdir()
    refused("holds no data set of images; give --root FOLDER with train.npz, a folder train or cifar-10-batches-py")
    refused("images in .* are 8 x 8 pixels; wanted 32 x 32", root, size=32)
    file = tmp_path / "bad" / "train.npz"
    file.write_bytes(b"not a container")
    refused("train.npz is damaged or no container")
    make_container(file, [0, 1, 77])
    refused("image 2 of the train images in .* has the label 77; there are 10 classes, 0 to 9")
    make_container(file, [0, 1], offsets=np.array([0, 10], np.uint32))
    refused("is truncated: 2 labels, 2 offsets")
    make_container(file, [0, 1], offsets=np.array([0, 10, 10**6], np.uint32))
    refused("is truncated: .* up to 1000000")
    make_container(file, [0, 1], offsets=np.array([0, 10, 20], np.uint32))
    refused("image 0 of .* cannot be read")
    make_container(file, [0, 1], labels=np.array(3))
    refused("is no container of images: jpeg must be a row of uint8")
    np.savez_compressed(file, jpeg=np.zeros(1000, np.uint8), offsets=np.zeros(2), labels=np.zeros(1))
    damaged = bytearray(file.read_bytes())
    damaged[60:80] = bytes(20)
    file.write_bytes(damaged)
    refused("damaged or no container")
    file.write_bytes(file.read_bytes()[:300])
    refused("damaged or no container")
    (root / "train" / "bird" / "odd.png").write_bytes(encoded(np.zeros((4, 6, 3), np.uint8), "PNG"))
    refused("is 6 x 4 pixels and the first 8 x 8; make them one size", root)


def test_holding_out_everything_or_keeping_nothing_is_refused(root):
    with pytest.raises(ImageError, match="has 40 training images and valid_images holds out 40"):
        ImageSequences(str(root), SIZE, valid_images=40).setup()
    with pytest.raises(ImageError, match=r"fraction 0\.001 of 38 training images is none"):
        ImageSequences(str(root), SIZE, valid_images=2, fraction=0.001).setup()


def test_the_original_is_read_by_torchvision_which_is_asked_for_if_it_is_missing(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImageError, match="read by torchvision: pip install torchvision"):
        read_images(tmp_path, "train", 4)

    class Original:  # what torchvision's has
        def __init__(self, root, train, download):
            assert root == tmp_path and not download
            if not train:
                raise RuntimeError("Dataset not found or corrupted.")
            self.data, self.targets, self.classes = (
                np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3),
                [1, 0],
                ["a", "b"],
            )

    monkeypatch.setitem(sys.modules, "torchvision.datasets", types.SimpleNamespace(CIFAR10=Original))
    images = read_images(tmp_path, "train", 4)
    assert images.labels.tolist() == [1, 0] and images.classes == ("a", "b")
    assert images.pixels[1, :, 5].tolist() == [48 + 15, 48 + 16, 48 + 17]  # row 1, column 1
    with pytest.raises(ImageError, match="cannot be read or fetched: Dataset not found or corrupted"):
        read_images(tmp_path, "test", 4)


def of_pixels(data: ImageSequences, pixels: torch.Tensor) -> ImageSequences:
    data.sets = {"train": Images(pixels, torch.zeros(len(pixels), dtype=torch.int64), ("a",))}
    return data


def test_each_colour_has_moments_of_its_own():
    pixels = (torch.randint(0, 256, (50, 3, 16)) * torch.tensor([1.0, 0.5, 0.1]).view(1, 3, 1)).to(torch.uint8)
    mean, std = of_pixels(ImageSequences("nowhere", 4), pixels).moments()
    u = (pixels.double() / 255).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), u.mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(std.double(), u.std(1), rtol=1e-4, atol=0)


def test_half_of_the_images_are_mirrored_and_each_is_moved_by_itself():
    pixels = torch.arange(1, 1 + SIZE * SIZE, dtype=torch.uint8).expand(200, 3, -1)
    data = of_pixels(ImageSequences("nowhere", SIZE, batch_size=50, augment="crop_flip"), pixels)
    u = torch.cat([255 * u for u, _ in itertools.islice(data.train_dataloader(), 4)]).round().long()[:, 0]
    u = u.unflatten(-1, (SIZE, SIZE))
    assert 70 < int((u[:, 4, 4] < u[:, 4, 3]).sum()) < 130
    places = [(int(image.any(1).nonzero()[0]), int(image.any(0).nonzero()[0])) for image in u]
    assert len(set(places)) > 15 and places[:50] != places[50:100]


def test_a_balanced_share_is_of_each_class(monkeypatch):
    images = Images(torch.zeros(400, 3, 16, dtype=torch.uint8), torch.tensor([0] * 300 + [1] * 100), ("a", "b"))
    monkeypatch.setattr("s4audio.data.images.read_images", lambda *_: images)
    counts = []
    for balanced in (False, True):
        data = ImageSequences("x", 4, valid_images=1, fraction=0.1, balanced=balanced)
        data.setup()
        counts.append(data.sets["train"].labels.bincount().tolist())
    assert counts[1] == [30, 10] != counts[0] and sum(counts[0]) == 40
