"""Names that are made of a sender's labels and of the time: files, topics, subjects."""

import re
import time
from collections.abc import Callable, Mapping, Sequence

from zmqpush.errors import SettingsError

_FIELD = re.compile(r"\{(\w*)\}")
_FIELDS = ("type", "host")
_TIME_CODE = re.compile(r"%(.?)", re.DOTALL)
_TIME_CODES = "YmdHMSjyabABeuwUWVGFTRsZzp%"


class Template:
    """
    A text with ``{type}``, ``{host}`` and time codes such as ``%Y%m%d``.

    Args:
        text: The template.
        what: What names it makes, and a good one, for the error.
        clean: Makes a label one that cannot change the structure of the name.

    Attributes:
        labelled: Whether the names depend on labels.
        varies: Whether they depend on anything.

    Raises:
        SettingsError: If no names can be made of it.

    """

    def __init__(self, text: str, what: tuple[str, str], clean: Callable[[str], str]) -> None:
        names = _FIELD.findall(text)
        if wrong := _wrong(text, names):
            raise SettingsError(
                f"{text!r} is not a template for {what[0]}: {wrong}; a good one is {what[1]}"
            )
        self.text = text
        self._clean = clean
        self.labelled = bool(names)
        self.varies = self.labelled or "%" in text

    def fill(self, labels: Mapping[str, str]) -> str:
        """Return the name it is now for these labels."""
        if not self.varies:
            return self.text
        text = time.strftime(self.text)
        return _FIELD.sub(lambda match: self._clean(labels.get(match[1], "")), text)

    def pattern(self, any_label: str) -> str:
        """Return the name it is now, with ``any_label`` in the place of each label."""
        return _FIELD.sub(any_label, time.strftime(self.text) if self.varies else self.text)


def _wrong(text: str, names: Sequence[str]) -> str:
    """Return what of a template cannot be, if there is something."""
    for name in names:
        if name not in _FIELDS:
            return f"{{{name}}} is not one of {', '.join(f'{{{field}}}' for field in _FIELDS)}"
    if brace := re.search("[{}]", _FIELD.sub("", text)):
        return f"a {brace[0]} stands alone"
    for code in _TIME_CODE.findall(text):
        if not code or code not in _TIME_CODES:
            return f"%{code} is no time code; a percent sign is %%"
    return ""
