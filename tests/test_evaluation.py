"""The scripts of the published figures run, and say what the library says."""

import collections
import json
import runpy
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from s4audio import CausalAutoencoder, Flow, SaShiMi, load, save
from s4audio.audio import quantize, read_audio
from s4audio.cli import main
from s4audio.cli.run_page import read_curves
from s4audio.data import ImageSequences, read_images
from s4audio.metrics.evaluator import EmbeddedClip, Folder
from s4audio.metrics.signal import mel_distance, si_sdr
from s4audio.models import S4Model, WaveNet

ROOT = Path(__file__).parents[1]


@pytest.fixture
def model(tmp_path) -> Path:
    torch.manual_seed(0)
    save(CausalAutoencoder(4000, strides=(4,), widths=(4, 8), d_state=8, latent_channels=2), tmp_path / "model")
    return tmp_path / "model"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "evaluation" / script), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=None, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reconstruction_scores_whole_files(model, tmp_path):
    (tmp_path / "clips").mkdir()
    for number in range(2):
        soundfile.write(tmp_path / "clips" / f"{number}.wav", 0.3 * np.sin(np.arange(9000) * 0.1 * (number + 1)), 4000)
    json_file, picture = tmp_path / "scores.json", tmp_path / "picture.png"
    told = run(
        "reconstruction.py", str(model), "--split", f"test={tmp_path / 'clips'}", "--json", str(json_file),
        "--picture", str(picture),
    )  # fmt: skip
    scores = json.loads(json_file.read_text())["splits"]["test"]
    built = load(model)
    with torch.no_grad():
        wanted = [
            si_sdr(built(audio.unsqueeze(0))[0], audio).item()
            for audio, _ in (read_audio(tmp_path / "clips" / f"{number}.wav") for number in range(2))
        ]
    assert scores["si_sdr_db"] == pytest.approx(np.mean(wanted), abs=1e-3) and scores["files"] == 2
    assert scores["latent_numbers_a_second"] == 2000 and scores["low_pass_si_sdr_db"] > 20  # the tones lie below 1,000 Hz
    assert "low-pass of as many numbers" in told and picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_s4d_vae_draws_the_norms_of_several_runs(tmp_path):
    soundfile.write(tmp_path / "clip.wav", 0.3 * np.sin(np.arange(9000) * 0.1), 3000)
    small = ["--model.init_args.model.init_args.widths", "[4,4,4,4]", "--model.init_args.model.init_args.num_blocks", "1"]
    small += ["--data.init_args.clip_seconds", "0.2", "--data.init_args.batch_size", "2", "--trainer.log_every_n_steps", "1"]
    for seed in ("0", "1"):
        recipe = ["fit", "--config", "recipes/s4d_vae_classical.yaml", "--train", str(tmp_path / "clip.wav")]
        data = ["--data.init_args.valid", "null", "--data.init_args.valid_fraction", "0.3", "--trainer.accelerator", "cpu"]
        out = ["--out", str(tmp_path / seed), "--seed_everything", seed, "--steps", "3"]
        assert main([*recipe, *data, *small, *out]) == 0
    runs = [str(tmp_path / seed) for seed in ("0", "1")]
    told = run("s4d_vae.py", *runs, "--picture", str(tmp_path / "norms.png"), "--json", str(tmp_path / "norms.json"))
    rows = json.loads((tmp_path / "norms.json").read_text())["rows"]
    norms = read_curves(tmp_path / "0")["gradient_norm/model"][1]
    assert rows[0]["largest_norm"] == max(norms) > 0 and rows[0]["norms"] == rows[0]["steps"] == 3
    assert [row["finite"] for row in rows] == [True, True] and rows[0]["largest_norm"] != rows[1]["largest_norm"]
    assert 0 <= rows[0]["active_dimensions"] <= rows[0]["latent_channels"] == 32 and told.count("all finite") == 2
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")


