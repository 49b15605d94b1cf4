"""Runs of older versions: the settings that they have stored, in today's words."""


def in_new_words(stored: dict, config: dict) -> dict:
    """train.py's settings, of a run whose expert has this config -> as they are now.

    What has no flag any more (ema, time_mean) stays as the run had it.
    """
    new = dict(stored)
    if "one_object" in new:
        new = with_options(new)
    if "patcher" not in new:  # other defaults, and --size meant other sizes
        new["patcher"] = "linear"
        if new["data"] == "shapes":
            new["data"] = "shapes:colored"
        if "text_layers" in config:
            new |= {"width": config["width"], "depth": len(config["text_layers"])}
    if ":checkpointing" in new["bridge"]:  # when a mirrored tower alone had it
        options = new["bridge"].split(":")
        options.remove("checkpointing")
        new |= {"bridge": ":".join(options), "checkpointing": True}
    return new


def with_options(stored: dict) -> dict:
    """Settings from before options were written with what they belong to."""
    new = dict(stored)
    data = [new["data"]]
    if new.pop("one_object"):
        data.append("one-object")
    if new.pop("emoji_variants", False):
        data.append("variants")
    font = new.pop("emoji_font", None)
    if font:
        data.append(f"font={font}")
    new["data"] = ":".join(data)
    new["bridge"] = bridge(new)
    new["read"] = reading(new)
    new.pop("context_cache_mb", None)
    return new



def bridge(new: dict) -> str:
    """--bridge with the options that were flags of their own."""
    init = new.pop("init", "llm")
    state = new.pop("hidden_state", "last")
    stride = new.pop("stride", 3)
    no_refiner = new.pop("no_refiner", False)
    per_layer = new.pop("per_layer", False)
    queries = new.pop("queries", 64)
    parts = [new.get("bridge", "mot")]
    if new.pop("expert", "tiny") == "mirror":
        parts = ["mirror"]
        if init != "llm":
            parts.append(f"init={init}")
    elif parts == ["last"]:
        parts.append(f"state={state}")
    elif parts == ["lap"]:
        parts.append(f"stride={stride}")
        if no_refiner:
            parts.append("no-refiner")
        if per_layer:
            parts.append("per-layer")
    elif parts == ["metaqueries"]:
        parts.append(f"queries={queries}")
    return ":".join(parts)


def reading(new: dict) -> str | None:
    """--read for --expose, --chat, --think and --rewrite. What is really read around a caption is
    kept in the checkpoint (template, expose, thinking), and that is what a resumed run goes by."""
    think = new.pop("think", None)
    rewrite = new.pop("rewrite", None)
    frame = new.pop("frame", None)
    chat = new.pop("chat", False)
    expose = new.pop("expose", "all")
    parts = []
    if rewrite:
        parts.append("rewrite")
        if rewrite == "reencode":
            parts.append("reencode")
        if think:
            parts.append(f"tokens={think}")
    elif think:
        parts.append(f"think:tokens={think}")
    if parts and frame:
        parts.append(f"frame={frame}")
    if not parts and chat:
        parts.append("chat")
    if expose == "after":
        parts.append("after")
    return ":".join(parts) or None
