"""Files in and out, rates and levels; every refusal is one sentence."""

import os
import pickle
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch

from s4audio import audio
from s4audio.audio import (
    PCM_FORMATS,
    QUANTIZATIONS,
    AudioError,
    band_limit,
    clipped_runs,
    dequantize,
    find_audio,
    from_pcm,
    list_folder,
    missing_bytes,
    normalize,
    quantize,
    read_audio,
    read_blocks,
    resample,
    sample_rate_of,
    to_pcm,
    write_audio,
    write_blocks,
)


def tone(rate: int, hz: float = 220.0, seconds: float = 1.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize(
    ("extension", "tolerance"), [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.05), ("mp3", 0.05), ("aiff", 1e-4)]
)
def test_reads_what_soundfile_wrote(tmp_path, extension, tolerance):
    path, rate = tmp_path / f"tone.{extension}", 16_000
    soundfile.write(path, tone(rate), rate)
    read, found = read_audio(path)
    assert found == rate and read.dtype == torch.float32 and read.shape[0] == 1
    middle = slice(4000, 8000)  # lossy codecs pad at the ends
    assert np.abs(read[0, middle].numpy() - tone(rate)[middle]).max() < tolerance


def test_stereo_is_averaged_or_kept(tmp_path):
    left, right = tone(8000), tone(8000, 330.0)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 8000, subtype="FLOAT")
    mono, _ = read_audio(tmp_path / "a.wav")
    np.testing.assert_allclose(mono[0], (left + right) / 2, atol=1e-7)
    both, _ = read_audio(tmp_path / "a.wav", mono=False)
    np.testing.assert_allclose(both, np.stack([left, right]), atol=1e-7)


@pytest.mark.parametrize(("from_rate", "to_rate"), [(8000, 3000), (44_100, 16_000), (3000, 8000), (8000, 8000)])
def test_resampling_keeps_a_tone_and_rounds_the_length_up(from_rate, to_rate):
    resampled = resample(torch.from_numpy(tone(from_rate))[None], from_rate, to_rate)
    assert resampled.shape == (1, to_rate)
    inner = slice(to_rate // 4, to_rate // 2)
    assert np.abs(resampled[0, inner].numpy() - tone(to_rate)[inner]).max() < 1e-3
    odd = resample(torch.zeros(2, 1001), from_rate, to_rate)
    assert odd.shape == (2, -(-1001 * to_rate // from_rate))


def test_write_then_read_is_within_half_a_step(tmp_path):
    wave = torch.randn(1, 5000).clamp(-1, 1 - 1 / 32768)  # 16 bits reach from -1 to just below 1
    for name in ("a.wav", "b.flac"):
        assert write_audio(tmp_path / "new" / name, wave, 3000) == 0
        back, rate = read_audio(tmp_path / "new" / name)
        assert rate == 3000 and (back - wave).abs().max() < 0.501 / 32768
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.wav", "b.flac"]  # no temporary file stays


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_writing_counts_clipped_samples_and_rescales_nothing(tmp_path, name):
    wave = torch.tensor([[0.5, 1.5, -2.0, 0.25]])
    assert write_audio(tmp_path / name, wave, 8000) == 2
    back, _ = read_audio(tmp_path / name)
    torch.testing.assert_close(back, wave.clamp(-1, 1), rtol=0, atol=1e-4)


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "old.wav").write_bytes(b"precious")
    with pytest.raises(AudioError, match="not finite numbers; nothing was written"):
        write_audio(tmp_path / "old.wav", torch.tensor([[0.0, float("nan")]]), 8000)
    with pytest.raises(AudioError, match=r"\.xyz is not a format"):
        write_audio(tmp_path / "a.xyz", torch.zeros(1, 10), 8000)
    for wrong, rate, message in (
        (torch.zeros(10), 8000, r"of shape \(10,\); wanted floating-point numbers of shape \(channels, samples\)"),
        (torch.zeros(1, 0), 8000, r"of shape \(1, 0\)"),
        (torch.zeros(1, 10).short(), 8000, "the audio is torch.int16"),
        (torch.zeros(1, 10), 0, "the sample rate is 0; wanted at least 1 Hz"),
    ):
        with pytest.raises(AudioError, match=message):
            write_audio(tmp_path / "a.wav", wrong, rate)
    assert [p.name for p in tmp_path.iterdir()] == ["old.wav"]
    assert (tmp_path / "old.wav").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_bytes(b""), "is an empty file"),
        (lambda path: path.write_bytes(b"RIFF0000WAVEjunk"), "cannot be read as audio"),
        (lambda path: soundfile.write(path, np.zeros(0, np.float32), 8000), "holds no samples"),
        (lambda path: soundfile.write(path, np.zeros((10, 9)), 8000), "has 9 channels; recordings of up to 8"),
        (
            lambda path: soundfile.write(path, np.array([0, np.nan, np.inf], np.float32), 8000, subtype="FLOAT"),
            "samples that are not finite numbers, from 0.000 s on",
        ),
    ],
)
def test_unusable_files_are_refused_by_name(tmp_path, make, message):
    path = tmp_path / "bad.wav"
    make(path)
    with pytest.raises(AudioError, match=rf"bad\.wav.*{message}"):
        read_audio(path)


