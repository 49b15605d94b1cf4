"""Readers: what the LLM reads in place of the bare caption.

    python train.py --template '"{}" in English:' --read after
    python sample.py --prompt "a red ring" --read think:40            # thinking.py
    python sample.py --prompt "in blue" --read image:FILE             # a picture first: looking.py

A reader is a small object with one method, read(caption) -> Reading (tokens that FrozenLLM then
runs), or -> the finished row (T, W) of the caption; read_all(captions) too, if it is faster with
several. It is set by one assignment: llm.reader = ...
Readers nest: `inside` is the reader for what one of them leaves as it is.
"""

from pathlib import Path

from cli import colon_form, positive
from extras.files import read_text
from extras.thinking import TOKENS, Thinking
from llm import FrozenLLM, Reading

FRAMES = Path(__file__).parent.parent / "assets" / "frames"  # what it is asked: to be read, edited
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
    """The template as what a user says, in the model's own chat template. ValueError if the model
    has none."""
    tokenizer = llm.tokenizer
    if not tokenizer.chat_template:
        raise ValueError(f"{llm.name} has no chat template; expected an instruct model")
    messages, begun = turns_of(template)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is a program of its own
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"the chat template of {llm.name} fails ({why})") from None
    return text.removeprefix(tokenizer.bos_token or "") + begun  # the tokenizer puts BOS itself


def turns_of(text: str) -> tuple[list[dict], str]:
    """A text as a conversation: its messages, and how the answer begins that is asked for last.

    Examples, "asked => answered" a line, are turns, with the lines before one (in one message,
    SmolLM2 answers each prompt alike). A text without them, or that does not end in such a line, is
    one message.
    """
    messages = []
    asked = []
    for line in text.split("\n"):
        question, arrow, answer = line.partition("=>")
        asked.append(question.strip() if arrow else line)
        if arrow:
            messages.append({"role": "user", "content": "\n".join(asked)})
            messages.append({"role": "assistant", "content": answer.strip()})
            asked = []
    if asked or len(messages) < 4:
        return [{"role": "user", "content": text}], ""
    return messages[:-1], messages[-1]["content"]