def test_codec_compares_models_on_clips(model, tmp_path):
    (tmp_path / "clips").mkdir()
    sounds = [0.3 * np.sin(np.arange(9000) * 0.1 * (number + 1)) * np.arange(9000) / 9000 for number in range(2)]
    for number, sound in enumerate([*sounds, np.zeros(9000)]):
        soundfile.write(tmp_path / "clips" / f"{number}.wav", sound, 4000)
    told = run(
        "codec.py", str(model), str(model), "--data", str(tmp_path / "clips"), "--seconds", "1", "--json",
        str(tmp_path / "scores.json"),
    )  # fmt: skip
    first, second = json.loads((tmp_path / "scores.json").read_text())["rows"]
    built = load(model)
    heard = [read_audio(tmp_path / "clips" / f"{n}.wav")[0][None, :, s : s + 4000] for n in range(2) for s in (0, 4000)]
    with torch.no_grad():
        made = [built(clip) for clip in heard]
    for name, metric in (("mel_distance", lambda m, clip: mel_distance(m, clip, 4000)), ("si_sdr_db", si_sdr)):
        values = [metric(m, clip).item() for m, clip in zip(made, heard, strict=True)]
        assert first[name] == second[name] == pytest.approx(np.mean(values), rel=1e-4)
        assert first[f"{name}_standard_error"] == pytest.approx(np.std(values, ddof=1) / 2, rel=1e-3)
    assert first["clips"] == 4 and first["latent_numbers_a_second"] == 2000  # a silent file has none
    assert first["encodes_times_real_time"] > 0 and "4 clips of 1 s" in told and told.count("| CausalAutoencoder, ") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_file_takes_no_more_memory(model, tmp_path):
    """40 times as long; a copy of the longer file alone, as numbers, would be 9 MiB."""
    run("bench/stream_file.py", str(model), "--minutes", "0.25", "10", "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    short, long = figures["files"]
    assert long["samples"] == 10 * 60 * 4000
    assert long["peak_mib"] < short["peak_mib"] + 6
    assert long["largest_difference_from_forward"] < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_checking_a_long_file_takes_no_more_memory(tmp_path):
    """5 minutes of stereo at 48 kHz are 110 MiB as numbers."""
    told = run(
        "bench/check_folder.py",
        "--files",
        "20",
        "--workers",
        "2",
        "--minutes",
        "0.5",
        "5",
        "--json",
        str(tmp_path / "a.json"),
    )
    figures = json.loads((tmp_path / "a.json").read_text())
    short, long = figures["long"]
    assert (short["minutes"], long["minutes"]) == (0.5, 5) and figures["short"][0]["files"] == 20
    assert long["peak_mib"] < short["peak_mib"] + 16
    assert "20 files, 2 threads: " in told


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("minutes", [0.25, pytest.param(60, marks=pytest.mark.slow)])
def test_an_hour_streams_in_flat_memory_as_forward_and_without_a_seam(model, tmp_path, minutes):
    path = tmp_path / "hour.json"
    run("bench/stream_hour.py", str(model), "--minutes", str(minutes), "--block", "1000", "--json", str(path))
    found = json.loads(path.read_text())
    for verb, tolerance in (("reconstruct", 1e-4), ("stream", 1e-5)):  # the first is rounded to 16 bits
        resident = found[verb]["resident_mib"]
        assert minutes < 1 or resident["minute_55"] < resident["minute_5"] + 8  # the hour itself, as numbers, is 55 MiB
        windows, seams = found[verb]["windows"], found[verb]["seams"]
        assert len(windows) == 3 and max(window["context"] for window in windows) < 1e-6
        assert max(window["difference"] for window in windows) < tolerance
        assert seams["largest_at_edges"] <= seams["largest_elsewhere"]
        assert seams["share_of_draws_with_a_larger_step"] > 0.005
    assert found["stream"]["seams"]["edges"] == 4 * 60 * minutes - 1


def test_tables_of_the_readme_are_those_of_the_results():
    done = subprocess.run([sys.executable, "evaluation/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_loader_and_several_devices_are_measured(tmp_path):
    small, path = ["--recipe", "recipes/debug.yaml", "--files", "4", "--json", str(tmp_path / "figures.json")], tmp_path
    timing = ["--file_seconds", "3", "--steps", "5", "--seconds", "0.3", "--workers", "0", "1"]
    run("bench/loader.py", *small, *timing)
    found = json.loads((path / "figures.json").read_text())
    assert [row["num_workers"] for row in found["workers"]] == [0, 1]
    assert all(0 < row["waiting"] < 1 and row["clips_a_second"] > 100 for row in found["workers"])
    run("bench/ddp.py", "--device", "cpu", *small, "--batch_size", "2", "--steps", "5", "--timed_steps", "8")
    found = json.loads((path / "figures.json").read_text())
    every, l1_alone = found["curves"]
    assert every["largest_difference_in_3_steps"] < 1e-5 and l1_alone["largest_difference"] < 1e-5
    assert found["scaling"] > 0 and len(every["one_device"]) == 5


def test_calibration_says_how_often_an_interval_holds(tmp_path):
    path = tmp_path / "calibration.json"
    run("calibration.py", "--repeats", "4", "--clips", "80", "--dimensions", "8", "--json", str(path))
    found = json.loads(path.read_text())
    assert [result["truth"] for result in found["fid_infinity"]] == [0, 2, 0, 2] and len(found["kad"]) == 3
    assert all(0 <= result["coverage_of_95_percent_interval"] <= 1 for result in found["fid_infinity"] + found["kad"])


def test_real_audio_says_what_an_embedding_is_worth(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "tones").mkdir()
    for number in range(24):
        tone = 0.3 * np.sin(np.arange(4000) * generator.uniform(0.1, 1)) * np.exp(-np.arange(4000) / 2000)
        soundfile.write(tmp_path / "tones" / f"{number}.wav", tone, 4000)
    path = tmp_path / "tones.json"
    run("real_audio.py", str(tmp_path / "tones"), "--thirds", "3", "--halves", "5", "--json", str(path))
    found = json.loads(path.read_text())
    assert found["collection"] == "tones" and found["clips"] == 24 and not found["silence_is_best"]
    assert found["rises_with_damage"]["white noise, kad"]


def test_system_4_is_scored_from_noise_and_from_samples(model, tmp_path):
    torch.manual_seed(1)
    save(CausalAutoencoder(4000, strides=(4,), widths=(4, 8), d_state=8, latent_channels=2), tmp_path / "judge")
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for number in range(4):
            tone = 0.3 * np.sin(np.arange(8000) * 0.1 * (number + 1)) * (1 if split == "train" else 0.5)
            soundfile.write(tmp_path / split / f"{number}.wav", tone, 4000)
    path = tmp_path / "system4.json"
    arguments = ["--train", str(tmp_path / "train"), "--test", str(tmp_path / "test"), "--json", str(path)]
    arguments += ["--picture", str(tmp_path / "noise.png")]
    run("system4.py", *arguments, "--judge", str(tmp_path / "judge"), "--model", f"mine={model},{model}")
    found = json.loads(path.read_text())
    assert len(found["rows"]) == 8  # 2 embeddings, noise and samples, 2 splits
    row = found["rows"][0]
    assert row["latent_numbers_a_second"] == 2000 and len(row["seeds"]) == 2 and row["fid_std"] == 0
    of_noise, of_samples = (
        next(r["kad"] for r in found["rows"] if r["from"] == source and r["embedding"] == "log_mel")
        for source in ("noise", "samples")
    )
    assert of_noise > 0 and np.isfinite(of_samples)
    command = [sys.executable, "evaluation/system4.py", *arguments, "--judge", str(model), "--model", f"mine={model}"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and "the judge is one of the seeds of mine" in refused.stderr


def test_runs_side_by_side_stop_and_go_on(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(4):
        soundfile.write(folder / f"{number}.wav", 0.3 * np.sin(np.arange(8000) * 0.1 * (number + 1)), 4000)
    common, data = ["--out", str(tmp_path / "runs"), "--steps"], ["--", "--train", str(folder), "--valid", str(folder)]
    told = run("side_by_side.py", *common, "4", "--at_once", "1", "debug:0", "debug,d_state=4:0@cpu", *data)
    assert "debug_0: finished" in told and "debug,d_state=4_0: finished" in told
    runs = [tmp_path / "runs" / name for name in ("debug_0", "debug,d_state=4_0")]
    weights = [(folder / "best" / "model.safetensors").read_bytes() for folder in runs]
    assert weights[0] != weights[1]
    stopped = run("side_by_side.py", *common, "100000", "--minutes", "0.2", "--at_once", "1", "debug:2", "debug:3", *data)
    assert "debug_2: stopped" in stopped and "debug:3: not begun" in stopped
    command = [sys.executable, "evaluation/side_by_side.py", *common, "4", "nothing:0", *data]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "'nothing:0' is no run; wanted RECIPE:SEED" in refused.stderr


def test_classifiers_are_scored_checked_and_drawn(tmp_path):
    for split, number in (("train", 12), ("test", 5)):
        for label, colour in enumerate(((200, 30, 30), (30, 30, 200))):
            (tmp_path / "images" / split / str(label)).mkdir(parents=True)
            for index in range(number):
                image = Image.new("RGB", (8, 8), tuple(value + index for value in colour))
                image.save(tmp_path / "images" / split / str(label) / f"{index}.png")
    small = "scifar_quick,d_model=4,num_layers=1,d_state=4,num_classes=2,data.init_args.size=8,data.init_args.valid_images=4"
    job, out = f"{small},data.init_args.batch_size=4,model.init_args.warmup_steps=1:3@cpu", tmp_path / "runs"
    data = str(tmp_path / "images")
    told = run("side_by_side.py", "--out", str(out), "--steps", "60", job, "--", "--root", data)
    assert "finished" in told and "test: " in told
    scored = run(
        "scifar.py", "--runs", str(out), "--data", data, "--json", str(tmp_path / "scifar.json"), "--pictures", str(tmp_path)
    )
    result = json.loads((tmp_path / "scifar.json").read_text())
    (row,) = result["rows"]
    assert "test 100.00% ± 0.00%" in scored and (row["seed"], row["test_accuracy"]) == (3, 1.0)
    assert row["epochs"] == 12.0 and row["ms_an_image_alone"] > 0 and result["recipes"][0]["seeds"] == 1
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == {f"scifar_{name}" for name in ("loss", "accuracy", "classes", "recipes", "steps", "poles")}
    checked = run("scifar_check.py", str(next(out.glob("*/best"))), data)
    assert checked.splitlines()[-1] == "accuracy 100.00 % ± 0.00"
    command = [sys.executable, "evaluation/scifar_check.py", str(next(out.glob("*/best"))), str(tmp_path / "nowhere")]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "does not exist; give --root FOLDER" in refused.stderr


def test_likelihoods_are_bits_per_sample_beside_order_0(tmp_path):
    for split, seeds in (("train", (0, 1)), ("test", (2, 3, 4))):
        (tmp_path / split).mkdir()
        for seed in seeds:
            noise = np.random.default_rng(seed).normal(size=1000 + 100 * seed)
            soundfile.write(tmp_path / split / f"{seed}.wav", 0.1 * noise, 8000)
    torch.manual_seed(0)
    small = SaShiMi(8000, d_model=4, num_blocks=1, pools=(2,), d_state=4, num_levels=16, chunk_samples=500)
    save(small, tmp_path / "sashimi")
    save(WaveNet(8000, d_model=4, d_skip=4, num_stacks=1, num_layers=2, num_levels=16), tmp_path / "wavenet")
    arguments = ["--train", str(tmp_path / "train"), "--test", str(tmp_path / "test")]
    models = ["--model", f"ours={tmp_path / 'sashimi'}", "--model", f"theirs={tmp_path / 'wavenet'}"]
    told = run("likelihood.py", *arguments, *models, "--json", str(tmp_path / "bits.json"))
    result = json.loads((tmp_path / "bits.json").read_text())
    audio = {split: [read_audio(file)[0] for file in sorted((tmp_path / split).iterdir())] for split in ("train", "test")}
    codes = {split: torch.cat([quantize(clip, 16)[0] for clip in clips]) for split, clips in audio.items()}
    share = (codes["train"].bincount(minlength=16) + 1).double() / (len(codes["train"]) + 16)
    by_name = {row["model"]: row for row in result["rows"]}
    assert result["files"] == 3 and result["samples"] == len(codes["test"]) == 3900
    assert by_name["order 0"]["bits_per_sample"] == pytest.approx(-share[codes["test"]].log2().mean().item())
    for name, folder in (("ours", "sashimi"), ("theirs", "wavenet")):
        with torch.no_grad():
            p = [load(tmp_path / folder)(clip.unsqueeze(0)).softmax(1) for clip in audio["test"]]
        of_codes = [v.gather(1, quantize(clip, 16).unsqueeze(1)) for v, clip in zip(p, audio["test"], strict=True)]
        wanted = -torch.cat(of_codes, dim=-1).log2().mean().item()
        assert by_name[name]["bits_per_sample"] == pytest.approx(wanted, rel=1e-4)
        assert f"{name}: {wanted:.3f} bits per sample" in told
    save(SaShiMi(8000, d_model=4, num_blocks=1, pools=(2,), d_state=4, num_levels=32, chunk_samples=500), tmp_path / "other")
    command = [sys.executable, "evaluation/likelihood.py", *arguments, *models, "--model", f"other={tmp_path / 'other'}"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and "other has num_levels 32, and the first model 16" in refused.stderr


def test_the_speed_of_generation_is_measured(tmp_path):
    told = run("bench/generate_speed.py", "--batch", "2", "--samples", "40", "--repeats", "1", "--json", str(tmp_path / "f"))
    (row,) = json.loads((tmp_path / "f").read_text())["rows"]
    assert row["samples_a_second"] == pytest.approx(2 * 1e3 / row["ms_a_step"]) and "batch 2" in told
    save(CausalAutoencoder(8000, strides=(2,), widths=(4, 4), d_state=4, latent_channels=2), tmp_path / "net")
    of_clip = ["--model", str(tmp_path / "net"), "--seconds", "0.5", "--repeats", "2", "--json", str(tmp_path / "f")]
    run("bench/generate_speed.py", *of_clip)
    (row,) = json.loads((tmp_path / "f").read_text())["rows"]
    assert row["times_real_time"] == pytest.approx(0.5 / row["s"]) and row["first_call_s"] > 0


def write_words(folder: Path, per_class: int, seed: int) -> None:
    """Two classes of clips at 8 kHz: low tones and high ones, of many pitches, lengths and levels."""
    rng = np.random.default_rng(seed)
    for name, low in (("high", 2000), ("low", 200)):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            time = np.arange(rng.integers(3000, 9000)) / 8000
            tone = rng.uniform(0.1, 0.8) * np.sin(2 * np.pi * low * rng.uniform(1, 1.5) * time)
            soundfile.write(folder / name / f"{number}.wav", tone, 8000)


def test_generators_are_scored_beside_what_training_clips_score(tmp_path):
    write_words(tmp_path / "train", 4, 0)
    write_words(tmp_path / "test", 3, 1)
    size = {"strides": (2,), "widths": (4, 4), "d_state": 4}
    for name, seed in (("judge", 0), ("net", 1)):
        torch.manual_seed(seed)
        save(CausalAutoencoder(8000, **size, latent_channels=2), tmp_path / name)
    save(Flow(8000, **size, num_blocks=1, classes=("high", "low")), tmp_path / "flow")
    common = ["--train", str(tmp_path / "train"), "--test", str(tmp_path / "test"), "--judge", str(tmp_path / "judge")]
    models = ["--model", f"net={tmp_path / 'net'}", "--model", f"flow={tmp_path / 'flow'}"]
    told = run("generators.py", *common, *models, "--out", str(tmp_path / "out"), "--seconds", "1.1", "--clips", "5")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["train_clips"], scores["test_clips"]) == (8, 6)  # each shorter than a clip, and filled up
    assert sorted(file.name for file in (tmp_path / "out" / "flow").glob("*.wav")) == [
        "00000_high.wav", "00001_low.wav", "00002_high.wav", "00003_low.wav", "00004_high.wav"
    ]  # fmt: skip
    made, rate = soundfile.read(tmp_path / "out" / "net" / "00003.wav")
    with torch.no_grad():
        wanted = load(tmp_path / "net").sample(1, 8800, generator=torch.Generator().manual_seed(3))[0, 0]
    assert rate == 8000 and np.abs(made - wanted.clamp(-1, 1).numpy()).max() < 2 / 2**15
    for row in scores["rows"]:
        assert row["log_mel"]["train_against_test"]["kad"] < row["log_mel"]["kad"] and row["clips"] == 5
        assert row["log_mel"]["share_nearer_to_train_than_1_percent_of_test"] == 0
        assert row["log_mel"]["drift"] is None  # clips of a second, and a tenth
    assert scores["drift"]["log_mel"] == {"train": None, "test": None}
    seams = {row["model"]: row["seams"] for row in scores["rows"]}
    assert seams["net"] == {} and seams["flow"]["inpaint_share_of_borders_beyond"] == 0
    assert 0 < seams["flow"]["continue_largest_step_against_elsewhere"] < 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<audio") == 12 and "flow: 5 clips of 1.1 s" in told
    clips = [tmp_path / "out" / "net" / "00003.wav", tmp_path / "out" / "flow" / "00002_high.wav"]
    before = [(clip.read_bytes(), clip.stat().st_mtime_ns) for clip in clips]
    save(CausalAutoencoder(8000, **size, latent_channels=2), tmp_path / "net")  # with other weights
    run("generators.py", *common, *models, "--out", str(tmp_path / "out"), "--seconds", "1.1", "--clips", "5")
    assert clips[0].read_bytes() != before[0][0] and clips[1].stat().st_mtime_ns == before[1][1]
    run("generators.py", *common, *models, "--out", str(tmp_path / "out"), "--seconds", "1.1", "--clips", "3")
    assert [len(list((tmp_path / "out" / name).glob("*.wav"))) for name in ("net", "flow", "test")] == [
        3,
        3,
        6,
    ]  # none is old
    command = [sys.executable, "evaluation/generators.py", *common, "--model", f"judge={tmp_path / 'judge'}"]
    refused = subprocess.run([*command, "--out", str(tmp_path / "o")], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and "the judge is judge itself" in refused.stderr
    (recording, *_) = (tmp_path / "train").rglob("*.wav")
    recording.rename(recording := recording.with_name("00000_000.wav"))
    command = [sys.executable, "evaluation/generators.py", *common, *models, "--out", str(tmp_path)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and "where clips of an earlier run are removed" in refused.stderr and recording.exists()


def test_words_are_recognized_by_a_classifier_of_recordings(tmp_path):
    write_words(tmp_path / "train", 32, 0)
    write_words(tmp_path / "test", 5, 1)
    write_words(tmp_path / "words", 4, 2)
    made = tmp_path / "made"  # named by their class, of which half are wrong
    made.mkdir()
    for number, file in enumerate(sorted((tmp_path / "words").rglob("*.wav"))):
        word = ("high", "low")[number % 2]  # as `generate` names them, and `generators.py`
        file.rename(made / (f"{word}_0_{number:03d}.wav" if number < 4 else f"{number:05d}_{word}.wav"))
    common = ["--train", str(tmp_path / "train"), "--test", str(tmp_path / "test")]
    run("recognize.py", *common, "--generated", str(made), "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["classes"] == ["high", "low"] and found["folders"][str(tmp_path / "test")]["accuracy"] == 1
    of_made = found["folders"][str(made)]
    assert of_made["accuracy"] == 0.5 and of_made["clips"] == 8
    assert of_made["standard_error"] == pytest.approx((0.25 / 8) ** 0.5)


def test_a_recipe_is_the_mean_and_the_deviation_of_its_seeds():
    summary = runpy.run_path(str(ROOT / "evaluation" / "scifar.py"))["summary"]
    names = ("test_accuracy", "valid_accuracy", "train_accuracy", "wall_seconds", "images_a_second")
    rows = [
        {"recipe": recipe, "parameters": 5, "epochs": 2.0, **dict.fromkeys(names, value)}
        for recipe, value in (("a", 1.0), ("b", 7.0), ("a", 2.0), ("a", 6.0))
    ]
    a, b = summary(rows)
    assert (a["seeds"], b["seeds"], b["test_accuracy_std"]) == (3, 1, None)
    for name in names:
        assert (a[name], b[name]) == (3, 7) and a[f"{name}_std"] == pytest.approx(7**0.5)


def test_bits_are_the_mean_over_samples_and_spread_over_files():
    summary = runpy.run_path(str(ROOT / "evaluation" / "likelihood.py"))["summary"]
    assert summary([100.0, 600.0], [100, 200]) == pytest.approx(
        {"bits_per_sample": 700 / 300, "bits_per_sample_std_of_files": 2**0.5}
    )


@pytest.mark.parametrize(("script", "name"), [("likelihood.py", "read"), ("codec.py", "clips")])
def test_recordings_are_heard_at_the_level_of_the_training(tmp_path, script, name):
    soundfile.write(tmp_path / "quiet.wav", 0.25 * np.sin(np.arange(800) * 0.1), 8000)
    read = runpy.run_path(str(ROOT / "evaluation" / script))[name]
    for level, peak in (("peak", 1.0), ("none", 0.25)):
        common = ({"sample_rate": 8000, "normalize": level},) if name == "read" else (8000, level, 0.1)
        (clip,) = read(str(tmp_path), *common)
        assert clip.shape == (1, 1, 800) and clip.abs().max().item() == pytest.approx(peak, rel=0.01)


def test_encoding_and_decoding_have_speeds_of_their_own():
    speed = runpy.run_path(str(ROOT / "evaluation" / "codec.py"))["speed"]
    model = types.SimpleNamespace(
        sample_rate=1000, encode=lambda clip: time.sleep(0.05) or clip, decode=lambda latent: latent
    )
    found = speed(model, torch.zeros(1, 1, 1000))
    assert found["encodes_times_real_time"] <= 20 < found["decodes_times_real_time"]


def write_noise(folder: Path, *per_class: int) -> None:
    """Images of noise in a subfolder for each class."""
    rng = np.random.default_rng(0)
    for label, number in enumerate(per_class):
        (folder / str(label)).mkdir(parents=True)
        for index in range(number):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / str(label) / f"{index}.png")


OF_IMAGES = {"classes": ["0", "1"], "size": 8, "grey": False, "train_images": 20}


@torch.no_grad()
def right_of(model: S4Model, data: Path) -> torch.Tensor:
    """Which of the test images a model gets right."""
    images = read_images(str(data), "test", 8)
    return model(ImageSequences(str(data), 8, False).sequence(images.pixels)).argmax(-1) == images.labels


def test_a_check_counts_all_images_of_a_small_model_and_the_first_of_a_large_one(tmp_path, monkeypatch, capsys):
    data = tmp_path / "images"
    write_noise(data / "test", 5, 5)
    torch.manual_seed(0)
    model = S4Model(3, 2, d_model=4, num_layers=1, d_state=4).eval()
    save(model, tmp_path / "model", OF_IMAGES)
    right = right_of(model, data)
    main = runpy.run_path(str(ROOT / "evaluation" / "scifar_check.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["scifar_check.py", str(tmp_path / "model"), str(data)])
    for changes, number in (({"BATCH": 4}, 10), ({"BATCH": 2, "LARGE": 1, "FEW": 7}, 7)):
        for name, value in changes.items():
            monkeypatch.setitem(main.__globals__, name, value)
        main()
        told = capsys.readouterr().out
        share = right[:number].double().mean().item()
        assert f"testing {number}\n" in told and f"accuracy {100 * share:.2f} % ±" in told.splitlines()[-1]


def test_a_row_is_of_the_best_model_on_the_test_images_and_of_all_steps(tmp_path, monkeypatch):
    data, run = tmp_path / "images", tmp_path / "small_3"
    write_noise(data / "train", 1, 9)
    write_noise(data / "test", 5, 5)
    torch.manual_seed(0)
    model = S4Model(3, 2, d_model=4, num_layers=1, d_state=4).eval()
    for name, steps in (("best", 30), ("last", 60)):
        told = {**OF_IMAGES, "steps": steps, "wall_seconds": steps / 15, "device": "CPU"}
        save(model, run / name, {**told, "scores": {"valid/accuracy": steps / 100}})
    (run / "recipe.yaml").write_text("data: {init_args: {batch_size: 4}}")
    score = runpy.run_path(str(ROOT / "evaluation" / "scifar.py"))["score"]
    curves = {"train/accuracy": (list(range(100)), [0.1] * 50 + [0.9] * 50)}
    monkeypatch.setitem(score.__globals__, "read_curves", lambda run: curves)
    row, share = score(run, str(data), "cpu"), right_of(model, data).double().mean().item()
    assert (row["recipe"], row["seed"], row["test_accuracy"]) == ("small", 3, pytest.approx(share))
    assert row["standard_error"] == pytest.approx((share * (1 - share) / 10) ** 0.5) and row["valid_accuracy"] == 0.3
    assert row["train_accuracy"] == pytest.approx(0.9) and row["best_step"] == 30
    assert (row["epochs"], row["wall_seconds"], row["images_a_second"]) == (12, 4, 60)


def test_a_step_at_a_border_is_found_beside_those_elsewhere(tmp_path, monkeypatch):
    class Jumps:
        def inpaint(self, clips, start, stop, generators):
            made = clips.clone()
            made[..., start:stop] += 0.5
            return made

    monkeypatch.syspath_prepend(str(ROOT / "evaluation"))
    monkeypatch.setattr("s4audio.load", lambda path, device: Jumps())
    soundfile.write(tmp_path / "clip.wav", 0.1 * np.sin(np.arange(900) * 0.1), 8000)
    found = runpy.run_path(str(ROOT / "evaluation" / "generators.py"))["seams"]("", tmp_path, "cpu")
    assert found["inpaint_share_of_borders_beyond"] == 1
    assert found["inpaint_largest_step_against_elsewhere"] == pytest.approx(0.5 / 0.01, rel=0.05)


def test_near_copies_are_nearer_to_training_than_one_test_clip_in_a_hundred(monkeypatch):
    def nearest(distances) -> types.SimpleNamespace:
        return types.SimpleNamespace(distance=torch.as_tensor(distances))

    found = types.SimpleNamespace(
        scores=collections.defaultdict(lambda: collections.defaultdict(dict)), to_train=nearest([0.5, 1.005, 1.02, 9.0]),
        reference_to_train=nearest(torch.linspace(1, 2, 101)), to_reference=nearest([5.0] * 4),
    )  # fmt: skip
    monkeypatch.syspath_prepend(str(ROOT / "evaluation"))
    score = runpy.run_path(str(ROOT / "evaluation" / "generators.py"))["score"]
    scores = score(types.SimpleNamespace(evaluate=lambda *folders: found), *map(Path, "abc"))
    assert scores["share_nearer_to_train_than_1_percent_of_test"] == 0.5


def test_training_clips_alike_are_those_of_different_recordings(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "evaluation"))
    script = runpy.run_path(str(ROOT / "evaluation" / "generators.py"))
    (tmp_path / "in").mkdir()
    for name, seconds in (("b", 0.25), ("a", 0.1)):
        soundfile.write(tmp_path / "in" / f"{name}.wav", 0.1 * np.ones(round(8000 * seconds)), 8000)
    assert script["cut"](str(tmp_path / "in"), tmp_path / "out", 0.1, 8000) == 3
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00000_000.wav", "00001_000.wav", "00001_001.wav"]
    at = {"00000_000": 0.0, "00000_001": 0.1, "00001_000": 5.0, "00002_000": 5.4, "00002_001": 9.0}
    clips = [
        EmbeddedClip(f"{name}.wav", Path(), 1.0, name, (), torch.full((2, 3), place / 3**0.5)) for name, place in at.items()
    ]
    assert script["share_alike"](Folder("", clips), 0.5) == 0.4  # of five, those at 5.0 and 5.4
    assert script["share_alike"](Folder("", clips), 0.3) == 0


def test_drift_is_how_far_a_clip_goes_against_how_far_another_is(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "evaluation"))
    drift = runpy.run_path(str(ROOT / "evaluation" / "generators.py"))["drift"]

    def clips(**at: list[float]) -> Folder:  # a window of two numbers for each place, the first of them twice as wide
        windows = {name: torch.tensor([[2 * place, 0.0] for place in places]) for name, places in at.items()}
        return Folder("", [EmbeddedClip(f"{name}.wav", Path(), 1.0, name, (), each) for name, each in windows.items()])

    scale = torch.tensor([2.0, 1.0])
    # 1 and 2 from the first third to the last; from one's first to the other's last 7 and 4. What is between does not count.
    apart = clips(a_0=[0, 0, 50, -9, 1, 1], b_0=[5, 5, 0, 0, 7, 7])
    assert drift(apart, scale) == pytest.approx(1.5 / ((7 + 4) / 2))
    assert drift(clips(a_0=[0, 0, 0], a_1=[9, 9, 9]), scale) is None  # of one recording
    assert drift(clips(a_0=[0, 0, 0], a_1=[9, 9, 9], b_0=[1, 1, 1]), scale) == 0
    assert drift(clips(a_0=[0], b_0=[1]), scale) is None
    everywhere = torch.randn(40, 9, 2, generator=torch.Generator().manual_seed(0))
    noise = [EmbeddedClip(f"{n}_0.wav", Path(), 1.0, str(n), (), windows) for n, windows in enumerate(everywhere)]
    assert drift(Folder("", noise), scale) == pytest.approx(1, abs=0.15)


def test_what_is_recognized_is_told_of_each_class():
    class Zero(torch.nn.Module):
        num_classes = 2

        def forward(self, frames):
            return torch.tensor([[1.0, 0.0]]).expand(len(frames), 2)

    accuracy = runpy.run_path(str(ROOT / "evaluation" / "recognize.py"))["accuracy"]
    found = accuracy(Zero(), torch.randn(4, 8000), torch.tensor([0, 1, 0, 0]))
    assert (found["accuracy"], found["by_class"]) == (0.75, [1.0, 0.0])


def test_the_recognizer_is_trained_and_then_only_asked():
    train = runpy.run_path(str(ROOT / "evaluation" / "recognize.py"))["train"]
    train.__globals__["EPOCHS"] = 1
    torch.manual_seed(0)
    model = train(torch.randn(4, 8000), torch.tensor([0, 1, 0, 1]), 2)
    assert not any(module.training for module in model.modules()) and model.num_classes == 2


def test_copies_are_found_sample_for_sample(tmp_path):
    """At any place, fainter and upside down, or half hidden in noise; what is nearly silent is not asked."""
    torch.manual_seed(0)
    train, clips = 0.1 * torch.randn(70, 4000), 0.1 * torch.randn(5, 3000)
    clips[1, 1000:1500] = -0.5 * train[69, 3333:3833]
    clips[2, 500:1000] = train[3, 700:1200] + 0.1 * torch.randn(500)
    clips[3] = 0.01 * train[4, :3000]
    clips[4, :500] = train[5, 3500:]
    likest = runpy.run_path(str(ROOT / "evaluation" / "copies.py"))["likest"]
    values, places = likest(clips, train, 500)
    assert values[0] < 0.3 and values[3] == 0
    assert values[[1, 2, 4]].tolist() == pytest.approx([1, 0.5**0.5, 1], abs=0.05)
    assert places[[1, 2, 4]].tolist() == [69, 3, 5]
    windows = clips[0].unfold(0, 500, 250).double().numpy()
    wanted = max(
        np.abs(np.correlate(clip, window, "valid") / np.sqrt(np.correlate(clip**2, np.ones(500), "valid"))).max()
        / np.linalg.norm(window)
        for clip in train.double().numpy() for window in windows
    )  # fmt: skip
    assert values[0].item() == pytest.approx(wanted, rel=1e-4)
    for name, audio in (("train", train), ("test", clips[:1]), ("model", clips[:3])):
        for index, clip in enumerate(audio):
            (tmp_path / name).mkdir(exist_ok=True)
            soundfile.write(tmp_path / name / f"{index:02}.wav", clip.numpy(), 1000)
    told = run("copies.py", str(tmp_path), "--seconds", "0.5", "--json", str(tmp_path / "c.json"))
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [(row["clips"], row["number"]) for row in rows] == [("test", 1), ("model", 3)]
    assert rows[1]["highest"] == pytest.approx(1, abs=1e-3) and "highest 1.00, of 01.wav with training clip 69.wav" in told
    assert rows[0]["highest"] == pytest.approx(wanted, abs=1e-3)
    for folder, seconds, says in (
        (tmp_path, "5", "at most the 4 s of a clip"),
        (tmp_path / "train", "1", "no folder train"),
    ):
        command = [sys.executable, "evaluation/copies.py", str(folder), "--seconds", seconds]
        assert says in subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr
