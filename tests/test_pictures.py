"""A vision-language model as the LLM: tiny random ones with their own processors, saved as Hugging
Face folders."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer

import sample
import train
from conftest import CPU, SMALL, random_expert, save_tiny_llm
from extras.looking import Looking, open_picture
from extras.readers import with_reading
from extras.thinking import Thinking
from inspection import fingerprint
from llm import FrozenLLM, with_cache
from loading import load_llm

VISION = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=28,
    patch_size=14,
)
TEXT = SMALL | {"vocab_size": 320, "max_position_embeddings": 96}
RED, BLUE = (Image.new("RGB", (40, 30), color) for color in ("red", "blue"))


def save_tiny_vlm(kind: str, folder) -> None:
    """ "llava", "gemma3" or "qwen2_vl", with four tokens for each picture of 28 x 28."""
    gemma = {"image_token": "<soft>", "boi_token": "<picture>", "eoi_token": "</picture>"}
    tokens = {"llava": {"image_token": "<image>"}, "gemma3": gemma}[kind]
    text = save_tiny_llm({"llava": "llama"}.get(kind, kind), folder / "text")
    tokenizer = AutoTokenizer.from_pretrained(text, extra_special_tokens=tokens)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    if kind == "llava":
        vision = transformers.CLIPVisionConfig(**VISION)
        language = transformers.LlamaConfig(**TEXT)
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=language, image_token_index=ids["image_token"]
        )
        pictures = transformers.CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        )
        processor = transformers.LlavaProcessor(
            pictures,
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    else:
        layers = ["sliding_attention", "sliding_attention", "full_attention"]
        vision = transformers.SiglipVisionConfig(**VISION)
        language = transformers.Gemma3TextConfig(
            **TEXT, head_dim=16, sliding_window=32, layer_types=layers
        )
        indices = {name.replace("token", "token_index"): index for name, index in ids.items()}
        config = transformers.Gemma3Config(
            vision_config=vision, text_config=language, mm_tokens_per_image=4, **indices
        )
        pictures = transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28})
        processor = transformers.Gemma3Processor(pictures, tokenizer, image_seq_length=4)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="session", params=["llava", "gemma3"])
def vlm_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_vlm(request.param, folder)
    return folder


def image_token(processor) -> str:
    return getattr(processor, "boi_token", None) or processor.image_token


def test_a_picture_is_more_entries_in_the_cache(vlm_folder):
    """What the model itself keeps of picture and prompt, turned back by their length; another
    picture is another context."""
    llm = load_llm(str(vlm_folder), CPU, torch.float32)
    plain = llm.lookup(["a red circle"])["a red circle"]
    empty = llm.lookup([""])[""]
    llm.reader = Looking(llm, RED)
    seen = llm.lookup(["a red circle"])["a red circle"]
    processor = llm.reader.processor
    text = image_token(processor) + "a red circle"
    inputs = processor(text=[text], images=[RED], return_tensors="pt")
    cache = transformers.DynamicCache()
    with torch.no_grad():
        llm.model(**inputs, **with_cache(llm.model, cache))
    assert len(seen) == inputs["input_ids"].shape[1] >= len(plain) + 4
    whole = llm.pack(cache, torch.tensor([len(seen)]))[0]
    assert (whole - seen).abs().max() < 1e-5, f"{(whole - seen).abs().max():.2e}"
    assert torch.equal(llm.lookup([""])[""], empty), "guidance's empty prompt has no picture"
    llm.reader = Looking(llm, BLUE)
    assert (llm.lookup(["a red circle"])["a red circle"] - seen).abs().max() > 1e-3
    llm.reader = None
    assert torch.equal(llm.lookup(["a red circle"])["a red circle"], plain)


def test_a_picture_neither_drops_the_thinking_nor_is_dropped(vlm_folder, tmp_path):
    """A checkpoint that was trained on what the LLM writes brings its thinking along: a picture is
    refused, not ignored. And a command asks for one of the two, since --read is one flag."""
    llm = load_llm(str(vlm_folder), CPU, torch.float32)
    RED.save(tmp_path / "red.png")
    read = f"image:{tmp_path / 'red.png'}"
    llm.reader = Thinking(llm, "{} =>")
    message = "--read image does not go with a checkpoint that was trained with --read think"
    for look in (lambda: Looking(llm, RED, llm.reader), lambda: with_reading(llm, read)):
        with pytest.raises(ValueError, match=message):
            look()
    llm.reader = None
    assert isinstance(with_reading(llm, read), Looking)
    llm.reader = Looking(llm, RED)
    with pytest.raises(ValueError, match="--read image does not go with"):
        with_reading(llm, "think:4")


def test_a_chat_template_says_where_the_picture_stands(vlm_folder):
    llm = load_llm(str(vlm_folder), CPU, torch.float32)
    llm.reader = Looking(llm, RED)
    bare = llm.lookup(["a red circle"])["a red circle"]
    processor = llm.reader.processor
    token = image_token(processor)
    processor.chat_template = (
        "User: {% for part in messages[0].content %}"
        "{% if part.type == 'image' %}[" + token + "]{% else %}{{ part.text }}"
        "{% endif %}{% endfor %} End"
    )
    llm.reader = Looking(llm, RED, processor=processor)
    framed = llm.lookup(["a red circle"])["a red circle"]
    assert len(framed) == len(bare) + 2, "the brackets around the picture, and nothing else of it"


def test_drawing_after_a_picture(vlm_folder, tmp_path):
    """sample.py --read image:FILE, through the command, with an expert of this VLM."""
    llm = load_llm(str(vlm_folder), CPU, torch.float32)
    made_for = {"llm": str(vlm_folder), "llm_fingerprint": llm.fingerprint, "data": "shapes"}
    random_expert(llm, made_for=made_for).save_pretrained(tmp_path / "run")
    drawn = []
    for name, picture in (("red", RED), ("blue", BLUE)):
        file = tmp_path / f"{name}.png"
        picture.save(file)
        flags = ["--ckpt", str(tmp_path / "run"), "--device", "cpu", "--dtype", "float32"]
        flags += ["--prompt", "a star", "--read", f"image:{file}", "--steps", "2"]
        sample.main([*flags, "--out", str(tmp_path / name)])
        drawn.append(Image.open(tmp_path / name / "000-a-star-seed0.png"))
    difference = abs(np.asarray(drawn[0]).astype(int) - np.asarray(drawn[1]).astype(int))
    assert difference.max() > 0, "the picture before the prompt reaches the picture after it"


@pytest.mark.parametrize("bridge", ["mot", "mirror"])
def test_a_tower_beside_a_vlm_draws_and_describes(bridge, vlm_folder, tiny_run, tmp_path, capsys):
    """LLaVAFusion (LMFusion, section 5.3): its own eyes stay, and another tower learns to draw, and
    to show it pictures through its cache; the model's bytes are what they were."""
    before = load_llm(str(vlm_folder), CPU, torch.float32).fingerprint
    flags = ["--llm", str(vlm_folder), "--bridge", bridge, "--describe", "0.25", "--steps", "2"]
    unused = ["--llm", "--out"] if bridge == "mot" else ["--llm", "--out", "--width", "--depth"]
    rest = []
    for flag, value in zip(tiny_run[::2], tiny_run[1::2]):
        if flag not in unused:
            rest += [flag, value]
    run = train.prepare(*train.settings([*flags, *rest, "--out", str(tmp_path / "run")]))
    train.train(run)
    assert fingerprint(run.llm.model) == before == run.expert.made_for["llm_fingerprint"]

    picture = tmp_path / "red.png"
    RED.save(picture)
    asked = ["--ckpt", str(tmp_path / "run"), "--device", "cpu", "--describe", str(picture)]
    capsys.readouterr()
    sample.main(asked)
    assert f"{picture}: " in capsys.readouterr().out.splitlines()[-1]
    look = ["--prompt", "a star", "--read", f"image:{picture}", "--steps", "2", "--device", "cpu"]
    sample.main(["--ckpt", str(tmp_path / "run"), *look, "--out", str(tmp_path / "star.png")])
    assert Image.open(tmp_path / "star.png").size == (16, 16)


