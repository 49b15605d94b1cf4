"""Latents: the expert draws in the space of a frozen autoencoder, which makes pictures of it.

    python train.py --data photos --image-size 256 --vae stabilityai/sdxl-vae
    python -m extras.latents encode --data photos --image-size 256 --vae ID --out latents
    python train.py --data latents                # encoded once: the VAE is not in memory

Rombach et al. 2022: an autoencoder leaves an eighth of each side (or less), and what a picture is
about. --vae takes what diffusers calls AutoencoderKL (of Stable Diffusion, SDXL, SD3, FLUX) or
AutoencoderDC, a Hub id or a folder, or a pipeline that has it under vae/. x, which the expert
learns, is (z - shift) scale, with the two numbers of its configuration, and z the mean of what the
encoder says.
"""

if __name__ == "__main__":
    import cli

    cli.start()

import argparse
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from batches import THREADS
from cli import (
    Locked,
    OneLineParser,
    make_folder,
    one_line_errors,
    pick_device,
    positive,
    seed_number,
    write_text,
    write_whole,
)
from data import open_source
from extras.captioned import Captioned
from flags import data_form, is_encoded
from inspection import fingerprint
from loading import ask_hub
from sample import to_tensor

CLASSES = ("AutoencoderKL", "AutoencoderDC")
AT_ONCE = 8  # pictures that go through it together
INDEX = "latents.json"  # in a folder of encoded pictures
SHARD = 256  # pictures a file of it
SAME = ("fingerprint", "downsampling", "channels", "scale", "shift")  # of one VAE and the same

# -------------------------------------------------------------------------------------------------
# the autoencoder


class VAE:
    """A frozen autoencoder of diffusers, in float32, read when it is needed.

    stored: the identity that is expected; ValueError, when it is read, if it is another.
    """

    def __init__(self, name: str, device: torch.device, stored: dict | None = None):
        self.name = name
        self.device = device
        self.stored = stored
        self.keeps = True  # in memory, between two uses
        self.kind, self.config, self.place = read_config(name)
        self.scale = self.config.get("scaling_factor") or 1.0
        self.shift = self.config.get("shift_factor") or 0.0
        self._model = None

    @property
    def model(self):
        if self._model is None:
            self._model = load(self.name, self.kind, self.place).to(self.device)
            if self.stored:
                check_same(self.stored, self.identity())
        return self._model

    def identity(self) -> dict:
        """What a checkpoint keeps of it."""
        return {
            "name": self.name,
            "fingerprint": fingerprint(self.model),
            "downsampling": downsampling(self.config),
            "channels": self.config["latent_channels"],
            "scale": self.scale,
            "shift": self.shift,
        }

    def release(self) -> None:
        self._model = None

    @torch.no_grad()
    def encode(self, pictures: np.ndarray) -> Tensor:
        """(B, height, width, 3) uint8 -> x (B, C, height / downsampling, width / downsampling).
        Latents that were encoded before, float16, as they are."""
        if pictures.dtype != np.uint8:
            return torch.from_numpy(pictures).to(self.device).float()
        parts = []
        for some in to_tensor(pictures, self.device).split(AT_ONCE):
            encoded = self.model.encode(some)
            z = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
            parts.append((z - self.shift) * self.scale)
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """x (..., C, h, w) -> pictures (..., 3, height, width), about in [-1, 1]."""
        z = x.to(self.device).float().reshape(-1, *x.shape[-3:]) / self.scale + self.shift
        parts = [self.model.decode(some).sample for some in z.split(AT_ONCE)]
        pictures = torch.cat(parts)
        if not self.keeps:
            self.release()
        return pictures.reshape(*x.shape[:-3], *pictures.shape[1:])


def read_config(name: str) -> tuple[type, dict, dict]:
    """A Hub id or a folder -> its class of diffusers, its configuration, and where it lies, as
    from_pretrained takes it. ValueError, in one line, if it is none of CLASSES."""
    import diffusers

    diffusers.logging.set_verbosity_error()
    why = "no config.json, there or under vae/"
    for online in (False, True):
        if online:
            if Path(name).exists():
                break
            why = ask_hub(name)
            if why:
                break
        for folder in (None, "vae"):
            place = {"subfolder": folder, "local_files_only": not online}
            try:
                config = diffusers.AutoencoderKL.load_config(name, **place)
            except (OSError, ValueError):
                continue
            kind = config.get("_class_name")
            if kind in CLASSES:
                return getattr(diffusers, kind), config, place
            why = f"it is {kind or 'another model'}"
    raise ValueError(f"--vae {name}: {why}; expected {' or '.join(CLASSES)} of diffusers")


