"""Inline assembly -> C++: each PTX instruction becomes a call of the function of that name in machine/ptx.h.

    asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(x), "f"(y) : "memory");
    ptx::st_shared_v2_f32((address), ptx::list((x), (y)));

The rest of a kernel is C++ already. Line numbers stay, for the compiler's messages.
"""

from __future__ import annotations

import re

__all__ = ["translate"]

_ASM = re.compile(r"\basm\s*(?:volatile\s*)?\(")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_REGISTERS = {"pred": "bool", "b32": "unsigned", "u32": "unsigned", "s32": "int", "f32": "float", "b64": "uint64_t"}


def translate(source: str) -> str:
    """The source without an asm statement."""
    parts, position = [], 0
    while match := _ASM.search(source, position):
        end = _closing(source, match.end())
        statement = source[match.start() : end + 1]
        parts += [source[position : match.start()], _statement(source[match.end() : end])]
        parts += ["\n" * statement.count("\n")]
        position = end + 1
    return "".join([*parts, source[position:]])


def _closing(text: str, start: int) -> int:
    """Where the parenthesis closes that opens before `start`."""
    depth, i = 1, start
    while depth:
        if string := _STRING.match(text, i):
            i = string.end()
            continue
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        i += 1
    return i - 1


def _split(text: str, separator: str) -> list[str]:
    """At separators outside of brackets and strings."""
    parts, depth, start, i = [], 0, 0, 0
    while i < len(text):
        if string := _STRING.match(text, i):
            i = string.end()
            continue
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if text[i] == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
        i += 1
    return [part.strip() for part in [*parts, text[start:]]]


def _statement(content: str) -> str:
    text, *sections = _split(content, ":")
    code = "".join(_STRING.findall(text)).replace("\\n", " ").strip()
    outputs, inputs = ([operand for operand in _split(x, ",") if operand] for x in [*sections, "", ""][:2])
    # "=r"(x) -> (x)
    operands = [operand[_found(operand).end() :].strip() for operand in (*outputs, *inputs)]
    if code.startswith("{"):
        code = code[1:-1]
    lines = [_instruction(line, operands, len(outputs)) for line in _split(code, ";") if line]
    return "".join(lines) if len(lines) < 2 else f"do {{ {' '.join(f'{line};' for line in lines)} }} while (false)"


def _found(operand: str) -> re.Match[str]:
    match = _STRING.match(operand)
    assert match, f"not an operand of an asm statement: {operand}"
    return match


def _instruction(line: str, operands: list[str], outputs: int) -> str:
    label = re.match(r"(\w+):(?!:)\s*", line)
    if label:
        return f"{label[1]}: {_instruction(line[label.end() :], operands, outputs)}"
    predicate = re.match(r"@(!?\w+)\s+", line)
    if predicate:
        return f"if ({predicate[1]}) {_instruction(line[predicate.end() :], operands, outputs)}"
    opcode, _, rest = line.partition(" ")
    if opcode == ".reg":
        kind, _, names = rest.strip().partition(" ")
        return f"{_REGISTERS[kind[1:]]} {names}"
    if opcode == "bra":
        return f"goto {rest}"
    arguments = [x for operand in _split(rest, ",") for x in _arguments(operand, operands, outputs)]
    # The width of a wgmma is a template argument.
    width = re.search(r"\.m64n(\d+)k", opcode)
    name = re.sub(r"\W+", "_", opcode.replace(f"n{width[1]}k", "k") if width else opcode)
    return f"ptx::{name}{f'<{width[1]}>' if width else ''}({', '.join(arguments)})"


def _arguments(text: str, operands: list[str], outputs: int) -> list[str]:
    """One operand of an instruction; an address may have several parts."""
    if not text or text == "_":
        return []
    if text.startswith("["):
        return [x for part in _split(text[1:-1], ",") for x in _arguments(part, operands, outputs)]
    if text.startswith("{"):
        parts = _split(text[1:-1], ",")
        written = all(part.startswith("%") and int(part[1:]) < outputs for part in parts)
        values = ", ".join(x for part in parts for x in _arguments(part, operands, outputs))
        return [f"ptx::{'registers' if written else 'list'}({values})"]
    if text.startswith("%"):
        return [operands[int(text[1:])]]
    if literal := re.fullmatch(r"0f([0-9a-fA-F]{8})", text):
        return [f"__uint_as_float(0x{literal[1]}u)"]
    return [text]