@pytest.mark.parametrize(
    ("hertz", "told"), [(1, "1 Hz"), (99, "99 Hz"), (768_001, "768,001 Hz"), (2**31 - 1, "2,147,483,647 Hz")]
)
def test_a_rate_that_no_recording_has_is_refused_before_it_is_resampled(tmp_path, hertz, told):
    soundfile.write(tmp_path / "a.wav", tone(8000), hertz)
    with pytest.raises(AudioError, match=f"says that its sample rate is {told}; recordings of 100 to 768,000 Hz") as caught:
        read_audio(tmp_path / "a.wav", 48_000)
    assert caught.value.reason == "sample rate"


@pytest.mark.parametrize("told", [0, 2**36 - 1], ids=["unknown", "enormous"])
def test_the_length_in_a_flac_header_is_not_believed(tmp_path, told):
    """0 is what an encoder says that writes into a pipe; memory for 2**36 samples would be 256 GiB."""
    soundfile.write(tmp_path / "a.flac", tone(8000), 8000)
    wanted = read_audio(tmp_path / "a.flac")[0]
    content = bytearray((tmp_path / "a.flac").read_bytes())
    fields = int.from_bytes(content[18:26]) >> 36 << 36 | told
    content[18:26] = fields.to_bytes(8)
    content[26:42] = bytes(16)  # no checksum
    (tmp_path / "a.flac").write_bytes(content)
    tracemalloc.start()
    try:
        assert torch.equal(read_audio(tmp_path / "a.flac")[0], wanted)
        assert tracemalloc.get_traced_memory()[1] < 2**20  # 1 MiB for 31 KiB of samples
    finally:
        tracemalloc.stop()


def test_a_file_that_changes_while_it_is_read_is_refused_at_its_end(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(8000), 8000)
    blocks = read_blocks(tmp_path / "a.wav", block_seconds=0.25)
    next(blocks)
    with open(tmp_path / "a.wav", "ab") as file:
        file.write(b"x")
    with pytest.raises(AudioError, match=r"a\.wav changed while it was read") as caught:
        list(blocks)
    assert caught.value.reason == "changed"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a name is text")
