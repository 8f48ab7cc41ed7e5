"""What a call of the command line leaves to a test; the fixture ``command`` makes the calls."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple


class Done(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line that an expected error is."""
        assert self.status == 1, self
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("error: ")


Command = Callable[..., Done]


def names(done: Done) -> list[str]:
    """Of the documents that it printed as JSON."""
    return [each["name"] for each in done.json["documents"]]
