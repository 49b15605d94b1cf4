"""The image expert: the tower that learns to draw.

It goes over image tokens, one block for each layer of the LLM that it reads. Block l attends to its
own tokens and to the caption's keys and values of that layer, in one softmax (attention.py). What
comes out is a velocity (flow.py). That cache of the caption is the whole interface (llm.py).

Shapes: B images, N image tokens, D expert width, H query heads, G key/value heads of widths Dk and
Dv (the LLM layer's), C image channels.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attention import joint_attention, text_mask
from flow import to_velocity
from llm import Context, FrozenLLM, TextLayer, round_up, select_layers
from patches import PATCHERS


class ImageExpert(nn.Module, PyTorchModelHubMixin):
    """Noisy picture + time + Context -> velocity: predict(x_t, t, context) -> v.

    text_layers: the LLM's attention layers that the blocks read, one each (dicts of TextLayer).
    intermediate: inner width of the SwiGLU (default: 8/3 of `width`). patch: side of a token in
    pixels; patcher: how pixels become tokens and back, "unet" or "linear" (patches.py). prediction:
    what comes out of it, "clean" (the picture itself) or "velocity". made_for: what the weights
    belong to (the LLM's name and identity, the data). text_gains: see the function of that name.
    `config`: all of these, as JSON; it travels inside the checkpoint and builds the expert again.
    """

    qk_norm = True

    def __init__(
        self,
        text_layers: list[dict],
        width: int = 256,
        heads: int = 2,
        intermediate: int | None = None,
        patch: int = 16,
        image_size: int = 64,
        channels: int = 3,
        patcher: str = "unet",
        prediction: str = "clean",
        made_for: dict | None = None,
        text_gains: list[list[float] | None] | None = None,
        reads_pictures: bool = False,
    ):
        super().__init__()
        layers = [TextLayer(**layer) for layer in text_layers]
        check_sizes(layers, width, heads, patch, image_size)
        self.config = {
            "text_layers": text_layers,
            "width": width,
            "heads": heads,
            "intermediate": intermediate,
            "patch": patch,
            "image_size": image_size,
            "channels": channels,
            "patcher": patcher,
            "prediction": prediction,
            "made_for": made_for or {},
            "text_gains": text_gains,
            "reads_pictures": reads_pictures,
        }
        self.width = width
        self.patch = patch
        self.image_size = image_size
        self.channels = channels
        self.prediction = prediction
        self.made_for = self.config["made_for"]
        self.reads = [layer.index for layer in layers]

        fading = prediction == "clean"
        self.patcher = PATCHERS[patcher](width, patch, channels, fading)
        if reads_pictures:  # see extras/lmfusion.py
            self.begin_of_image = nn.Parameter(torch.randn(width))
        self.embed_time = nn.Sequential(
            nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        # adaLN: shift, scale and gate of all blocks, shift and scale of the head, in one product
        self.modulation = nn.Linear(width, (6 * len(layers) + 2) * width)
        intermediate = intermediate or round_up(round(8 * width / 3), 64)
        gains = text_gains or [None] * len(layers)
        self.blocks = nn.ModuleList()
        for layer, gain in zip(layers, gains):
            block = ExpertBlock(width, heads, intermediate, layer, self.qk_norm, gain)
            self.blocks.append(block)
        # adaLN-Zero: blocks start as the identity
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    @classmethod
    def beside(cls, llm: FrozenLLM, width: int, depth: int, heads: int | None, layers: str, **more):
        """A fresh expert for this LLM: `depth` blocks, spread over these of its `layers`."""
        text_layers = select_layers(llm, depth, layers)
        heads = heads or default_heads(text_layers[0], width)
        gains = text_gains(llm, text_layers)
        return cls(text_layers, width, heads, text_gains=gains, **more)

    def attach(self, llm: FrozenLLM) -> None:
        """Have this LLM hand over what the expert looks at."""
        llm.keep(self.reads)

    def llm_parameters(self) -> list[nn.Parameter]:
        """The LLM's weights that are trained with it: none, it is frozen."""
        return []

    def forward(self, x_t: Tensor, t: Tensor, context: Context) -> Tensor:
        """x_t (B, C, height, width), t (B,) in [0, 1] -> velocity like x_t, in float32."""
        img, modulations, way_out = self.tokens_of(x_t, t)  # (B, N, D)
        T = context.keys[0].shape[2]
        mask = text_mask(context.lengths, T, img.shape[1]) if context.padded else None
        for block, m, txt_k, txt_v in zip(self.blocks, modulations, context.keys, context.values):
            img_q, img_k, img_v = block.project(img, m)  # (B, H or G, N, Dk or Dv)
            txt_k = block.scale_keys(txt_k)  # (B, G, T, Dk)
            attended = joint_attention(img_q, img_k, img_v, txt_k, txt_v, mask)  # (B, H, N, Dv)
            img = block.finish(img, attended, m)  # (B, N, D)
        return self.velocity_of(img, way_out, x_t, t)  # (B, C, height, width)

    def tokens_of(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor], tuple]:
        """Image tokens (B, N, D), the modulation of each block (B, 6, 1, D), and what velocity_of
        needs: the modulation of the way out, the patcher's skips, the time."""
        # 1000: DiT's timesteps; t in [0, 1] alone would hardly move the slow waves
        time = self.embed_time(timestep_embedding(1000 * t, 256))  # (B, D)
        modulation = self.modulation(time).view(len(t), -1, 1, self.width)  # (B, 6 L + 2, 1, D)
        *per_block, last = modulation.split([6] * len(self.blocks) + [2], dim=1)
        img, skips = self.patcher.encode(x_t, t, time)  # (B, N, D)
        rows = x_t.shape[2] // self.patch
        columns = x_t.shape[3] // self.patch
        img = img + sincos_2d(rows, columns, self.width, x_t.device).to(img.dtype)
        return img, per_block, (last, skips, time)

    def velocity_of(self, img: Tensor, way_out: tuple, x_t: Tensor, t: Tensor) -> Tensor:
        """The last image tokens (B, N, D) -> velocity (B, C, height, width), in float32."""
        modulation, skips, time = way_out
        shift, scale = modulation.unbind(1)
        img = modulate(rms_norm(img), shift, scale)
        out = self.patcher.decode(img, skips, time, x_t.shape[2:])  # like x_t
        return self.as_velocity(out, x_t, t)

    def as_velocity(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """What the patcher gives in float32: of clean pictures the velocities; velocities, or the
        noise of extras/ddpm.py, as they are."""
        out = out.float()
        return to_velocity(out, x_t, t) if self.prediction == "clean" else out

    # PyTorchModelHubMixin gives save_pretrained, from_pretrained, push_to_hub, and calls these two

    def _save_pretrained(self, save_directory: Path) -> None:
        """One safetensors file with the config inside (config.json is a copy, for the Hub)."""
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        metadata = {"tower": type(self).__name__, "config": json.dumps(self.config)}
        save_file(weights, Path(save_directory) / "model.safetensors", metadata=metadata)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options) -> "ImageExpert":
        """A folder or a Hub id -> the expert. ValueError if it holds something else."""
        path = Path(model_id) / "model.safetensors"
        if not Path(model_id).is_dir():
            names = ("revision", "cache_dir", "token", "force_download", "local_files_only")
            known = {name: options[name] for name in names if name in options}
            path = hf_hub_download(model_id, "model.safetensors", **known)
        return read_expert(path, cls)


