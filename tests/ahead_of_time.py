"""Compile the kernels for cards that are not here: a process of its own, because the tests'
interprets them. Prints a JSON line: of each its shared memory, and its loops' spills.

    python tests/ahead_of_time.py "[[90, 128, 0], [86, 256, 2]]"     # capability, width, kernel
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent))
from extras import kernel

KERNELS = (kernel._forward, kernel._backward_rows, kernel._backward_keys)
POINTERS = {"LENGTHS": "*i32", "COUNTS": "*i32", "LSE": "*fp32", "DELTA": "*fp32"}
NUMBERS = {"scale": "fp32", "factor": "fp32", "H": "i32", "G": "i32", "N": "i32", "S": "i32"}
MATRIX = ("*bf16", "i32", "i32", "i32")


def compiled_for(card: int, width: int, index: int):
    BM, BN, warps, stages, *flip = kernel.blocks(card, width)[index]
    sizes = {"BM": BM, "BN": BN, "DK": width, "DV": width, "FLIP": bool(flip and flip[0])}
    signature = {}
    constants = {}
    divisible = {}
    for i, name in enumerate(KERNELS[index].arg_names):
        if name in sizes:
            signature[name] = "constexpr"
            constants[(i,)] = sizes[name]
        elif name in NUMBERS:
            signature[name] = NUMBERS[name]
        elif name in POINTERS:
            signature[name] = POINTERS[name]
            divisible[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = MATRIX
            for j in range(4):
                divisible[(i, j)] = [["tt.divisibility", 16]]
    source = ASTSource(KERNELS[index], signature, constants, divisible)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)


def instructions(cubin: bytes) -> list[tuple[str, list[int]]]:
    """A kernel's machine code: what each instruction says, and which may come after it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        disassembler = triton.knobs.nvidia.cuobjdump.path
        done = subprocess.run([disassembler, "-sass", file], capture_output=True, text=True)
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", done.stdout)
    place = {int(address, 16): i for i, (address, _) in enumerate(found)}
    code = []
    for i, (_, text) in enumerate(found):
        following = []
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target:
            following.append(place[int(target[1], 16)])
        ends = re.match(r"EXIT|RET|BRA(\.\w+)* `?\(?0x", text)  # without a condition
        if not ends and i + 1 < len(found):
            following.append(i + 1)
        code.append((text, following))
    return code


def loops_of(code: list[tuple[str, list[int]]]) -> list[list[str]]:
    """The instructions of each loop around a matrix product: the strongly connected components
    (Tarjan 1972, with a stack of its own in place of recursion)."""
    order = {}
    lowest = {}
    open_nodes = []
    is_open = set()
    loops = []
    for root in range(len(code)):
        todo = [] if root in order else [(root, 0)]
        while todo:
            node, done = todo.pop()
            if done == 0:
                order[node] = lowest[node] = len(order)
                open_nodes.append(node)
                is_open.add(node)
            following = code[node][1]
            if done > 0 and following[done - 1] in is_open:
                lowest[node] = min(lowest[node], lowest[following[done - 1]])
            if done < len(following):
                todo.append((node, done + 1))
                if following[done] not in order:
                    todo.append((following[done], 0))
            elif lowest[node] == order[node]:
                at = open_nodes.index(node)
                loop = open_nodes[at:]
                del open_nodes[at:]
                is_open.difference_update(loop)
                loops.append([code[i][0] for i in loop])
    return [loop for loop in loops if len(loop) > 1 and any("MMA" in text for text in loop)]


def main() -> None:
    report = []
    for card, width, index in json.loads(sys.argv[1]):
        done = compiled_for(card, width, index)
        loops = loops_of(instructions(done.asm["cubin"]))
        spills = 0
        for loop in loops:
            spills += sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in loop)
        one = {"kernel": KERNELS[index].__name__, "card": card, "width": width}
        one |= {"shared": done.metadata.shared, "loops": len(loops), "spills in loops": spills}
        one["instructions"] = [len(loop) for loop in loops]
        report.append(one)
    print(json.dumps(report))


if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    main()
