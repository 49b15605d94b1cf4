"""Readers: what the LLM reads in place of the bare caption, and what it writes after it.

    python train.py --template '"{}" in English:' --read after
    python sample.py --prompt "a red ring" --read think:40            # Mural's reasoning
    python sample.py --prompt "a red ring" --read rewrite:reencode    # UniFusion's VERIFI
    python sample.py --prompt "in blue" --read image:FILE             # a picture first: looking.py

A reader is a small object with one method, read(caption) -> Reading (tokens that FrozenLLM then
runs), or -> the finished row (T, W) of the caption. It is set by one assignment: llm.reader = ...
Readers nest: `inside` is the reader for what one of them leaves as it is.
"""

import copy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from cli import colon_form, positive
from extras.files import read_text
from llm import CacheUpTo, FrozenLLM, Reading, with_cache

FRAMES = Path(__file__).parent.parent / "assets" / "frames"  # what it is asked: to be read, edited
TOKENS = 48  # that the LLM writes at most, if no number is given
AROUND = ("after", "chat")  # options of --read that say how the template is put
WRITING = ("", "tokens=", "frame=")
READ = {  # what --read says in train.py, and the options of each
    "after": (),
    "chat": ("after",),
    "think": (*WRITING, *AROUND),
    "rewrite": (*WRITING, *AROUND, "reencode"),
}
READ_TO_DRAW = {  # and where pictures are drawn
    "think": WRITING,
    "rewrite": (*WRITING, "reencode"),
    "image": ("",),
}


class Template:
    """The caption put into a text, where {} stands; and which tokens the image may then look at:
    "all", or only those "after" the caption.

    A causal LLM has read the whole caption only at its end, and there it says what comes next.
    After "In English:" that is the caption in English: what words of another language mean is then
    in the keys and values, before any is generated. ValueError if the template has not one {}, or
    nothing after it.
    """

    inside = None

    def __init__(self, llm: FrozenLLM, template: str = "{}", expose: str = "all"):
        if template.count("{}") != 1:
            raise ValueError(
                f"--template {template!r}: expected a text with one {{}}, where the caption stands"
            )
        before, end = template.split("{}")
        self.llm = llm
        self.template = template
        self.expose = expose
        self.before = before
        self.after: list[int] = []
        if end:
            self.after = llm.tokenizer(end, add_special_tokens=False).input_ids
        if expose == "after" and not self.after:
            raise ValueError(
                f"--read after: the template {template!r} has no text after the caption"
            )
        check_room(llm, self, llm.room)

    def read(self, caption: str) -> Reading:
        # a text that goes on after the caption must not be ended by the tokenizer there
        text = self.before + caption
        if self.after:
            ids = self.llm.open_ids(text)
        else:
            ids = self.llm.tokenizer(text).input_ids
        ids = self.llm.cut(ids, after=len(self.after)) + self.after
        return Reading(ids, self.start(len(ids)))

    def start(self, length: int) -> int:
        """The first of `length` tokens that the image may look at."""
        if self.expose == "after":
            return length - len(self.after)
        return 0


