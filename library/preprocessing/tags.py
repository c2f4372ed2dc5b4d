"""Lists of tags as they are written."""

import re


def tags_in(text: str, separator: str = ",") -> list[str]:
    """The tags in a text: between separators or commas, or one a line, as other taggers write them."""
    return [tag.strip() for tag in re.split(rf"[\n,]|{re.escape(separator)}", text) if tag.strip()]
