"""The card of a model, README.md in its folder: what it is, how it was trained and how to use it; from config.json alone."""

from typing import Any

ABOUT = {  # class -> what the hub sorts it under, and what it is
    "CausalAutoencoder": ("audio-to-audio", "A causal autoencoder of raw audio, made of S4D layers"),
    "ConvVAE": ("audio-to-audio", "A convolutional variational autoencoder of raw audio"),
    "Flow": ("text-to-audio", "A generator of raw audio by flow matching, made of S4D layers"),
    "PatchS4Model": (
        "image-classification",
        "A classifier of images, which reads patches one after the other with S4D layers",
    ),
    "S4DAutoencoder": ("audio-to-audio", "A small autoencoder of raw audio, made of S4D layers"),
    "S4DVAE": ("audio-to-audio", "A variational autoencoder of raw audio, made of S4D layers"),
    "S4Model": ("image-classification", "A classifier of sequences, made of state-space layers"),
    "SaShiMi": ("text-to-audio", "An autoregressive model of raw audio, made of state-space layers"),
    "WaveNet": ("audio-to-audio", "An autoregressive model of raw audio, made of convolutions, that tells likelihoods"),
}
READ = {"train_files", "train_seconds", "valid_files", "valid_seconds", "normalize"}  # of recordings
TEXT = """---
library_name: s4audio
pipeline_tag: {task}
tags:
- s4audio
- state-space-model
- {medium}
# license: apache-2.0 or another; the recordings or images may ask for one
---

<!-- s4audio writes this file from config.json when it saves the model. -->

# {name}

{what}.

## Training

| | |
| --- | --- |
{facts}

## Use

FOLDER is where this file is. Nothing in it is executed: the model is `config.json` and `model.safetensors`.

```sh
{commands}
```

```python
import s4audio

model = s4audio.load("FOLDER")
```

## To fill in

* What it was trained on: whose recordings or images, and what they allow.
* What it is for, and what it is not good at.
* The license, above in the first lines too.
"""


def card(config: dict[str, Any]) -> str:
    """README.md of a model folder, with the head that the Hugging Face hub reads.

    Args:
        config: `class`, `arguments` and `training`, as `checkpoint.read_config` returns them.
    """
    name, arguments = config["class"], config["arguments"]
    task, what = ABOUT[name]
    audio = "sample_rate" in arguments
    title, commands = name, ["s4audio info FOLDER"]
    if audio:
        what = f"{what}, at {arguments['sample_rate']} Hz"
        title = f"{name}, {arguments['sample_rate']} Hz"
        if name in ("Flow", "SaShiMi"):
            commands.append("s4audio generate FOLDER --from noise")
        if name not in ("SaShiMi", "WaveNet"):  # which have no latent to vary
            commands.append("s4audio generate FOLDER --from RECORDING.wav --variation 0.1")
    if name == "CausalAutoencoder" and not arguments["bidirectional"]:
        what = f"{what}; what it learned in parallel it runs as a stream, block by block"
        commands += ["s4audio reconstruct FOLDER RECORDING.wav OUT.wav", "s4audio stream FOLDER < IN.raw > OUT.raw"]
    facts = (f"| {fact} | {sentence} |" for fact, sentence in describe_training(config["training"]))
    medium = "audio" if audio else "images"
    return TEXT.format(task=task, medium=medium, name=title, what=what, facts="\n".join(facts), commands="\n".join(commands))


def describe_training(training: dict[str, Any]) -> list[tuple[str, str]]:
    """How the model was trained, from its config.json, line by line."""
    if "steps" not in training or not (set(training) >= READ or {"train_images", "valid_images"} <= set(training)):
        return [("training", "not recorded")]
    minutes, device = training.get("wall_seconds", 0) / 60, training.get("device", "an unknown device")
    lines = [("training", f"{training['steps']:,} steps in {minutes:.1f} min on {device}")]
    if "train_images" in training:
        lines.append(("images", f"{training['train_images']:,}; held out {training['valid_images']:,}"))
    else:
        read = f"{training['train_files']} files, {training['train_seconds'] / 60:.1f} min"
        held = f"{training['valid_files']} files, {training['valid_seconds'] / 60:.1f} min"
        lines.append(("recordings", f"{read}; held out {held}; level: {training['normalize']}"))
    held_out = {k.removeprefix("valid/"): v for k, v in training.get("scores", {}).items() if k.startswith("valid/")}
    if held_out:
        clip = training.get("clip_seconds")
        what = "images" if "train_images" in training else f"in clips of {clip:g} s" if clip else "whole files"
        lines.append(("held out", ", ".join(f"{name} {value:.4g}" for name, value in held_out.items()) + f" ({what})"))
    return lines