class Thinking:
    """The LLM reads the caption in a frame, where {} stands, and writes on, greedily, up to so many
    tokens or the end of the line.

    What the image then looks at: "all", the caption and what follows it (Mural's reasoning at
    inference); only what was "written", in its context (UniFusion's VERIFI); both out of the
    cache, with no second pass. Or "reencode": what was written, read as a caption of its own.
    The empty prompt of guidance stays as it was.

    written: caption -> what the LLM wrote; shown: its row's tokens. inside: the reader of the empty
    prompt and of what is read again. ValueError for no {} or two, or an LLM that cannot write.
    """

    def __init__(
        self, llm: FrozenLLM, frame: str, tokens: int = TOKENS, show: str = "all", inside=None
    ):
        self.llm = llm
        self.frame = frame
        self.tokens = tokens
        self.show = show
        self.inside = inside
        self.flag = "--read rewrite"
        if show == "all":
            self.flag = "--read think"
        self.written: dict[str, str] = {}
        self.shown: dict[str, list[int]] = {}
        check_heard(self, getattr(llm, "tokens", False))
        if hasattr(inside, "picture"):
            raise ValueError("--read image does not go with --read think or --read rewrite")
        self.check_writes()
        if frame.count("{}") != 1:
            raise ValueError(
                f"the frame {frame[-60:]!r}: expected a text with one {{}}, where the prompt stands"
            )
        # the frame's beginning is the same for every caption, so it goes through the LLM once
        self.beginning = llm.open_ids(frame.split("{}")[0])
        if len(self.beginning) >= llm.max_tokens:
            raise ValueError(
                f"a frame of {len(self.beginning)} tokens leaves {llm.name} no room to think"
            )
        self.begun, self.begun_states = self.begin()

    def check_writes(self) -> None:
        llm = self.llm
        if not llm.layers:
            raise ValueError(
                f"{llm.name} ({type(llm.model).__name__}) is an encoder and writes nothing; "
                "leave out --read think and --read rewrite"
            )
        if not llm.writes:
            raise ValueError(
                f"{llm.name} was saved without its language-model head and cannot write: leave "
                "out --read think and --read rewrite"
            )

    @torch.no_grad()
    def begin(self) -> tuple[DynamicCache, tuple[Tensor, ...]]:
        """The cache of the frame's beginning, and its hidden states (1, T, d) of every layer."""
        cache = CacheUpTo(self.llm.model.config)
        if not self.beginning:
            return cache, ()
        ids = torch.tensor([self.beginning], device=self.llm.device)
        decoder = self.llm.model.base_model
        out = decoder(input_ids=ids, output_hidden_states=True, **with_cache(decoder, cache))
        return cache, out.get("hidden_states") or ()

    def read(self, caption: str) -> Reading | Tensor:
        if not caption:
            return read_inside(self, caption)
        row = self.think(caption)
        if self.show == "reencode":
            return read_inside(self, self.written[caption] or caption)
        return row

    @torch.no_grad()
    def think(self, caption: str) -> Tensor:
        """Write on after the caption, into `written` -> its row (T, W)."""
        llm = self.llm
        ids = llm.open_ids(self.frame.replace("{}", caption))
        if len(ids) >= llm.max_tokens:
            raise ValueError(
                f"a prompt of {len(ids)} tokens with its frame leaves {llm.name} no room to think"
            )

        # what stands in the cache already: the frame's end may have melted into the caption's
        # first token, and one token at least must be left to start the writing
        shared = 0
        while shared < min(len(self.beginning), len(ids) - 1):
            if self.beginning[shared] != ids[shared]:
                break
            shared += 1

        # the writing; each token's keys and values are in the cache as it is read
        cache = self.frame_cache(shared)
        out = self.generate(ids, cache)
        said = llm.tokenizer.decode(out.sequences[0, len(ids) :], skip_special_tokens=True)
        self.written[caption] = said.strip()

        # all but the last token, which the model has not read
        length = cache.get_seq_length()
        if out.hidden_states:
            cache.hidden_states = self.join_states(out.hidden_states, length)
        row = llm.pack(cache, torch.tensor([length], device=llm.device))[0]

        # the frame stays out of sight, and the prompt too where something was written after it
        start = shared
        if self.show == "written" and length > len(ids):
            start = len(ids)
        shown = list(range(start, length))
        if start and ids[0] == llm.tokenizer.bos_token_id and self.shows_all():
            shown = [0, *shown]  # BOS was seen in training too
        self.shown[caption] = out.sequences[0, shown].tolist()
        return row[shown]

    def shows_all(self) -> bool:
        """Whether the image looks at a caption's first token when nothing is written."""
        return getattr(self.inside, "expose", "all") == "all"

    def frame_cache(self, shared: int) -> DynamicCache:
        """A copy of the frame's cache, with its first `shared` tokens alone."""
        cache = copy.deepcopy(self.begun)
        if shared < len(self.beginning):
            try:
                cache.crop(shared - len(self.beginning))
            except (RuntimeError, ValueError):  # a linear-attention layer's state does not go back
                return CacheUpTo(self.llm.model.config)
        return cache

    def generate(self, ids: list[int], cache: DynamicCache):
        """Greedily on after ids, to the line's end; of a chat model, to the end of its turn."""
        model = self.llm.model
        prompt = torch.tensor([ids], device=self.llm.device)
        stop = []
        if not self.llm.tokenizer.chat_template:
            stop.append(partial(at_line_end, self.llm.tokenizer, len(ids)))
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **with_cache(model, cache),
            stopping_criteria=stop,
            do_sample=False,
            num_beams=1,
            max_new_tokens=min(self.tokens, self.llm.max_tokens - len(ids)),
            pad_token_id=0,
            return_dict_in_generate=True,
            # only the LLM of a bridge keeps hidden states
            output_hidden_states=bool(getattr(self.llm, "states", ())),
        )

    def join_states(self, steps: tuple, length: int) -> list[Tensor]:
        """The hidden states of each layer, (1, length, d): the frame's, and those of every step."""
        written = sum(step[0].shape[1] for step in steps)
        joined = []
        for layer in range(len(steps[0])):
            parts = [step[layer] for step in steps]
            if written < length:
                parts.insert(0, self.begun_states[layer][:, : length - written])
            joined.append(torch.cat(parts, dim=1))
        return joined


def at_line_end(tokenizer, prompt_length: int, so_far: Tensor, scores) -> Tensor:
    """Whether each row has ended its line: a stopping criterion of `generate`."""
    ended = ["\n" in tokenizer.decode(row[prompt_length:]) for row in so_far]
    return torch.tensor(ended, device=so_far.device)


