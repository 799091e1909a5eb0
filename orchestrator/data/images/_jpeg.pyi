from typing import Any

def bind(path: str, /) -> None: ...
def decode_region(
    image: Any,
    out: Any,
    left: int,
    top: int,
    width: int,
    height: int,
    eighths: int,
    channels: int,
    /,
) -> None: ...
