"""Draws the one idea: python -m extras.idea writes assets/idea.svg.

Left the frozen LLM, which reads the caption once; right the image expert, which runs at every step;
between them the key-value cache, the only thing that passes from one to the other.
"""

if __name__ == "__main__":
    import cli

    cli.start()

from html import escape
from pathlib import Path

from cli import one_line_errors, write_text

WIDTH = 860  # pixels
HEIGHT = 400
LAYERS = 3  # drawn of each tower
LAYER_HEIGHT = 44
LAYER_GAP = 18
LLM_LEFT = 30
CACHE_LEFT = 330
EXPERT_LEFT = 530
LLM_WIDTH = 220
EXPERT_WIDTH = 300
CACHE_WIDTH = 110
BOTTOM = 292  # lower edge of the first layer: both towers are read upwards

FROZEN = "#dbe7f5"  # fills
CACHE = "#fdebc8"
TRAINED = "#dcf1dd"
INK = "#222222"
STYLE = "font-family: system-ui, sans-serif; font-size: 14px"


def picture() -> str:
    """The whole drawing, as SVG."""
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', arrow_head()]

    llm_middle = LLM_LEFT + LLM_WIDTH / 2
    cache_middle = CACHE_LEFT + CACHE_WIDTH / 2
    expert_middle = EXPERT_LEFT + EXPERT_WIDTH / 2

    # the two towers and the cache between them, layer by layer
    for number in range(LAYERS):
        top = layer_top(number)
        name = layer_name(number)
        parts.append(box(LLM_LEFT, top, LLM_WIDTH, FROZEN, f"layer {name}, sees only text"))
        parts.append(box(CACHE_LEFT, top, CACHE_WIDTH, CACHE, f"K, V of {name}"))
        joint = f"Q_img · [ K_txt({name}) ; K_img ]"
        parts.append(box(EXPERT_LEFT, top, EXPERT_WIDTH, TRAINED, joint))
        middle = top + LAYER_HEIGHT / 2
        parts.append(arrow(LLM_LEFT + LLM_WIDTH, middle, CACHE_LEFT, middle))
        parts.append(arrow(CACHE_LEFT + CACHE_WIDTH, middle, EXPERT_LEFT, middle))
        if number:  # from the layer below
            bottom = top + LAYER_HEIGHT
            parts.append(arrow(llm_middle, bottom + LAYER_GAP, llm_middle, bottom))
            parts.append(arrow(expert_middle, bottom + LAYER_GAP, expert_middle, bottom))

    # what comes in below and what goes out above
    highest = layer_top(LAYERS - 1)
    parts.append(text(llm_middle, BOTTOM + 50, "“a red circle left of a blue square”"))
    parts.append(arrow(llm_middle, BOTTOM + 32, llm_middle, BOTTOM))
    parts.append(text(expert_middle, BOTTOM + 50, "noise, in patches"))
    parts.append(arrow(expert_middle, BOTTOM + 32, expert_middle, BOTTOM))
    parts.append(arrow(expert_middle, highest, expert_middle, highest - 32))
    parts.append(text(expert_middle, highest - 40, "velocity"))

    # names, and how often each part is computed
    title = highest - 78
    parts.append(text(llm_middle, title, "frozen LLM, any decoder", bold=True))
    parts.append(text(cache_middle, title, "its cache", bold=True))
    parts.append(text(expert_middle, title, "image expert, trained", bold=True))
    parts.append(text((llm_middle + cache_middle) / 2, HEIGHT - 22, "once for each caption"))
    parts.append(text(expert_middle, HEIGHT - 22, "at every step of training and drawing"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'style="{STYLE}">\n' + "\n".join(parts) + "\n</svg>\n"
    )


def layer_top(number: int) -> float:
    return BOTTOM - (number + 1) * LAYER_HEIGHT - number * LAYER_GAP


def layer_name(number: int) -> str:
    return f"l + {number}" if number else "l"


def box(left: float, top: float, width: float, fill: str, label: str) -> str:
    rectangle = (
        f'<rect x="{left}" y="{top}" width="{width}" height="{LAYER_HEIGHT}" rx="6" '
        f'fill="{fill}" stroke="{INK}"/>'
    )
    return rectangle + text(left + width / 2, top + LAYER_HEIGHT / 2 + 5, label)


def text(x: float, y: float, label: str, bold: bool = False) -> str:
    """A line of text, centred at x, standing on y."""
    weight = "bold" if bold else "normal"
    return (
        f'<text x="{x}" y="{y}" text-anchor="middle" font-weight="{weight}" '
        f'fill="{INK}">{escape(label)}</text>'
    )


def arrow_head() -> str:
    return (
        '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="{INK}"/></marker>'
    )


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" stroke-width="1.5" '
        'marker-end="url(#head)"/>'
    )


def main() -> None:
    file = Path(__file__).parent.parent / "assets" / "idea.svg"
    write_text(file, picture())
    print(file)


if __name__ == "__main__":
    one_line_errors(main)