def read_inside(reader, caption: str) -> Reading | Tensor:
    """What the reader inside another makes of a caption; without one, its tokens."""
    if reader.inside is None:
        return Reading(reader.llm.tokenize(caption))
    return reader.inside.read(caption)


# -------------------------------------------------------------------------------------------------
# what cannot be


def check_heard(reader, only_tokens: bool) -> None:
    """ValueError if a reader that gives finished rows meets a bridge that asks for tokens alone."""
    if only_tokens and hasattr(reader, "flag"):
        raise ValueError(
            f"{reader.flag} is for what the LLM reads, and --bridge dense hears nothing of it: "
            "leave one out"
        )


def check_room(llm: FrozenLLM, reader, room: int) -> None:
    """ValueError if a caption has no room within the template and the positions that stay free."""
    while reader is not None and not isinstance(reader, Template):
        reader = reader.inside
    if reader is None:
        around = len(llm.tokenizer("").input_ids)
    else:
        around = len(llm.tokenizer(reader.before).input_ids) + len(reader.after)
    if around + room >= llm.max_tokens:
        free = f" of which {room} stay free" if room else ""
        raise ValueError(
            f"the template has {around} tokens, and the LLM takes {llm.max_tokens}{free}: it "
            "leaves no room for a caption; expected a shorter --template"
        )


# -------------------------------------------------------------------------------------------------
# readers from a checkpoint and from flags


def reader_from(llm: FrozenLLM, made_for: dict):
    """The reader that a checkpoint was trained with; None if it was the bare caption."""
    template = "{}" if made_for.get("template") is None else made_for["template"]
    expose = made_for.get("expose") or "all"
    reader = None
    if template != "{}" or expose != "all":
        reader = Template(llm, template, expose)
    if made_for.get("thinking"):
        reader = Thinking(llm, *made_for["thinking"], reader)
    return reader


def reader_from_flags(llm: FrozenLLM, template: str, read: str | None) -> tuple:
    """What train.py's --template and --read say -> the reader, and what the checkpoint keeps."""
    name = None
    options = {}
    if read:
        name, options = colon_form(read, READ, "--read")
    if name == "chat" or "chat" in options:
        template = chat(llm, template)
    expose = "all"
    if name == "after" or "after" in options:
        expose = "after"
    stored = {"template": template, "expose": expose, "thinking": None}
    reader = reader_from(llm, stored)
    if name in ("think", "rewrite"):
        stored["thinking"] = thinking_of(llm, name, options)
        reader = Thinking(llm, *stored["thinking"], reader)
    return reader, stored


def with_reading(llm: FrozenLLM, read: str):
    """The reader that sample.py's --read asks for, around the one that the checkpoint brings."""
    name, options = drawing_form(read)
    if name == "image":
        from extras.looking import Looking, open_picture

        return Looking(llm, open_picture(options[""]), llm.reader)
    inside = llm.reader
    if isinstance(inside, Thinking):
        inside = inside.inside
    return Thinking(llm, *thinking_of(llm, name, options), inside)


def drawing_form(read: str) -> tuple[str, dict]:
    """--read of sample.py and evaluate.py -> what the LLM does first, and its options."""
    name, colon, path = read.partition(":")
    if name != "image":
        return colon_form(read, READ_TO_DRAW, "--read")
    if not path:
        raise ValueError("--read image: expected image:FILE, a picture to start from")
    return name, {"": path}  # which may have colons


def thinking_of(llm: FrozenLLM, name: str, options: dict) -> list:
    """The arguments of Thinking that --read think or rewrite says: frame, tokens, show."""
    if "" in options and "tokens" in options:
        raise ValueError(f"--read {name}: expected the number of tokens once, not twice")
    number = options.get("", options.get("tokens", TOKENS))
    try:
        tokens = positive(int)(str(number))
    except Exception as error:  # argparse's own kind
        raise ValueError(f"--read {name}: {error}") from None
    path = Path(options.get("frame", FRAMES / f"{name}.txt"))
    try:
        frame = read_text(path).removesuffix("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"--read {name}:frame={path} cannot be read: {error}") from None
    if llm.tokenizer.chat_template:
        frame = chat(llm, frame)
    show = {"think": "all", "rewrite": "written"}[name]
    if "reencode" in options:
        show = "reencode"
    return [frame, tokens, show]


def chat(llm: FrozenLLM, template: str = "{}") -> str:
    """The template as a user's message in the model's own chat template. ValueError if the model
    has none."""
    tokenizer = llm.tokenizer
    if not tokenizer.chat_template:
        raise ValueError(f"{llm.name} has no chat template; expected an instruct model")
    said = [{"role": "user", "content": template}]
    try:
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is a program of its own
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"the chat template of {llm.name} fails ({why})") from None
    return text.removeprefix(tokenizer.bos_token or "")  # the tokenizer puts that there itself
