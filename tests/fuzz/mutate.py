"""Mutations of bytes, as fuzzers do them, and of protobuf messages, whose bytes rarely survive that."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from google.protobuf.descriptor import FieldDescriptor
    from google.protobuf.message import Message

MAX_BYTES = 1 << 16
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)
TEXTS = (b"", b"\x00", b"../", b"\xff\xfe", b"nan", b"-inf", b"1e999", b"9" * 5000, b"\xed\xa0\x80", b"%", b"{" * 400)


def mutated(pool: Sequence[bytes], chance: random.Random) -> bytes:
    """One of the pool with some changes."""
    data = bytearray(chance.choice(pool))
    for _ in range(1 << chance.randrange(5)):
        at = chance.randrange(len(data) + 1)
        length = min(len(data) - at, 1 << chance.randrange(9))
        match chance.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1 if at < len(data):
                data[at] = chance.randrange(256)
            case 2:
                width = chance.choice((1, 2, 4, 8))
                number = chance.choice(NUMBERS) % (1 << 8 * width)
                data[at : at + width] = number.to_bytes(width, chance.choice(("little", "big")))
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                data[at : at + chance.choice((0, length))] = chance.choice(TEXTS)
            case 6:
                other = chance.choice(pool)
                data[at:] = other[chance.randrange(len(other) + 1) :]
            case 7:
                del data[at:]
            case _:
                data[at:at] = chance.randbytes(length)
    return bytes(data[:MAX_BYTES])


WORDS = (
    "",
    "x",
    "cells",
    "c1",
    "a" * 300,
    "../x",
    "é",
    "\x00",
    "7",
    "9" * 5000,
    "nan",
    "1e999",
    "a,b",
    '"',
    "%",
    "{}",
    "WyJ9",
)
REALS = (0.0, -1.0, 0.5, 1e308, float("inf"), float("-inf"), float("nan"))


def mutated_message(kind: type[Message], pool: Sequence[bytes], chance: random.Random) -> bytes:
    """One of the pool with some fields changed."""
    message = kind()
    message.MergeFromString(chance.choice(pool))
    for _ in range(1 << chance.randrange(4)):
        _change(message, chance, depth=0)
    return message.SerializeToString()


def _change(message: Any, chance: random.Random, depth: int) -> None:
    field: FieldDescriptor = chance.choice(message.DESCRIPTOR.fields)
    held = getattr(message, field.name)
    # Numbers out of the field's range, and text that is no key, stay out.
    with suppress(ValueError, TypeError):
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value = field.message_type.fields_by_name["value"]
            if value.message_type is None:
                held[chance.choice(WORDS)] = _value(value, chance)
            else:
                _change(held[chance.choice(WORDS)], chance, depth + 1)
        elif chance.randrange(8) == 0:
            message.ClearField(field.name)
        elif field.message_type is not None:
            inner = held.add() if field.is_repeated else held
            if depth < 4 and inner.DESCRIPTOR.fields:
                _change(inner, chance, depth + 1)
        elif field.is_repeated:
            held.append(_value(field, chance))
        else:
            setattr(message, field.name, _value(field, chance))


def _value(field: FieldDescriptor, chance: random.Random) -> Any:
    match field.cpp_type:
        case field.CPPTYPE_STRING if field.type == field.TYPE_BYTES:
            return chance.choice((b"", *TEXTS, chance.randbytes(40)))
        case field.CPPTYPE_STRING:
            return chance.choice(WORDS)
        case field.CPPTYPE_DOUBLE | field.CPPTYPE_FLOAT:
            return chance.choice(REALS)
        case field.CPPTYPE_BOOL:
            return chance.random() < 0.5
        case field.CPPTYPE_ENUM:
            return chance.choice((0, 1, 2, 3, 99, -1))
        case _:
            return chance.choice((1, -1)) * chance.choice(NUMBERS)
