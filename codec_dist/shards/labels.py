"""Labels of samples: an integer member, or a field of the JSON member."""

import json
from collections.abc import Mapping

LARGEST_LABEL = 2**31 - 1


def read_label(members: Mapping[str, bytes], label_field: str) -> tuple[int | None, str | None]:
    """Label of a sample, and what is wrong with it.

    Args:
        members: extension → bytes of the sample's members.
        label_field: an extension such as ``cls``, or ``json:FIELD``.

    Returns:
        (label, None), (None, None) for a sample without label, or (None, fault).
    """
    extension, _, field = label_field.partition(":")
    content = members.get(extension.lower())
    if content is None:
        return None, None
    if field:
        return _from_json(bytes(content), field)
    text = bytes(content).strip()
    if not text.isdigit() or len(text) > 10 or int(text) > LARGEST_LABEL:
        return None, f"the label {text[:40].decode(errors='replace')!r} in .{extension} is not an integer from 0"
    return int(text), None


def _from_json(content: bytes, field: str) -> tuple[int | None, str | None]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        return None, f"the .json member is not JSON: {error}"
    if not isinstance(values, dict):
        return None, "the .json member is not an object"
    label = values.get(field)
    if label is None:
        return None, None
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label <= LARGEST_LABEL:
        return None, f"the label {str(label)[:40]!r} in field {field!r} of .json is not an integer from 0"
    return label, None
