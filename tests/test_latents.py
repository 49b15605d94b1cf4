"""Latents, with a tiny random AutoencoderKL and AutoencoderDC of diffusers, saved as folders."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import refusal

import evaluate
import sample
import train
from checkpoint import STATE, load_expert
from conftest import CPU
from extras import latents
from extras.latents import VAE, downsampling, read_config
from inspection import fingerprint
from weights import read_safetensors


def save_vae(folder, seed=0, **options):
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )
    vae.save_pretrained(folder)
    return str(folder)


def save_deep_vae(folder):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    vae.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"), scaling_factor=1.5305, shift_factor=0.0609)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"no. {i}")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:50])
    return str(folder)


PIXELS = np.random.default_rng(1).integers(0, 255, (11, 16, 24, 3), np.uint8)


@pytest.mark.parametrize("kind", ["KL", "DC"])
def test_latents_are_what_the_library_says(kind, tmp_path, vae_folder):
    """scale and shift of the configuration, in batches, of any shape; decoded by its inverse."""
    folder = vae_folder if kind == "KL" else save_deep_vae(tmp_path)
    vae = VAE(folder, CPU)
    x = vae.encode(PIXELS)
    assert x.shape == (11, 4, 8, 12)
    with torch.no_grad():
        images = torch.from_numpy(PIXELS).movedim(-1, 1).float() / 127.5 - 1
        if kind == "KL":
            reference = diffusers.AutoencoderKL.from_pretrained(folder)
            z = reference.encode(images).latent_dist.mean
            expected = (z - 0.0609) * 1.5305
            decoded = reference.decode(expected / 1.5305 + 0.0609).sample
        else:
            reference = diffusers.AutoencoderDC.from_pretrained(folder)
            expected = reference.encode(images).latent * 0.41407
            decoded = reference.decode(expected / 0.41407).sample
    assert (x - expected).abs().max() < 1e-5
    assert (vae.decode(x) - decoded).abs().max() < 1e-4
    assert torch.equal(vae.decode(x[0]), vae.decode(x[:1])[0])


def test_the_kinds_of_the_hub():
    """Pixels a latent, by the configurations that these models have there."""
    blocks = {"block_out_channels": [128, 256, 512, 512]}  # SD, SDXL, SD3, FLUX
    deep = {"encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]}  # dc-ae-f32c32
    assert (downsampling(blocks), downsampling(deep)) == (8, 32)


def flags_of(tiny_run, folder, *more):
    return [*tiny_run, "--vae", folder, "--patch", "2", "--steps", "4", *more]


def test_a_run_draws_latents_and_the_vae_is_frozen(tiny_run, vae_folder, tmp_path):
    run = train.prepare(*train.settings(flags_of(tiny_run, vae_folder)))
    before = fingerprint(run.expert.vae.model)
    trained = {id(p) for group in run.optimizers for p in group.param_groups[0]["params"]}
    train.train(run, until=2)
    assert fingerprint(run.expert.vae.model) == before
    frozen = list(run.expert.vae.model.parameters())
    assert not any(p.requires_grad or p.grad is not None or id(p) in trained for p in frozen)
    assert run.expert.shape() == (4, 8, 8)
    assert not any("vae" in name for name, _ in run.expert.named_parameters())

    out = str(tmp_path / "run")
    train.main(["--resume", "--out", out])
    train.main(flags_of(tiny_run, vae_folder, "--out", str(tmp_path / "whole")))
    expected = read_safetensors(tmp_path / "whole" / STATE)[1]
    found = read_safetensors(f"{out}/{STATE}")[1]
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())

    drawing = f"--ckpt {out} --device cpu --dtype float32 --steps 2 --prompt a".split()
    windows = ["--maps", "--trajectory", "--out", str(tmp_path / "drawn")]
    sample.main([*drawing, *windows, "--size", "16x24"])
    assert Image.open(tmp_path / "drawn" / "000-a-seed0.png").size == (24, 16)
    score = ["--ckpt", out, "--suite", "parrot", "--limit", "2", "--steps", "2", "--device", "cpu"]
    evaluate.main(score)
    further = ["--patch", "2", "--from", out, "--steps", "1", "--out", str(tmp_path / "further")]
    train.main([*tiny_run, *further])
    assert load_expert(str(tmp_path / "further"), CPU).made_for["vae"]["name"] == vae_folder


def test_pictures_are_encoded_once(tiny_run, vae_folder, photos, tmp_path, monkeypatch, capsys):
    """The same as by the VAE, to float16's rounding; goes on where it was stopped; training does
    not have the VAE in memory, and draws with it all the same."""
    monkeypatch.setattr(latents, "SHARD", 5)
    out = tmp_path / "latents"
    flags = ["encode", "--data", photos, "--image-size", "16", "--vae", vae_folder]
    flags += ["--out", str(out), "--device", "cpu"]
    latents.main(flags)
    assert "11 pictures encoded, 1 skipped" in capsys.readouterr().out
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) == 3
    whole = [path.read_bytes() for path in shards]
    shards[1].write_bytes(whole[1][:-40])
    shards[2].unlink()
    untouched = shards[0].stat().st_mtime_ns
    latents.main(flags)
    assert [path.read_bytes() for path in shards] == whole
    assert shards[0].stat().st_mtime_ns == untouched
    with pytest.raises(ValueError, match="holds latents of other data, of another VAE"):
        latents.main([*flags, "--image-size", "24"])

    source = train.prepare(
        *train.settings([*tiny_run, "--data", str(out), "--steps", "3", "--image-size", "16"])
    ).source
    vae = VAE(vae_folder, CPU)
    for i in range(11):
        caption, x = source.example(i, 2)
        number = caption.removeprefix("no. ")
        pixels = np.asarray(Image.open(f"{photos}/{number}.png"))[None]
        assert x.shape == (2, 4, 8, 8) and x.dtype == np.float16
        assert np.abs(x - vae.encode(pixels).numpy()).max() < 2e-3

    loaded = []
    load = latents.load
    monkeypatch.setattr(latents, "load", lambda *given: loaded.append(1) or load(*given))
    plain = [flag for flag in tiny_run if flag not in ("--image-size", "--patch", "16", "4")]
    run = train.prepare(*train.settings([*plain, "--data", str(out), "--steps", "3"]))
    assert (run.args.image_size, run.args.patch, run.expert.shape()) == (16, 2, (4, 8, 8))
    batches = train.Batches(run.source, run.llm, 8, 4, 0)
    for _ in range(3):
        train.train_step(run, run.expert, *next(batches))
    batches.close()
    assert not loaded
    train.draw_samples(run)
    assert loaded and run.ema.vae._model is None


def test_more_pictures_than_there_are_are_refused(vae_folder, photos, tmp_path, capsys):
    """Before an index is written, at which the next try would stop."""
    out = tmp_path / "latents"
    flags = ["encode", "--data", photos, "--image-size", "16", "--vae", vae_folder]
    flags += ["--out", str(out), "--device", "cpu", "--count"]
    told = refusal(capsys, latents.main, *flags, 13)
    assert f"--count 13: expected at most 12, all of --data {photos}" in told
    assert not out.exists()
    latents.main([*flags, "12"])
    assert "11 pictures encoded, 1 skipped" in capsys.readouterr().out


def test_another_vae_is_refused(tiny_run, vae_folder, photos, tmp_path):
    other = save_vae(tmp_path / "other", seed=1, scaling_factor=1.5305, shift_factor=0.0609)
    out = str(tmp_path / "run")
    train.train(train.prepare(*train.settings(flags_of(tiny_run, vae_folder))), until=1)
    with pytest.raises(ValueError, match="its latents mean something else"):
        train.main(["--resume", "--out", out, "--vae", other])
    moved = tmp_path / "moved"
    latents.main(["encode", "--data", "shapes", "--count", "9", "--image-size", "16", "--vae",
                  vae_folder, "--out", str(moved), "--device", "cpu"])  # fmt: skip
    with pytest.raises(ValueError, match="its latents mean something else"):
        train.main([*tiny_run, "--data", str(moved), "--patch", "2", "--vae", other,
                    "--out", str(tmp_path / "third")])  # fmt: skip
    train.main(["--resume", "--out", out, "--steps", "5"])


def test_a_vae_that_has_moved(tiny_run, vae_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(vae_folder, "vae")
    train.main([*tiny_run, "--vae", "vae", "--steps", "1"])
    Path("vae").rename("moved")
    draw = ["--ckpt", "run", "--prompt", "x", "--steps", "1", "--device", "cpu"]
    score = ["--ckpt", "run", "--suite", "parrot", "--limit", "1", "--steps", "1"]
    for command, flags in ((sample.main, draw), (evaluate.main, score)):
        with pytest.raises(ValueError, match="if it has moved: --vae NEW_PLACE"):
            command(flags)
        command([*flags, "--vae", "moved"])
    save_vae("other")
    with pytest.raises(ValueError, match="the expert draws latents of vae .*, and other has"):
        sample.main([*draw, "--vae", "other"])


def test_a_vae_that_is_here_in_part_is_asked_for(monkeypatch):
    """As Ctrl-C leaves it between its configuration and its weights."""

    class OfTheHub:
        @staticmethod
        def from_pretrained(name, local_files_only, **options):
            if local_files_only:
                raise OSError("no diffusion_pytorch_model.safetensors")
            return torch.nn.Linear(1, 1), {"missing_keys": []}

    monkeypatch.setattr(latents, "ask_hub", lambda name: "the Hub cannot be reached")
    with pytest.raises(ValueError, match="--vae a/b: its weights do not load .no diffusion"):
        latents.load("a/b", OfTheHub, {"local_files_only": True})
    monkeypatch.setattr(latents, "ask_hub", lambda name: None)
    model = latents.load("a/b", OfTheHub, {"local_files_only": True})
    assert not any(p.requires_grad for p in model.parameters())


def test_what_is_no_vae_is_refused(tiny_run, llm_folder, vae_folder, tmp_path):
    pickled = tmp_path / "pickled"
    save_vae(pickled)
    weights = pickled / "diffusion_pytorch_model.safetensors"
    torch.save(diffusers.AutoencoderKL.from_pretrained(pickled).state_dict(), pickled / "x.bin")
    (pickled / "x.bin").rename(pickled / "diffusion_pytorch_model.bin")
    weights.unlink()
    config = json.loads((pickled / "config.json").read_text())
    tiled = tmp_path / "tiled"
    tiled.mkdir()
    (tiled / "config.json").write_text(json.dumps(config | {"_class_name": "VQModel"}))
    cases = {
        str(llm_folder("qwen2")): "it is another model; expected AutoencoderKL or AutoencoderDC",
        str(tiled): "it is VQModel",
        str(tmp_path): "no config.json, there or under vae/",
        str(pickled): "its weights do not load",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            train.main([*tiny_run, "--vae", name, "--out", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="--image-size 17: expected a multiple of the VAE's 2"):
        train.main([*tiny_run, "--vae", vae_folder, "--image-size", "17"])
    with pytest.raises(ValueError, match="has no end: expected --count"):
        latents.main(["encode", "--data", "shapes", "--vae", vae_folder, "--image-size", "16",
                      "--out", str(tmp_path / "x")])  # fmt: skip
    assert read_config(str(vae_folder))[0] is diffusers.AutoencoderKL
