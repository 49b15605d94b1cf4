"""A reader that puts a picture before the prompt, for vision-language models.

    python sample.py --prompt "a star in its colour" --read image:FILE

The other readers, and what a reader is: readers.py.
"""

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from extras.files import read_picture
from extras.thinking import Thinking, check_heard, read_inside
from llm import FrozenLLM, Reading


class Looking:
    """A picture before every caption, as the model's own processor puts it there: its tokens are
    more entries of the cache (UniFusion, LLaVAFusion). The empty prompt has none.

    inside: the template around picture and caption, and the reader of the empty prompt.
    ValueError if the model sees no pictures.
    """

    flag = "--read image"

    def __init__(self, llm: FrozenLLM, picture: Image.Image, inside=None, processor=None):
        self.llm = llm
        self.picture = picture
        self.inside = inside
        if not hasattr(llm.model.config, "vision_config"):
            raise ValueError(
                f"--read image: {llm.name} ({type(llm.model).__name__}) reads text only; expected "
                "a vision-language model"
            )
        if isinstance(inside, Thinking):
            raise ValueError(
                "--read image does not go with a checkpoint that was trained with --read think or "
                "--read rewrite: leave it out"
            )
        check_heard(self, getattr(llm, "tokens", False))
        self.processor = processor or load_processor(llm)

    def read(self, caption: str) -> Reading | Tensor:
        if not caption:
            return read_inside(self, caption)
        return self.look(caption)

    @torch.no_grad()
    def look(self, caption: str) -> Tensor:
        """The row of the picture and a caption: (T, W)."""
        llm = self.llm
        # the picture's place in the text, and the pixels for it
        template = "{}"
        if self.inside:
            template = self.inside.template
        text = template.replace("{}", self.placeholder() + caption)
        inputs = self.processor(text=[text], images=[self.picture], return_tensors="pt")
        inputs = inputs.to(llm.device, llm.dtype)
        ids = inputs.pop("input_ids")
        length = ids.shape[1]
        if length > llm.max_tokens:
            raise ValueError(
                f"--read image: picture and prompt are {length} tokens; {llm.name} takes "
                f"{llm.max_tokens}"
            )
        cache = llm.run(ids, **inputs)  # the processor's pixels go with the tokens

        # a picture may take fewer positions than tokens (Qwen2-VL's M-RoPE)
        place = torch.tensor([length], device=llm.device)
        saved = getattr(llm.model.base_model, "rope_deltas", None)
        if saved is not None:
            place = place + saved.reshape(-1)
        start = 0
        if self.inside:
            start = self.inside.start(length)
        return llm.pack(cache, place)[0, start:]

    def placeholder(self) -> str:
        """What stands in the text for the picture. A chat template knows what goes around it: it
        is what the template says with a picture and does not say without."""
        if not getattr(self.processor, "chat_template", None):
            return getattr(self.processor, "boi_token", None) or self.processor.image_token
        mark = "[prompt]"
        words = {"type": "text", "text": mark}
        without = self.user_says([words]).partition(mark)[0]
        with_picture = self.user_says([{"type": "image"}, words]).partition(mark)[0]
        return with_picture[len(without) :]

    def user_says(self, content: list[dict]) -> str:
        said = {"role": "user", "content": content}
        return self.processor.apply_chat_template([said], tokenize=False)


def load_processor(llm: FrozenLLM):
    """The model's own way of putting pictures into its text."""
    place = llm.model.config._name_or_path
    try:
        return AutoProcessor.from_pretrained(place, revision=llm.revision)
    except (ImportError, ValueError, OSError, TypeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--read image: the processor of {llm.name} does not load: {why}"
        ) from None


def open_picture(path: str) -> Image.Image:
    """A picture, whole, as viewers show it. ValueError if it does not decode."""
    try:
        return read_picture(path)
    except ValueError as error:
        expected = "expected a whole PNG, JPEG, or other picture"
        raise ValueError(f"--read image:{error}; {expected}") from None
