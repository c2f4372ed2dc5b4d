"""Numbers in sentences."""


def counted(number: int, one: str, more: str) -> str:
    """The number and what there is of it: `counted(1, "mask has", "masks have")` -> "1 mask has"."""
    return f"{number} {one if number == 1 else more}"
