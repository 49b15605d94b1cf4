"""What the flags and options of older versions have become; cli.py answers unknown ones with it."""

CONSTANT = "a constant at the top of train.py"

RENAMED = {  # flag, or a choice's option -> "... is now" this
    # the data
    "--one-object": "--data shapes:one-object",
    "--emoji-font": "--data emoji:font=FILE",
    "--emoji-variants": "--data emoji:variants",
    # how the LLM reaches the expert
    "--expert": "--bridge mirror",
    "--init": "--bridge mirror:init=random",
    "mirror:checkpointing": "--checkpointing",
    "--hidden-state": "--bridge last:state=12",
    "--stride": "--bridge lap:stride=1",
    "--no-refiner": "--bridge lap:no-refiner",
    "--per-layer": "--bridge lap:per-layer",
    "--queries": "--bridge metaqueries:queries=16",
    # what the LLM reads, and writes
    "--think": "--read think:40",
    "--rewrite": "--read rewrite, or --read rewrite:reencode",
    "--frame": "--read think:40:frame=FILE, or --read rewrite:frame=FILE",
    "--image": "--read image:FILE",
    "--expose": "--read after",
    "--chat": "--read chat",
    # training
    "--ema": f"EMA_DECAY, {CONSTANT}",
    "--time-mean": f"TIME_MEAN, {CONSTANT}",
    "--context-cache-mb": "cache_mb of FrozenLLM, in llm.py",
    # drawing
    "--layout": "--prompts FILE:geneval (or dpg, or wise)",
    "--guidance-interval": "--guidance 3:from=0.2:to=0.8",
    "--renorm": "--guidance 3:renorm",
    "--batch-size": "for train.py alone: pictures are drawn in batches of a fixed size",
    # scoring
    "--race": "python -m extras.race mot,lap:stride=1",
    "--minutes": "a flag of python -m extras.race",
    "--seeds": "a flag of python -m extras.race",
    "--probe": "python -m extras.probe --ckpt RUN",
    "--probe-llm": "python -m extras.probe --llm NAME",
}