class ExpertBlock(nn.Module):
    """One transformer layer. Its keys and values have the widths of the LLM layer it reads.

    Pre-norm with adaLN-Zero (Peebles & Xie 2023, section 3.2): shift, scale and gate come from the
    time, gates start at 0. qk_norm: queries and keys are normed. gains: see text_gains.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        intermediate: int,
        layer: TextLayer,
        qk_norm: bool = True,
        gains: list[float] | None = None,
    ):
        super().__init__()
        self.heads = heads
        self.layer = layer
        self.qk_norm = qk_norm
        G = layer.kv_heads
        self.split = [heads * layer.key_width, G * layer.key_width, G * layer.value_width]
        self.qkv = nn.Linear(width, sum(self.split), bias=False)
        if qk_norm:
            self.q_norm = nn.Parameter(torch.ones(layer.key_width))
            self.k_norm = nn.Parameter(torch.ones(layer.key_width))
        self.txt_gain = None
        if gains:
            self.txt_gain = nn.Parameter(torch.ones(G))
            self.register_buffer("start_gain", torch.tensor(gains), persistent=False)
        self.out = nn.Linear(heads * layer.value_width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, width, bias=False)

    def project(self, img: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """img (B, N, D), modulation (B, 6, 1, D) -> queries, keys and values of the image."""
        shift1, scale1, _, _, _, _ = modulation.unbind(1)
        x = modulate(rms_norm(img), shift1, scale1)
        img_q, img_k, img_v = self.qkv(x).split(self.split, dim=-1)
        G = self.layer.kv_heads
        img_q = img_q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N, Dk)
        img_k = img_k.unflatten(-1, (G, -1)).transpose(1, 2)  # (B, G, N, Dk)
        img_v = img_v.unflatten(-1, (G, -1)).transpose(1, 2)  # (B, G, N, Dv)
        if self.qk_norm:
            img_q = rms_norm(img_q, self.q_norm)
            img_k = rms_norm(img_k, self.k_norm)
        return img_q, img_k, img_v

    def scale_keys(self, txt_k: Tensor) -> Tensor:
        """The text's keys (B, G, T, Dk) as they are, unless they are huge (see text_gains)."""
        if self.txt_gain is None:
            return txt_k
        gain = (self.start_gain * self.txt_gain).to(txt_k.dtype)
        return txt_k * gain[:, None, None]

    def finish(self, img: Tensor, attended: Tensor, modulation: Tensor) -> Tensor:
        """img (B, N, D) and what its queries attended to (B, H, N, Dv) -> img of the next layer."""
        _, _, gate1, shift2, scale2, gate2 = modulation.unbind(1)
        attended = attended.transpose(1, 2).flatten(2)  # (B, N, H Dv)
        img = torch.addcmul(img, gate1, self.out(attended))  # img + gate1 * ..., in one pass
        x = modulate(rms_norm(img), shift2, scale2)
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return torch.addcmul(img, gate2, self.down(F.silu(gate) * up))  # SwiGLU


