"""An expert to share: a run's averaged weights in bfloat16, half as large, and what is known of it.

    python -m extras.export --ckpt runs/shapes --out assets/expert
    python sample.py --ckpt assets/expert --prompt "a red circle"

Writes model.safetensors (the config inside; it loads as float32 again), its copy config.json for
the Hub, and about.json: the run's settings, its steps, its last loss, and its scores.
"""

if __name__ == "__main__":  # before torch is imported: Ctrl-C meanwhile is one line
    if not __package__:
        raise SystemExit("run it from the repository: python -m extras.export")
    import cli

    cli.start()

import json
from pathlib import Path

import torch

from checkpoint import STATE, load_expert, pick_checkpoint
from cli import (
    OneLineParser,
    make_folder,
    one_line_errors,
    parse_json,
    write_text,
    write_whole,
)
from extras.run_logs import read_json, read_json_lines
from model import ImageExpert
from weights import read_safetensors

WEIGHTS = "model.safetensors"


def export(ckpt: str, out: Path) -> Path:
    """The expert of a run's folder or Hub id -> `out`, in bfloat16. ValueError if `out` holds
    anything else than an expert that was exported before."""
    expert = load_expert(ckpt, torch.device("cpu"))
    if (out / STATE).exists():
        raise ValueError(f"{out} holds a run; --out names another folder")
    if (out / WEIGHTS).exists():
        load_expert(str(out), torch.device("cpu"))  # an LLM's weights, say, are not overwritten
    about = about_run(Path(ckpt))
    origin = expert.made_for.get("from")
    if origin:  # where it lay on this machine is nobody's business
        origin["name"] = Path(str(origin.get("name"))).name

    def write(folder: Path) -> None:
        folder.mkdir()
        expert.to(torch.bfloat16).save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # an empty form of the Hub's client

    make_folder(out)
    write_whole(out / WEIGHTS, write)
    write_text(out / "about.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return out / WEIGHTS


def about_run(folder: Path) -> dict:
    """What a run's folder tells of it; what is not there is left out. JSON"""
    about = {}
    if (folder / STATE).exists():
        metadata, _ = read_safetensors(folder / STATE)
        try:
            about["step"] = int(metadata["step"])
            settings = {} | parse_json(metadata["args"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{folder / STATE} is not the state of a training run") from None
        settings.pop("out", None)
        if settings.get("start"):
            settings["start"] = Path(str(settings["start"])).name
        about["settings"] = settings
    if (folder / "metrics.jsonl").exists():
        lines = read_json_lines(folder / "metrics.jsonl")
        if lines:
            about["last line of metrics.jsonl"] = lines[-1]
    if (folder / "evaluate.json").exists():
        scores = {}
        for suite, result in read_json(folder / "evaluate.json").items():
            if isinstance(result, dict) and "rows" in result:
                scores[suite] = result.get("mean", result["rows"])
        about["scores"] = scores
    return about


def describe(expert: ImageExpert, file: Path) -> str:
    parameters = sum(p.numel() for p in expert.parameters()) / 1e6
    megabytes = file.stat().st_size / 1e6
    return (
        f"{file}: {parameters:.1f} M parameters, {megabytes:.1f} MB; it draws beside "
        f"{expert.made_for.get('llm')}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Write an expert in bfloat16, to share.")
    parser.add_argument("--ckpt", help="a run's folder or a Hub id (default: the newest run)")
    parser.add_argument("--out", required=True, help="the folder for it")
    args = parser.parse_args(argv)
    ckpt, why = pick_checkpoint(args.ckpt)
    print(f"checkpoint {ckpt} ({why})")
    file = export(ckpt, Path(args.out))
    print(describe(load_expert(args.out, torch.device("cpu")), file))


if __name__ == "__main__":
    one_line_errors(main)