def test_a_name_that_is_no_text_is_read(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.wav")
    soundfile.write(os.fsencode(path), tone(8000), 8000)
    assert read_audio(path)[0].shape == (1, 8000) and sample_rate_of(path) == 8000


@pytest.mark.parametrize(("content", "reason"), [(None, "missing"), (b"", "empty file"), (b"junk", "unreadable")])
def test_an_error_has_a_reason_in_a_word_or_two(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(AudioError) as caught:
        read_audio(tmp_path / "a.wav")
    assert caught.value.reason == reason and pickle.loads(pickle.dumps(caught.value)).reason == reason


def test_what_is_no_audio_in_a_folder_is_named(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.wav", "sub/b.WAV", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "c.wav").symlink_to(tmp_path / "nowhere.wav")
    files, others = list_folder(tmp_path)
    assert files == [tmp_path / "a.wav", tmp_path / "sub" / "b.WAV"]
    assert {path.name: error.reason for path, error in others.items()} == {
        "c.wav": "broken link", "loop": "link to a folder", "notes.txt": "not audio"
    }  # fmt: skip
    for file in files:
        file.unlink()
    with pytest.raises(
        AudioError, match=r"holds no audio file .* What else is there cannot be used; the first: .*c\.wav is a"
    ):
        find_audio(tmp_path)


@pytest.mark.parametrize(
    ("samples", "runs"),
    [
        ([], 0), ([1, 1], 0), ([1, 1, 1], 1), ([1, -1, 1, 1], 1), ([0, 1, 1, 0, 1, 1], 0), ([1, 1, 1, 0, -1, -1, -1, -1], 2),
        ([0.998] * 9, 0), ([1.5] * 9, 1),
    ],
)  # fmt: skip
def test_runs_of_clipped_samples_are_counted_once(samples, runs):
    audio = torch.tensor([samples, [0.0] * len(samples)])
    assert clipped_runs(audio) == runs and clipped_runs(torch.cat([audio, audio])) == 2 * runs


def test_finds_files_in_subfolders_in_a_stable_order(tmp_path):
    for name in ("b.wav", "sub/a.FLAC", "sub/deep/c.mp3", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in find_audio(tmp_path)] == ["b.wav", "sub/a.FLAC", "sub/deep/c.mp3"]
    assert find_audio(tmp_path / "b.wav") == [tmp_path / "b.wav"]


def test_a_missing_or_silent_folder_is_refused(tmp_path):
    with pytest.raises(AudioError, match="does not exist"):
        find_audio(tmp_path / "nowhere")
    with pytest.raises(AudioError, match="holds no audio file"):
        find_audio(tmp_path)


def test_normalization_is_a_choice():
    wave = torch.tensor([[0.1, -0.2]])
    assert normalize(wave, "none") is wave
    torch.testing.assert_close(normalize(wave, "peak"), torch.tensor([[0.5, -1.0]]))
    assert torch.equal(normalize(torch.zeros(1, 3), "peak"), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="normalize is 'loud'; choose one of none, peak"):
        normalize(wave, "loud")


def test_without_torchaudio_only_mel_filters_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)  # an import then fails as if it were not there
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    with pytest.raises(RuntimeError, match="mel filters need torchaudio, which cannot be imported here"):
        audio.mel_filterbank(16_000, 512, 80)


@pytest.mark.parametrize("target", [None, 8000, 16_000, 44_100, 11_025])
@pytest.mark.parametrize("seconds", [0.01, 0.1, 1.0])
def test_blocks_are_the_file_whatever_their_length(tmp_path, target, seconds):
    """The same samples as at once; a resampler that works in blocks rounds differently in the last bits."""
    sound = np.stack([tone(22_050, 300, 1.37), tone(22_050, 470, 1.37)], 1)
    soundfile.write(tmp_path / "a.flac", sound, 22_050)
    for mono in (True, False):
        whole, _ = read_audio(tmp_path / "a.flac", target, mono)
        blocks = list(read_blocks(tmp_path / "a.flac", target, mono, seconds))
        assert len(blocks) > 1 and blocks[0].dtype == torch.float32
        torch.testing.assert_close(torch.cat(blocks, -1), whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("extension", ["mp3", "ogg", "flac"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_compressed_files_in_blocks_are_the_file(tmp_path, extension, rate):
    """MP3 frames borrow bits from those before them: a decoder that starts anew at each block gives bursts of noise."""
    sound = 0.2 * np.random.default_rng(0).standard_normal(4 * rate)
    soundfile.write(tmp_path / f"a.{extension}", sound, rate)
    whole, _ = read_audio(tmp_path / f"a.{extension}")
    blocks = torch.cat(list(read_blocks(tmp_path / f"a.{extension}", block_seconds=0.3)), -1)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-6)


def test_blocks_of_one_sample_and_of_a_file_shorter_than_the_resampler(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(8000)[:3], 8000, subtype="FLOAT")
    assert [block.shape for block in read_blocks(tmp_path / "a.wav", block_seconds=1e-9)] == [(1, 1)] * 3
    resampled = torch.cat(list(read_blocks(tmp_path / "a.wav", 16_000)), -1)
    torch.testing.assert_close(resampled, read_audio(tmp_path / "a.wav", 16_000)[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "holds no samples"),
        ([0.0] * 4000 + [-1e11], "samples beyond 1e.10 times full scale, from 0.500 s on"),
        ([0.0] * 9000 + [np.nan], "samples that are not finite numbers, from 1.125 s on"),
    ],
)
def test_blocks_refuse_what_whole_files_refuse(tmp_path, samples, message):
    soundfile.write(tmp_path / "bad.wav", np.array(samples, np.float32), 8000, subtype="FLOAT")
    with pytest.raises(AudioError, match=rf"bad\.wav.*{message}"):
        list(read_blocks(tmp_path / "bad.wav"))
    (tmp_path / "junk.wav").write_bytes(b"junk")
    with pytest.raises(AudioError, match="cannot be read as audio"):
        list(read_blocks(tmp_path / "junk.wav"))
    with pytest.raises(AudioError, match="is a folder; give an audio file"):
        list(read_blocks(tmp_path))


@pytest.mark.parametrize("channels", [1, 2])
def test_a_wav_file_in_blocks_is_the_one_that_libsndfile_writes(tmp_path, channels):
    wave = torch.randn(channels, 5000).clamp(-1.2, 1.2)
    clipped = write_blocks(tmp_path / "a.wav", wave.split(777, dim=-1), 16_000)
    assert clipped == (wave.abs() > 1).sum()
    pcm = np.clip(np.round(wave.numpy() * 32768), -32768, 32767).astype(np.int16)
    soundfile.write(tmp_path / "b.wav", pcm.T, 16_000, subtype="PCM_16")
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_blocks_that_fail_half_way_leave_the_old_file(tmp_path):
    def blocks():
        yield torch.zeros(1, 100)
        raise RuntimeError("half way")

    (tmp_path / "a.wav").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half way"):
        write_blocks(tmp_path / "a.wav", blocks(), 8000)
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"] and (tmp_path / "a.wav").read_bytes() == b"old"


def test_a_wav_file_is_refused_beyond_what_it_can_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "WAV_BYTES", 1000)
    with pytest.raises(AudioError, match="longer than the 4 GiB"):
        write_blocks(tmp_path / "a.wav", [torch.zeros(1, 400), torch.zeros(1, 400)], 8000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [1, 7, 16_000, 16_001])
def test_band_limiting_keeps_the_length_and_what_is_below_half_the_kept_rate(length):
    low, high = (torch.from_numpy(tone(16_000, hz, 2.0))[None, :length] for hz in (440, 3000))
    limited = band_limit(low + high, 16_000, 4000)
    assert limited.shape == (1, length)
    if length > 1000:
        assert (limited - low)[0, 1000:-1000].abs().max() < 1e-3


def test_raw_samples_are_read_and_written_as_struct_packs_them():
    values = (0.0, 0.5, -1.0, 0.25)
    wanted = torch.tensor([values])
    torch.testing.assert_close(from_pcm(struct.pack("<4h", 0, 16384, -32768, 8192), "s16"), wanted, rtol=0, atol=0)
    torch.testing.assert_close(from_pcm(struct.pack("<4f", *values), "f32"), wanted, rtol=0, atol=0)
    assert to_pcm(wanted, "f32") == struct.pack("<4f", *values)
    # 1 is one step beyond the largest number, which it becomes
    assert to_pcm(torch.tensor([[1.0, -1.0, 2.0, -2.0, 0.5]]), "s16") == struct.pack(
        "<5h", 32767, -32768, 32767, -32768, 16384
    )
    every = torch.arange(-32768, 32768).view(1, -1)
    assert from_pcm(to_pcm(every / 32768, "s16"), "s16").equal(every / 32768)
    for sample_format in PCM_FORMATS:
        with pytest.raises(AudioError, match="not finite"):
            to_pcm(torch.tensor([[0.0, np.nan]]), sample_format)


@pytest.mark.parametrize("num_levels", [4, 256])
@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_every_level_comes_back_and_every_sample_goes_to_the_nearest(how, num_levels):
    codes = torch.arange(num_levels)
    levels = dequantize(codes, num_levels, how)
    assert torch.equal(quantize(levels, num_levels, how), codes)
    assert levels[0] == -1 and levels[num_levels // 2] == 0 and (levels.diff() > 0).all()
    wave = torch.rand(1000) * 2 - 1
    if how == "mu_law":  # nearest on the scale of G.711, written out again
        mu = num_levels - 1
        wave_scale, levels_scale = (v.sign() * (1 + mu * v.abs()).log() / np.log(1 + mu) for v in (wave, levels))
    else:
        wave_scale, levels_scale = wave, levels
    nearest = (wave_scale[:, None] - levels_scale).abs().argmin(-1)
    assert torch.equal(quantize(wave, num_levels, how), nearest)


def test_eight_linear_bits_are_those_of_pcm():
    pcm = torch.arange(-128, 128)
    assert torch.equal(quantize(pcm / 128, 256, "linear"), pcm + 128)
    assert quantize(torch.tensor([1.0, 7.0, -7.0]), 256, "linear").tolist() == [255, 255, 0]


def test_a_quantization_that_does_not_exist_is_refused():
    for function, value in ((quantize, torch.zeros(3)), (dequantize, torch.zeros(3, dtype=torch.long))):
        with pytest.raises(ValueError, match="quantization is 'a_law'; choose one of linear, mu_law"):
            function(value, 256, "a_law")
        with pytest.raises(ValueError, match="num_levels is 255; wanted an even number of at least 4"):
            function(value, 255)


@pytest.mark.parametrize(
    ("length", "missing"),
    [(100, 0), (90, 0), (101, 1), (2**31 - 2**16 - 1, 2**31 - 2**16 - 101), (2**31 - 2**16, 0), (2**32 - 1, 0)],
)
def test_a_header_that_promises_more_is_told_from_one_that_leaves_it_open(tmp_path, length, missing):
    chunks = b"LIST" + (3).to_bytes(4, "little") + b"abc\0" + b"data" + length.to_bytes(4, "little") + bytes(100)
    (tmp_path / "a.wav").write_bytes(b"RIFF" + bytes(4) + b"WAVE" + chunks)
    assert missing_bytes(tmp_path / "a.wav") == missing
    for other in (b"", b"RIFF", b"RIFF\0\0\0\0WAVE", b"RIFX" + bytes(4) + b"WAVE" + chunks, b"RIFF\0\0\0\0WAVEdata"):
        (tmp_path / "b.wav").write_bytes(other)
        assert missing_bytes(tmp_path / "b.wav") == 0