# -------------------------------------------------------------------------------------------------
# small functions


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x (B, N, D) scaled and shifted by what the time says, (B, 1, D) each."""
    return torch.addcmul(shift, x, 1 + scale)  # shift + x * (1 + scale)


class RMSNorm(torch.autograd.Function):
    """x / rms(x) over the last dimension (Zhang & Sennrich 2019, eq. 4), with its gradient in
    closed form.

    On a CPU, autograd through the library's rms_norm takes more than twice as long, a tenth of a
    training step.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        scale = (1 / rms.clamp_min(1e-6)).to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y) / y.shape[-1]
        return (grad - y * along[..., None]) * scale


def rms_norm(x: Tensor, gain: Tensor | None = None) -> Tensor:
    """x with a root mean square of 1 over the last dimension, times a learned gain."""
    y = RMSNorm.apply(x)
    return y if gain is None else y * gain.to(x.dtype)


def timestep_embedding(t: Tensor, width: int, max_period: float = 10_000) -> Tensor:
    """(...) -> (..., width): cosines and sines at wavelengths from 2 pi to 2 pi max_period."""
    half = width // 2
    exponent = -torch.arange(half, device=t.device, dtype=torch.float32) / half
    angle = t[..., None].float() * max_period**exponent
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def sincos_2d(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """(rows columns, width): where each patch is, half of the width for its row, half for its
    column. Computed for any resolution; no size is stored."""
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    half = width // 2
    return torch.cat([timestep_embedding(row, half), timestep_embedding(column, half)], dim=-1)


def default_heads(layer: dict, width: int) -> int:
    """As many query heads as make about twice the width: a multiple of the layer's own heads."""
    group = layer["kv_heads"]
    return group * max(1, round(2 * width / (layer["key_width"] * group)))


LARGE_KEYS = 10.0  # root mean square; heads of gemma-3-270m have 2 to 8, of SmolLM2-135M 1 to 3


def text_gains(llm: FrozenLLM, layers: list[dict]) -> list[list[float] | None] | None:
    """The first gain of each key head of these layers, or None if none needs one.

    The expert's own keys are normed (QK-norm). Text keys with biases in the hundreds and no norm
    (Qwen2) would win or lose every score by them: the softmax saturates. Such heads start at a root
    mean square of 1; a factor on that is learned.
    """
    gains = []
    for layer in layers:
        sizes = llm.key_sizes[layer["index"]]  # one a head
        gains.append([1 / size if size > LARGE_KEYS else 1.0 for size in sizes])
    untouched = [[1.0] * layer["kv_heads"] for layer in layers]
    return None if gains == untouched else gains


def check_sizes(layers: list[TextLayer], width: int, heads: int, patch: int, side: int) -> None:
    """ValueError for sizes that no expert can have."""
    if side % patch:
        raise ValueError(f"--image-size {side} does not divide by --patch {patch}")
    if width % 4:
        raise ValueError(
            f"--width {width} does not divide by 4, as the 2-D sine-cosine table needs"
        )
    for layer in layers:
        if heads % layer.kv_heads:
            raise ValueError(
                f"--heads {heads}: expected a multiple of the LLM's {layer.kv_heads} "
                "key/value heads"
            )


# -------------------------------------------------------------------------------------------------
# loading


def read_expert(path: str | Path, cls: type = ImageExpert) -> ImageExpert:
    """A checkpoint's file -> the expert in it. ValueError if it is something else."""
    metadata, weights = read_safetensors(path)
    try:
        expert = cls(**read_config(metadata))
        expert.load_state_dict({name_of(name): weight for name, weight in weights.items()})
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{path} is not an image expert of this project ({why})") from None
    return expert.eval()


def read_config(metadata: dict[str, str]) -> dict:
    """The arguments that build an expert again, out of its checkpoint."""
    config = json.loads(metadata["config"])
    if "hidden" in config:  # the name it had in older checkpoints
        config["intermediate"] = config.pop("hidden")
    config.setdefault("patcher", "linear")  # the only one they knew
    config.pop("checkpointing", None)  # is a run's now
    return config


def name_of(weight: str) -> str:
    """A weight's name, also of an older checkpoint, as it is now."""
    return f"patcher.{weight}" if weight.startswith(("embed.", "head.")) else weight


def read_safetensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file; nothing is unpickled. ValueError if it is missing, truncated
    or something else."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return file.metadata() or {}, tensors
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} does not read as safetensors "
            f"(missing, truncated, a git-lfs pointer, or another kind of file): {error}"
        ) from None