def load(name: str, kind: type, place: dict) -> torch.nn.Module:
    """The model, frozen; nothing is unpickled. ValueError if its weights do not fit or are gone."""
    try:
        model, found = kind.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, torch_dtype=torch.float32, **place
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if place["local_files_only"] and not Path(name).exists() and not ask_hub(name):
            return load(name, kind, place | {"local_files_only": False})
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"--vae {name}: its weights do not load ({why})") from None
    if found["missing_keys"]:
        raise ValueError(f"--vae {name}: its weights lack {sorted(found['missing_keys'])[0]}")
    return model.eval().requires_grad_(False)


def downsampling(config: dict) -> int:
    """Pixels a side of one latent: every block but the last halves."""
    blocks = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return 2 ** (len(blocks) - 1)


def check_same(was: dict, now: dict) -> None:
    """ValueError if two identities are of two VAEs, wherever they lie."""
    for key in SAME:
        if was[key] != now[key]:
            raise ValueError(
                f"the expert draws latents of {was['name']} ({key} {was[key]}), and {now['name']} "
                f"has {now[key]}: its latents mean something else"
            )


# -------------------------------------------------------------------------------------------------
# what training asks


PATCH = 2  # latents a side of a token, where --patch does not say it (SD3, FLUX)


def vae_for(name: str | None, source, stored: dict | None, device: torch.device) -> VAE | None:
    """The VAE of --vae, or of a source that it has encoded; None without either. stored: the
    identity that a run began with. ValueError if these are not of one VAE."""
    encoded = getattr(source, "vae", None)
    if not name and not encoded:
        return None
    vae = VAE(name or encoded["name"], device, encoded or stored)
    if name:
        vae.identity()  # read, and refused if it is another
    if stored and encoded:
        check_same(stored, encoded)
    if encoded:  # then it is for samples alone
        vae.keeps = False
        vae.release()
    return vae


def made_for_vae(vae: VAE) -> dict:
    """What a checkpoint keeps: the identity, of encoded data without loading it."""
    return vae.stored or vae.identity()


def encoded_at(source: str) -> dict:
    """The side in pixels of what was encoded, as a default."""
    return {"image_size": read_index(Path(source))["image_size"]} if is_encoded(source) else {}


def sizes_of(name: str | None, source: str) -> dict:
    """Downsampling and channels of --vae, or of the one that has encoded a source."""
    if not name:
        return read_index(Path(source))["vae"]
    config = read_config(name)[1]
    return {"downsampling": downsampling(config), "channels": config["latent_channels"]}


def latent_side(name: str | None, source: str, image_size: int) -> int:
    """Of pictures of this side, in latents. ValueError if it does not divide."""
    factor = sizes_of(name, source)["downsampling"]
    if image_size % factor:
        raise ValueError(f"--image-size {image_size}: expected a multiple of the VAE's {factor}")
    return image_size // factor


# -------------------------------------------------------------------------------------------------
# encoded once


class Encoded(Captioned):
    """Captioned latents in a folder, as `encode` has written them: a source, whose examples are
    (draws, C, h, w) float16. ValueError if it is not whole."""

    def __init__(self, folder: str | Path, image_size: int, seed: int = 0):
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        if image_size != self.index["image_size"]:
            raise ValueError(
                f"--data {folder} was encoded with --image-size {self.index['image_size']}, not "
                f"{image_size}"
            )
        self.vae = self.index["vae"]
        self.use_buckets = None
        pairs = []
        self.kept_out = set()
        for number in range(self.index["shards"]):
            told = read_shard(self.folder, number)
            pairs += [((number, row), caption) for row, caption in enumerate(told["captions"])]
            self.kept_out |= {(number, row) for row in told["held_out"]}
        super().__init__(pairs, image_size, seed)

    def about(self) -> str:
        return f"latents of {super().about()}"

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.index, sort_keys=True).encode()).hexdigest()

    def _is_held_out(self, picture: tuple[int, int]) -> bool:
        return picture in self.kept_out

    def _picture(self, picture: tuple[int, int]) -> np.ndarray:
        number, row = picture
        with safe_open(shard_path(self.folder, number), "np") as file:
            return file.get_slice("latents")[row]


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:05d}.safetensors"


