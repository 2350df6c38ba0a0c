"""Makes a pretrained model of the package out of a trained one, small enough to travel with it.

    python samples/make_pretrained.py runs/flow_16k/best classical-16k

The matrices of convolutions and Linears, most of the numbers, are rounded to half precision, and read back as single; the
state spaces keep theirs, since a pole near the unit circle would land elsewhere. The card is written by hand, and stays.
"""

import argparse
import tempfile
from pathlib import Path

from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

import s4audio
from s4audio import checkpoint
from s4audio.files import replacing

MATRICES = (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the trained model")
    parser.add_argument("name", help="of the pretrained one")
    parser.add_argument("--out", type=Path, default=checkpoint.PRETRAINED, help="where its folder is")
    args = parser.parse_args()
    model, out = s4audio.load(args.model), args.out / args.name
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, MATRICES)}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(model, folder, checkpoint.read_config(args.model)["training"])
        weights = load_file(Path(folder) / checkpoint.WEIGHTS)
        small = {name: value.half() if name in matrices else value for name, value in weights.items()}
        for file, data in (
            (checkpoint.WEIGHTS, to_bytes(small)),
            (checkpoint.CONFIG, (Path(folder) / checkpoint.CONFIG).read_bytes()),
        ):
            with replacing(out / file, durable=True) as new:
                new.write(data)
    before, after = sum(v.nbytes for v in weights.values()), sum(v.nbytes for v in small.values())
    print(f"{out}: {after / 1e6:.1f} MB, and {before / 1e6:.1f} before")


if __name__ == "__main__":
    main()