class PicturesOnly(transformers.Qwen2VLProcessor):
    """Qwen2-VL's own processor without its part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, name, argument):
        return argument


def test_a_picture_may_take_fewer_positions_than_tokens(tmp_path):
    """Qwen2-VL's M-RoPE: 16 tokens of a picture move the text by 4 places. What is drawn stands at
    the place after the text."""
    llm, processor = tiny_qwen2_vl(tmp_path)
    assert [2 * len(rotary.frequencies) for rotary in llm.rotary] == [8] * 3
    picture = Image.new("RGB", (112, 112), "red")
    llm.reader = Looking(llm, picture, processor=processor)
    row = llm.lookup(["a red circle"])["a red circle"]
    words = len(llm.tokenizer("a red circle").input_ids)
    decoder = llm.model.base_model
    assert len(row) == 16 + 2 + words and decoder.rope_deltas.item() == 4 - 16
    layer = llm.kept[0]
    keys = row[:, : layer.kv_heads * layer.key_width].unflatten(-1, (layer.kv_heads, -1))
    text = "<see><pad></see>a red circle"
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    cache = transformers.DynamicCache()
    with torch.no_grad():
        decoder(**inputs, **with_cache(decoder, cache))
    last_place = 1 + 4 + 1 + words - 1  # <see>, the picture, </see>, the words
    back = torch.tensor([-(last_place + 1)])
    expected = llm.rotary[0](cache.layers[0].keys[:, :, -1:], back)[0, :, 0]
    assert (keys[-1] - expected).abs().max() < 1e-5


def tiny_qwen2_vl(folder) -> tuple[FrozenLLM, PicturesOnly]:
    tokens = {"image_token": "<pad>", "video_token": "<video>", "start": "<see>", "end": "</see>"}
    text_llm = save_tiny_llm("qwen2", folder / "text")
    tokenizer = AutoTokenizer.from_pretrained(text_llm, extra_special_tokens=tokens)
    pad, video, start, end = (tokenizer.convert_tokens_to_ids(token) for token in tokens.values())
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 4,
        "hidden_size": 32,
        "mlp_ratio": 2,
        "patch_size": 14,
    }
    config = transformers.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=pad,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).float()
    pictures = transformers.Qwen2VLImageProcessor(min_pixels=112**2, max_pixels=112**2)
    processor = PicturesOnly(pictures, tokenizer)
    processor.chat_template = (
        "{% for part in messages[0].content %}"
        "{% if part.type == 'image' %}<see><pad></see>{% else %}{{ part.text }}"
        "{% endif %}{% endfor %}"
    )
    return FrozenLLM(model, tokenizer, "qwen2-vl"), processor


def test_bad_pictures_are_refused(tiny_llm, tmp_path):
    message = "--read image: .*LlamaForCausalLM. reads text only; expected a vision-language model"
    with pytest.raises(ValueError, match=message):
        Looking(tiny_llm("llama"), RED)
    (tmp_path / "no.png").write_bytes(b"not a picture")
    for path in ("no.png", "nowhere.png"):
        with pytest.raises(ValueError, match=f"--read image:.*{path} does not decode"):
            open_picture(str(tmp_path / path))
    with pytest.raises(ValueError, match="expected image:FILE"):
        with_reading(tiny_llm("llama"), "image")