def read_shard(folder: Path, number: int) -> dict:
    """Its captions, and which rows are held out. ValueError if it is not there, or damaged."""
    try:
        with safe_open(shard_path(folder, number), "np") as file:
            told = json.loads(file.metadata()["told"])
            if file.get_slice("latents").get_shape()[0] == len(told["captions"]):
                return told
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError):
        pass
    raise ValueError(
        f"{shard_path(folder, number)} is not there, or damaged: encode again into {folder} (what "
        "is whole there stays)"
    )


def read_index(folder: Path) -> dict:
    """What was encoded. ValueError if the file does not say it."""
    try:
        index = json.loads((folder / INDEX).read_text("utf-8"))
        return {key: index[key] for key in ("data", "image_size", "vae", "count", "shards")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder / INDEX} is no index of latents ({why})") from None


def encode(args: argparse.Namespace) -> None:
    """Write the latents of --data into --out, a shard after the other; whole shards that are there
    are left as they are. ValueError if they are of other data, or of another VAE."""
    device, _ = pick_device(args.device)
    latent_side(args.vae, args.data, args.image_size)
    name, options = data_form(args.data)
    source = open_source(name, args.image_size, args.seed, **options)
    every = len(getattr(source, "every", ()))
    count = args.count or every
    if not count or getattr(source, "before_and_after", False):
        without = "is of pairs" if count else "has no end: expected --count, how many to encode"
        raise ValueError(f"--data {args.data} {without}")
    if 0 < every < count:
        raise ValueError(f"--count {count}: expected at most {every}, all of --data {args.data}")
    vae = VAE(args.vae, device)
    out = make_folder(args.out)
    with Locked(out):
        index = {
            "data": [args.data, args.seed, source.fingerprint()],
            "image_size": args.image_size,
            "vae": vae.identity(),
            "count": count,
            "shards": -(-count // SHARD),
        }
        if (out / INDEX).exists() and read_index(out) != index:
            raise ValueError(f"{out} holds latents of other data, of another VAE, size or count")
        write_text(out / INDEX, json.dumps(index, indent=1) + "\n")
        for number in tqdm(range(index["shards"]), unit="shard"):
            try:
                read_shard(out, number)
            except ValueError:
                numbers = range(number * SHARD, min(count, (number + 1) * SHARD))
                write_shard(shard_path(out, number), vae, source, numbers)
    skipped = len(getattr(source, "skipped", ()))
    print(f"{count - skipped} pictures encoded, {skipped} skipped; now: train.py --data {out}")


def write_shard(path: Path, vae: VAE, source, numbers: range) -> None:
    """The pictures of these numbers, without those that do not decode."""
    threads = 1 if getattr(source, "in_order", False) else THREADS
    with ThreadPoolExecutor(threads) as pool:
        rows = [row for row in pool.map(partial(picture_of, source), numbers) if row]
    captions = [caption for caption, _, _ in rows]
    held_out = [k for k, (_, _, is_out) in enumerate(rows) if is_out]
    if not rows:
        raise ValueError(f"none of the pictures {numbers.start} to {numbers.stop} decodes")
    x = vae.encode(np.stack([picture for _, picture, _ in rows])).cpu().half().contiguous()
    told = json.dumps({"captions": captions, "held_out": held_out})
    write_whole(path, lambda file: save_file({"latents": x}, file, metadata={"told": told}))


def picture_of(source, number: int) -> tuple[str, np.ndarray, bool] | None:
    """A caption, its picture, and whether it is held out; None if that does not decode. Of what has
    an end each picture once; else the examples of its seed."""
    if not isinstance(source, Captioned):
        caption, pictures = source.example(number, 1)
        return caption, pictures[0], False
    pair = source.every[number]
    try:
        return pair[1], source.picture(pair[0]), pair in source.set_aside
    except ValueError:
        source.skipped.add(pair[0])
        return None


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Encode captioned pictures once, into latents.")
    add = parser.add_argument
    add("what", choices=["encode"])
    add("--data", required=True, help="as train.py takes it")
    add("--image-size", type=positive(int), default=256, help="side in pixels")
    add("--vae", required=True, help="a Hub id or a folder: AutoencoderKL or AutoencoderDC")
    add("--out", required=True, help="a folder, which train.py --data takes then")
    add("--count", type=positive(int), help="of what is drawn or streamed, so many")
    add("--seed", type=seed_number, default=0, help="of what is drawn")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    encode(parser.parse_args(argv))


if __name__ == "__main__":
    from extras.latents import main  # under its own name, by which the sources know it

    one_line_errors(main)
