"""No way to the kernel's keyrings for commands. Only the standard library.

They belong to a user, not to a namespace: what one run put there the next one could read, and
whatever else this user keeps there too. So the calls are refused, as Docker does.
"""

import ctypes
import errno
import platform
import struct
from collections.abc import Mapping

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _EQUALS, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06
_NUMBER, _ARCHITECTURE = 0, 4
"""Where the kernel tells a filter which call it is, and of which architecture."""
_NOT_X32 = 0xBFFFFFFF

_CALLS: dict[str, dict[int, tuple[int, ...]]] = {
    "x86_64": {0xC000003E: (248, 249, 250), 0x40000003: (286, 287, 288)},
    "aarch64": {0xC00000B7: (217, 218, 219), 0x40000028: (309, 310, 311)},
}
"""add_key, request_key and keyctl, by the architectures that each machine can execute."""


def close_keyrings() -> bool:
    """From now on this thread and all it starts get EPERM; False: this kernel cannot do it."""
    program = _program(_CALLS.get(platform.machine(), {}))
    held = ctypes.create_string_buffer(program)
    described = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(held))
    prctl = ctypes.CDLL(None).prctl
    return bool(prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, described, 0, 0) == 0)


def _program(calls: Mapping[int, tuple[int, ...]]) -> bytes:
    lines = []
    for architecture, numbers in calls.items():
        block = [_line(_LOAD, value=_NUMBER), _line(_AND, value=_NOT_X32)]
        for left, number in zip(range(len(numbers), 0, -1), numbers, strict=True):
            block.append(_line(_EQUALS, left, 0, number))
        block += [_line(_RETURN, value=_ALLOW), _line(_RETURN, value=_ERRNO | errno.EPERM)]
        lines.append(_line(_LOAD, value=_ARCHITECTURE))
        lines.append(_line(_EQUALS, 0, len(block), architecture))
        lines += block
    return b"".join([*lines, _line(_RETURN, value=_ALLOW)])


def _line(code: int, if_so: int = 0, if_not: int = 0, value: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_so, if_not, value)
